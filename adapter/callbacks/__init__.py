"""
HTTP in: what Norce calls. `endpoints` is the walk and the table of status codes, `senders` says who is calling,
`parsing` what was sent.
"""

# In the scope of a request whose body had come whole before anybody asked for it: `protocol` knows, `endpoints` then
# needs no time limit.
IS_WHOLE = "norce_adapter.is_whole"

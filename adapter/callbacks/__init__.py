"""
HTTP in: what Norce calls. `endpoints` is the walk and the table of status codes, `senders` says who is calling,
`parsing` what was sent.
"""

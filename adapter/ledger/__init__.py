"""
What the service remembers, in one database: notifications, deliveries, lanes, queues, attempts.

`inbox` remembers before we answer 200, `lanes` hands out work and records what became of it, `desk` is for people.
All of them write through `store`, which commits in groups: what they are told is on disk when the call returns.
"""

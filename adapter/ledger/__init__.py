"""The ledger: the durable state of the service, in one SQLite or PostgreSQL database.

`inbox` stores notifications before they are answered, `lanes` hands out work and records its results as `settlement`
computes them, `queries` and `commands` serve people. All of them write through `store`, which commits in groups: what a
call has written is on disk when it returns.
"""

"""Stories told by the whole service: a process, a ledger file, and the two companies that it stands between."""

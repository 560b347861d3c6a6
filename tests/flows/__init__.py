"""Flows through the whole service: a process, a real ledger, and servers in place of Norce and the shop."""

"""The second source of notifications: Norce's event log, compared with the ledger."""

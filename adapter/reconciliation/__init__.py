"""The comparison of Norce's event log and orders with the ledger, to find what never came."""

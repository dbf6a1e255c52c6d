"""Ray: the connection, the actors, the ledger of shards. No other room imports it, but the start of ranks."""

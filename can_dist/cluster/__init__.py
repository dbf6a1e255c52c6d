"""Ray: the connection, the actors, the ledger of shards. Only this room and the start of ranks import ray."""

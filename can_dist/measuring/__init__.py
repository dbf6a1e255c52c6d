"""Numbers in, numbers out: what the report, the comparison and the model card state."""

"""What is made of finished runs: comparisons, judgements, exports. Nothing here is an artifact."""

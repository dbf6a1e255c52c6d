"""The stages: each a function from artifacts to an artifact."""

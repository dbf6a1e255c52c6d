"""The demo: a small world made on the spot, and MoCAN on it."""

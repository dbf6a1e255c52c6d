"""Scorers: what turns a (conversation, response) into a number, higher is better."""

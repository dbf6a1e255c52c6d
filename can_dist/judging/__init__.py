"""Pairwise evaluation of responses by a language model behind an OpenAI-compatible endpoint."""

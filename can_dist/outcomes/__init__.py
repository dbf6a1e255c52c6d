"""Comparisons, judgements and exports of finished runs. None of them is an artifact."""

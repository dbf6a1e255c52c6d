"""Models and text: the one loader, the one formatter, sequence log-probabilities, sampling."""

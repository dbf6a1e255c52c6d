"""What a person reads at the end of a run: plots and the HTML report."""

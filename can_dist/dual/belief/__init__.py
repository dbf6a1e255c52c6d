"""Whether a solution can be believed: diagnosis, the choice of an estimator, tails and uncertainty."""

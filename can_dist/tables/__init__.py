"""Tables on disk and the readers of other people's data sets."""

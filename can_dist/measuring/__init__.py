"""The numbers of the report, the comparison and the model card; numbers in, numbers out."""

"""The abilities file, and the rows of the data sets that it names."""

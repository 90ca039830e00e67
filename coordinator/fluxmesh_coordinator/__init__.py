"""The coordinator: the command line, and what it does with the results. It never computes."""

"""What can go wrong, done on purpose and counted. `make test` runs a short form of each, with the same code."""

"""One file (or one small folder) for each store; none imports another."""

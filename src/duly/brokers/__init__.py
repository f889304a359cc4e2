"""One file (or one small folder) for each broker; none imports another."""

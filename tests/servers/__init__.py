"""Servers of the tests' own: from installed binaries, on loopback, in temporary folders."""

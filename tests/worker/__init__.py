"""The worker: rounds, lanes, threads."""

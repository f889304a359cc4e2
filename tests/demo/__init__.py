"""The demonstration: its verdict on planted violations, its pieces, and whole runs."""

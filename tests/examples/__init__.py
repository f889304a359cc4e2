"""Every example runs, and does what it says."""

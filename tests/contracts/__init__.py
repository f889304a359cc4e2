"""What is promised here, by what, and what is refused."""

"""What type checkers say about right and wrong uses of duly. Checked, never imported."""

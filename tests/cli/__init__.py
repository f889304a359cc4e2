"""The command line, URLs and logs."""

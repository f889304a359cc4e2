"""SQL brokers and stores: every statement in named blocks per dialect, and their logic once."""

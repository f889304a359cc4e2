"""Versions of duly's tables: migrations, and upgrades while messages are in flight."""

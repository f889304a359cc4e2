"""The SQLite broker and store, on real files."""

"""What every broker and every store keeps, whichever it is.

Each test runs on every backend of `backends.py`. What a backend does not provide it refuses, and
that is tested too; a capability adds tests.
"""

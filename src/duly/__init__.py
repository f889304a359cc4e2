"""Messaging in which delivery semantics are declared, checked, kept and proven."""

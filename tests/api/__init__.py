"""Declaring, publishing, dependencies, payloads."""

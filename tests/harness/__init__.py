"""Tests of the harness for applications: `duly.testing.running`, and its pytest plugin."""

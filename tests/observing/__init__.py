"""Metrics and traces: what watchers make of the events."""

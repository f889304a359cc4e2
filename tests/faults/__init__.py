"""Faults: real processes on real SQLite files, killed, stopped, starved and lied to.

The final state is always read from the database, never from what a process believes.
"""

"""The supervisor: real processes, real signals."""

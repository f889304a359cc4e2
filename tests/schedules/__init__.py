"""Schedules: their ticks, the machine under a clock of the tests, and real processes."""

"""Tests of the chaos run: a short one, and that it sees what is wrong."""

"""`duly.testing.conformance` applied to what is here, what the memory kinds have beyond it, and
what shows that the suite can fail.
"""

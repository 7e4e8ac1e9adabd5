"""Helpers shared by several test modules: tiny networks, reference formulas, and training runs in subprocesses."""

VALIDATION_STEPS = 4
"""Sampling steps of the pictures that trainings draw in tests, where only their mechanics count."""

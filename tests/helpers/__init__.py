"""Helpers shared by several test modules: tiny networks, reference formulas, and training runs in subprocesses."""

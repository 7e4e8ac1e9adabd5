"""Whole trainings, from raw material to a model that can be shipped, made of sdkit's public functions alone."""

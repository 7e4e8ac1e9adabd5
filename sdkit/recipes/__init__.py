"""Recipes: complete trainings, from raw material to a shipped model, built on the public training functions."""

"""Measures of images and codebooks."""

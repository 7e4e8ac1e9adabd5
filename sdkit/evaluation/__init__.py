"""Measures of the quality of images, and of the use of codebooks."""

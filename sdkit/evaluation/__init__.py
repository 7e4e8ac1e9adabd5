"""Metrics: similarity of images, and codebook usage."""

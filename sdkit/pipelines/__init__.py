"""Whole models at work, from a prompt to images."""

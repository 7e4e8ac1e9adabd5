"""Stages: the kinds of training that the loop can run."""

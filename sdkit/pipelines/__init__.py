"""Pipelines: whole models that draw images, and the steps that they share."""

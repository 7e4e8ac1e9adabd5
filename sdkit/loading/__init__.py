"""Model sources: found, checked, and read into networks."""

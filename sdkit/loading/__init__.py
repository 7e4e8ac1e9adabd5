"""Model loading: sources are located and checked, and their weights read into networks."""

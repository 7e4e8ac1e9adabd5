"""The networks, and where they come from."""

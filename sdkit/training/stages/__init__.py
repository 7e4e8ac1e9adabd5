"""The stages: what the loop can train."""

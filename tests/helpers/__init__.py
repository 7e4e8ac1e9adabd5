"""What several test modules share: tiny networks, references, and processes that train."""

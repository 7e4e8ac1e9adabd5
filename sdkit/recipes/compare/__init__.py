"""Train every generative system of the tutorials on the same small digits, and measure them side by side."""

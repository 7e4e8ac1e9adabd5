"""How a network is executed: device, dtype, attention, and torch.compile."""

"""Execution of networks: device, dtype, attention, offloading, and torch.compile."""

"""How a network is executed: device, dtype, attention."""

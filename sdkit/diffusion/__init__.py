"""The mathematics of diffusion, as pure functions of tensors."""

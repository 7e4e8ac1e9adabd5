"""Networks: wrappers of diffusers' and transformers' networks, LoRA, LPIPS, and the discriminator."""

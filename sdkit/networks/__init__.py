"""The networks: diffusers' and transformers' own, with the process around each."""

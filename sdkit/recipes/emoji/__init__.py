"""The embedded model: a small Stable Diffusion that draws emoji on plain backgrounds, trained from nothing on CPUs.

`python -m sdkit.recipes.emoji --help` says how. What the model is: sdkit/assets/emoji/README.md.
"""

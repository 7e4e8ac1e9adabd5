"""The embedded model: a small Stable Diffusion that draws emoji on plain backgrounds, trained from scratch on CPUs.

`python -m sdkit.recipes.emoji --help` explains the steps. sdkit/assets/emoji/README.md describes the model.
"""

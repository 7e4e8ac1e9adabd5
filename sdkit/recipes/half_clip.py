"""Write a trained CLIP in half of its size, for CLIPs that recipes ship."""

from __future__ import annotations

import shutil
from pathlib import Path

from sdkit.messages import no_warnings, quiet

REPLACED = ("config.json", "model.safetensors", "training.json")
"""Files of a trained CLIP that are written anew, or left out; the others are its tokenizer and preprocessing."""


def write_half(trained: Path, folder: Path) -> None:
    """Write a trained CLIP in float16, with its tokenizer and preprocessing.

    Args:
        trained: Result of `train_clip`.
        folder: Folder to write into.
    """
    from transformers import CLIPModel

    with quiet("transformers"), no_warnings():
        CLIPModel.from_pretrained(trained).half().save_pretrained(folder)
    for path in trained.iterdir():
        if path.name not in REPLACED:
            shutil.copy(path, folder)

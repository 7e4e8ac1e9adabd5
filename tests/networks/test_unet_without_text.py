"""U-Nets that take classes or nothing, against diffusers' own network, and the classes that prompts name."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import sdkit
from sdkit.errors import ArgumentError
from sdkit.guidance import Conditioning
from sdkit.networks.class_names import ClassNames
from tests.helpers import classes

ADM = {
    "block_out_channels": [8, 16, 16], "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"], "resnet_time_scale_shift": "scale_shift",
    "downsample_type": "resnet", "upsample_type": "resnet", "attention_head_dim": 8, "out_channels": 6,
}  # fmt: skip
"""The options of ADM: adaptive group norm, attention at two resolutions, resampling by residual blocks, a variance."""
LABELS = torch.tensor([2, 0, 3])


@pytest.mark.parametrize(
    ("changes", "labels"),
    [({}, None), ({"num_class_embeds": 4}, LABELS), ({"class_embed_type": "timestep"}, LABELS),
     (ADM, None), (ADM | {"num_class_embeds": 4}, LABELS)],
    ids=["unconditional", "classes", "classes as timesteps", "ADM", "ADM with classes"],
)  # fmt: skip
def test_the_output_is_diffusers_own(changes: dict[str, Any], labels: torch.Tensor | None) -> None:
    network = classes.network(**changes)
    unet = sdkit.UNet(network)
    x_t, t = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([3, 500, 999])
    with torch.no_grad():
        cond = Conditioning(label=labels)
        expected = network(x_t, t, labels).sample
        torch.testing.assert_close(unet(x_t, t, cond), expected, rtol=0, atol=1e-5)
        together = unet(x_t, 500, cond)
        for i in range(3):  # an image is the same alone and in a batch
            alone = unet(x_t[i : i + 1], 500, Conditioning(label=None if labels is None else labels[i : i + 1]))
            torch.testing.assert_close(alone, together[i : i + 1], rtol=0, atol=1e-5)
    assert (unet.width, unet.channels, unet.takes_labels) == (0, 3, labels is not None)


class TestClassNames:
    def test_prompts_are_names(self) -> None:
        names = ClassNames(["Red panda", "cat"])
        assert names.labels(["cat", "red  Panda", ""]).tolist() == [1, 0, 2]
        assert names.none == 2

    def test_of_a_network_that_names_none(self) -> None:
        names = ClassNames.of(sdkit.UNet(classes.network(num_class_embeds=3)))
        assert (names.names, names.none) == (("0", "1", "2"), None)
        assert ClassNames.of(sdkit.UNet(classes.network())).names == ()


BAD: list[tuple[str, dict[str, Any], Conditioning, str]] = [
    ("label too large", {"num_class_embeds": 3}, Conditioning(label=torch.tensor([3])),
     r"class labels of this U-Net are from 0 to 2, not \[3\]\.$"),
    ("negative label", {"num_class_embeds": 3}, Conditioning(label=torch.tensor([-1])), "from 0 to 2"),
    ("no label", {"num_class_embeds": 3}, Conditioning(), "takes class labels: give `label`"),
    ("label of no use", {}, Conditioning(label=torch.tensor([0])), "takes no class labels: leave out `label`"),
    ("text", {}, Conditioning(torch.zeros(1, 4, 8)), "takes no text; leave `text` out"),
    ("another batch", {"num_class_embeds": 3}, Conditioning(label=torch.tensor([0, 1])), "of 2 images does not fit"),
    ("concat", {}, Conditioning(concat=torch.zeros(1, 1, 8, 8)), "takes 0 channels beside x_t"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "cond", "message"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_conditions_that_do_not_fit(changes: dict[str, Any], cond: Conditioning, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        sdkit.UNet(classes.network(**changes))(torch.zeros(1, 3, 8, 8), 1, cond)


def test_what_needs_a_text() -> None:
    names = ClassNames(["cat"], has_none=False)
    unet = sdkit.UNet(classes.network())
    for call, message in (
        (lambda: names.labels("dog"), r"^'dog' is no class of this model; its classes: cat\.$"),
        (lambda: names.labels(""), "^this model was trained without label dropout"),
        (lambda: ClassNames().check(["cat"]), "draws without prompts and classes; give the empty prompt"),
        (lambda: names.encode("cat"), "has no text encoder"),
        (lambda: names.add_token("<zork>", torch.zeros(1, 8)), "this embedding belongs to a text encoder"),
        (lambda: unet.cross_attention(torch.zeros(1, 3, 8, 8), 1, Conditioning()), "takes no text, and attends"),
        (lambda: ClassNames.of(sdkit.UNet(classes.network(class_embed_type="identity"))), "takes vectors in place of"),
    ):
        with pytest.raises(ArgumentError, match=message):
            call()

"""Attention in training: the faster of two ways must give the same numbers."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor

from sdkit.engines.attention import PlainWhereSmall


@pytest.mark.parametrize("tokens", [16, 300])
@pytest.mark.parametrize("half", [True, False])
def test_it_gives_what_the_fused_one_gives(tokens: int, half: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Output and gradient must agree. Plain products are used only in bfloat16 and for few tokens."""
    torch.manual_seed(0)
    layer = Attention(query_dim=32, heads=4, dim_head=8)
    x = torch.randn(2, tokens, 32, requires_grad=True)

    def through(processor: AttnProcessor2_0 | PlainWhereSmall) -> tuple[Tensor, Tensor]:
        layer.set_processor(processor)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            y = layer(x).float()
        return y.detach(), torch.autograd.grad(y.square().sum(), x)[0]

    calls = []
    processor = PlainWhereSmall()
    plain = processor.plain
    monkeypatch.setattr(processor, "plain", lambda *a, **k: calls.append(a) or plain(*a, **k))
    for got, expected in zip(through(processor), through(AttnProcessor2_0()), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0.02 * float(expected.abs().max()) if half else 0.0)
    assert bool(calls) == (half and tokens == 16)

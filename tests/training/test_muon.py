"""Muon: orthogonal updates against an SVD, and against PyTorch's own Muon and AdamW."""

from __future__ import annotations

import pytest
import torch
from diffusers import PriorTransformer
from torch import nn
from transformers import CLIPConfig, CLIPModel

from sdkit.training.muon import Muon, orthogonalised, split


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 0.1), (torch.bfloat16, 0.15)], ids=str)
@pytest.mark.parametrize("shape", [(24, 24), (16, 60), (60, 16), (8, 90), (90, 8)])
def test_orthogonalised_is_near_the_nearest_orthogonal_matrix(
    shape: tuple[int, int], dtype: torch.dtype, tolerance: float
) -> None:
    """U V^T of the singular value decomposition is the nearest one; the iteration moves each singular value near 1."""
    torch.manual_seed(0)
    matrices = torch.randn(3, *shape)
    for matrix, orthogonal in zip(matrices, orthogonalised(matrices, dtype), strict=True):
        u, values, v = torch.linalg.svd(matrix, full_matrices=False)
        found = u.mT @ orthogonal @ v.mT  # in the bases of the matrix
        kept = torch.diagonal(found)[values > 0.05 * values.max()]
        assert kept.min() > 0.5
        assert kept.max() < 1.3
        assert (found - torch.diag(torch.diagonal(found))).abs().max() < tolerance


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this PyTorch has no Muon to compare with")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_matrices_are_updated_as_by_torch(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also more matrices of one shape than are orthogonalised at once, one of which has no gradient."""
    monkeypatch.setattr("sdkit.training.muon.AT_ONCE", 4 * 6 * 10)
    torch.manual_seed(0)
    first = [torch.randn(6, 10) / 6 for _ in range(6)]
    ours, theirs = ([nn.Parameter(value.clone()) for value in first] for _ in range(2))
    one = Muon([{"params": ours, "matrices": True}], lr=1e-2, weight_decay=0.1, dtype=dtype)
    other = torch.optim.Muon(theirs, lr=1e-2, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for _ in range(5):
        for p, q in zip(ours[1:], theirs[1:], strict=True):
            p.grad = torch.randn(6, 10)
            q.grad = p.grad.clone()
        one.step()
        other.step()
    assert torch.equal(ours[0], first[0])
    for p, q, value in zip(ours[1:], theirs[1:], first[1:], strict=True):
        assert (p - q).abs().max() < 2e-3  # PyTorch iterates in bfloat16
        assert (p - value).abs().max() > 0.01


def test_all_others_are_updated_as_by_adamw() -> None:
    torch.manual_seed(0)
    ours, theirs = (nn.Parameter(torch.linspace(-1, 1, 12)) for _ in range(2))
    one = Muon([ours], lr=1e-2, betas=(0.8, 0.95), weight_decay=0.1)
    other = torch.optim.AdamW([theirs], lr=1e-2, betas=(0.8, 0.95), weight_decay=0.1)
    for _ in range(5):
        ours.grad = torch.randn(12)
        theirs.grad = ours.grad.clone()
        one.step()
        other.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_hidden_matrices_are_split_from_all_others() -> None:
    """Convolutions count; embeddings, biases, gains, and the first and last convolutions do not. Options stay."""
    network = nn.ModuleDict({
        "conv_in": nn.Conv2d(3, 4, 3), "words": nn.Embedding(5, 4), "hidden": nn.Conv2d(4, 6, 3),
        "norm": nn.GroupNorm(2, 6), "linear": nn.Linear(6, 6), "conv_out": nn.Conv2d(6, 3, 3),
    })  # fmt: skip
    names = {p: name for name, p in network.named_parameters()}
    groups = split([{"params": list(network.parameters()), "weight_decay": 0.3}], network)
    found = {group["matrices"]: {names[p] for p in group["params"]} for group in groups}
    assert found[True] == {"hidden.weight", "linear.weight"}
    assert found[False] == set(names.values()) - found[True]
    assert all(group["weight_decay"] == 0.3 for group in groups)


def test_embeddings_that_are_no_module_are_left_to_adamw() -> None:
    """Muon would take diffusers' (1, N, D) for one row, and scale the whole as a vector."""
    network = PriorTransformer(
        num_attention_heads=2, attention_head_dim=4, num_layers=1, embedding_dim=8, num_embeddings=3
    )
    names = {p: name for name, p in network.named_parameters()}
    groups = {g["matrices"]: [names[p] for p in g["params"]] for g in split([{"params": [*names]}], network)}
    assert {"positional_embedding", "prd_embedding"} <= {*groups[False]}
    assert "transformer_blocks.0.attn1.to_q.weight" in groups[True]
    assert sorted(groups[True] + groups[False]) == sorted(names.values())


def test_patches_of_a_clip_are_left_to_adamw() -> None:
    """They are its first layer, as the embedding of tokens is; its projections are matrices."""
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1}
    config = CLIPConfig(text_config=sizes | {"vocab_size": 5}, vision_config=sizes | {"image_size": 8, "patch_size": 4})
    network = CLIPModel(config)
    names = {p: name for name, p in network.named_parameters()}
    groups = {g["matrices"]: {names[p] for p in g["params"]} for g in split([{"params": [*names]}], network)}
    assert {name for name in groups[False] if name.endswith("weight") and "norm" not in name} == {
        "text_model.embeddings.token_embedding.weight", "text_model.embeddings.position_embedding.weight",
        "vision_model.embeddings.patch_embedding.weight", "vision_model.embeddings.position_embedding.weight",
    }  # fmt: skip
    assert {"visual_projection.weight", "vision_model.encoder.layers.0.mlp.fc1.weight"} <= groups[True]

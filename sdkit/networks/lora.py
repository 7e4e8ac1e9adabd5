"""LoRA (Hu et al. 2021, https://arxiv.org/abs/2106.09685) of the U-Net and the text encoder: W + alpha / r * B A.

Training uses peft. For inference, a LoRA is merged into the weights, which needs no peft, and makes sampling as fast as
without a LoRA. `sdkit.loading.lora_file` reads and writes the files.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from sdkit.errors import ArgumentError, SourceError
from sdkit.loading.lora_file import Factors, LoRA, plain_name
from sdkit.loading.tensors import loading
from sdkit.messages import clean

TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj")
"""The projections of every attention layer, as the U-Net and CLIP name them."""


def add_lora(network: nn.Module, rank: int) -> None:
    """Freeze `network` and add trainable LoRA layers to its attention. Needs peft.

    The layers are float32, whatever the network's dtype; alpha is the rank. A is drawn from torch's global generator,
    and B is 0, so that the output does not change at first.

    Args:
        network: A `UNet2DConditionModel` or a `CLIPTextModel`.
        rank: The rank of the update.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ArgumentError("LoRA training needs peft; install 'sdkit[train]'.") from error
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(TARGETS), init_lora_weights="gaussian")
    with loading:  # while any thread loads a network, torch allocates no memory for new layers
        inject_adapter_in_model(config, network)  # also freezes all other weights
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def lora_tensors(unet: nn.Module, text: nn.Module | None = None) -> dict[str, Tensor]:
    """Return the trained tensors of networks that went through `add_lora`, named as diffusers saves them; float32, on
    the CPU."""
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import get_peft_model_state_dict

    tensors = {}
    # transformers 5.6 dropped text_model from its parameter names; LoRA files keep it.
    for prefix, network in (("unet.", unet), ("text_encoder.text_model.", text)):
        if network is not None:
            trained = get_peft_model_state_dict(network, save_embedding_layers=False)  # the default would query the Hub
            for key, tensor in convert_state_dict_to_diffusers(trained).items():
                tensors[prefix + key.removeprefix("text_model.")] = tensor.float().cpu().contiguous()
    return tensors


def merge_lora(lora: LoRA, unet: nn.Module, text: nn.Module, scale: float) -> None:
    """Add `scale` times a LoRA to the weights of both networks in place, computed in float32.

    Args:
        lora: The LoRA.
        unet: The U-Net's network.
        text: The text encoder's network.
        scale: Factor of the update; 1 is the LoRA as it was trained.

    Raises:
        SourceError: The LoRA was made for other networks, or a weight would overflow. No weight is changed then.
    """
    layers = [*_layers(lora.unet, unet, lora.label), *_layers(lora.text_encoder, text, lora.label)]
    with torch.no_grad():
        for name, weight, factors in layers:
            if factors.overflows(weight, scale):
                raise SourceError(
                    f"{lora.label} at scale {scale:g} would make {clean(name)} infinite; give a smaller scale, or "
                    "another file if this one is damaged."
                )
        for _, weight, factors in layers:
            weight.copy_(factors.merged(weight, scale))


def _layers(named: dict[str, Factors], network: nn.Module, label: str) -> Iterator[tuple[str, Tensor, Factors]]:
    """Yield each layer's name, its weight in `network`, and the factors of its update."""
    layers = {plain_name(name): x for name, x in network.named_modules() if isinstance(x, (nn.Linear, nn.Conv2d))}
    for name, factors in named.items():
        if name not in layers:
            raise SourceError(
                f"{label} was made for another model: this one has no {clean(name)}; give one of its own."
            )
        weight = layers[name].weight
        shape = len(factors.up), factors.down[0].numel()
        if shape != (len(weight), weight[0].numel()):
            found, wanted = (" x ".join(map(str, size)) for size in (shape, (len(weight), weight[0].numel())))
            raise SourceError(
                f"{label} was made for another model: its {clean(name)} is {found}, where this one's is {wanted}; "
                "give one of its own."
            )
        yield name, weight, factors

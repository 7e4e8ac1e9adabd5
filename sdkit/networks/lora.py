"""LoRA (Hu et al. 2021, https://arxiv.org/abs/2106.09685) of the U-Net and the text encoder: W + alpha / r * B A.

Training uses peft. For inference, LoRAs are merged into the weights, which needs no peft, and makes sampling as fast as
without a LoRA. `sdkit.loading.lora_file` reads and writes the files.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, NamedTuple
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from sdkit.errors import ArgumentError, SourceError
from sdkit.loading.lora_file import LoRA, plain_name
from sdkit.loading.lora_update import Update
from sdkit.loading.tensors import is_finite, loading
from sdkit.messages import clean

TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj")
"""The projections of every attention layer, as the U-Net and CLIP name them."""
POOLING = "add_embedding."
"""Beginning of the names of a U-Net's layers that pool the text. diffusers reads no LoRA of them."""
FEED_FORWARD = ("ff.net.0.proj", "ff.net.2", "fc1", "fc2")
"""The layers of the MLP that follows the attention."""
GROUPS = {"attention": TARGETS, "feed_forward": FEED_FORWARD}
"""Names of groups of layers -> the ends of the names of their layers. "convolutions" are all of `nn.Conv2d`."""
CONVOLUTIONS = "convolutions"


def lora_layers(network: nn.Module, targets: Iterable[str] = ("attention",)) -> dict[str, nn.Linear | nn.Conv2d]:
    """Return the layers of a network that a choice of targets names.

    Args:
        network: A `UNet2DConditionModel` or a `CLIPTextModel`.
        targets: Each "attention", "feed_forward", "convolutions", or the name of a layer or its end after a dot, such
            as "attn2.to_k" or "conv_in".

    Returns:
        The layers by name, in the order of the network.
    """
    ends = tuple(end for target in targets for end in GROUPS.get(target, (target,)))
    found: dict[str, nn.Linear | nn.Conv2d] = {}
    for name, layer in network.named_modules():
        if not isinstance(layer, (nn.Linear, nn.Conv2d)) or name.startswith(POOLING):
            continue
        convolution = CONVOLUTIONS in ends and isinstance(layer, nn.Conv2d)
        if convolution or any(name == end or name.endswith(f".{end}") for end in ends):
            found[name] = layer
    return found


def add_lora(
    network: nn.Module,
    rank: int,
    *,
    alpha: float | None = None,
    dropout: float = 0.0,
    rslora: bool = False,
    targets: Iterable[str] = ("attention",),
) -> None:
    """Freeze `network` and add trainable LoRA layers to it. Needs peft.

    The layers are float32, whatever the network's dtype. A is drawn from torch's global generator, and B is 0, so that
    the output does not change at first.

    Args:
        network: A `UNet2DConditionModel` or a `CLIPTextModel`.
        rank: The rank r of the update.
        alpha: The numerator of the factor alpha / r by which B A is multiplied; None is the rank.
        dropout: Share of the inputs of A that are set to 0 in training.
        rslora: Divide alpha by the square root of r, not by r (rank-stabilised LoRA, Kalajdzievski 2023,
            https://arxiv.org/abs/2312.03732).
        targets: The layers; see `lora_layers`. At least one must be in the network.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ArgumentError("LoRA training needs peft; install 'sdkit[train]'.") from error
    numerator: Any = rank if alpha is None else alpha  # peft declares an integer, and takes any number
    config = LoraConfig(
        r=rank, lora_alpha=numerator, lora_dropout=dropout, use_rslora=rslora,
        target_modules=[*lora_layers(network, targets)], init_lora_weights="gaussian",
    )  # fmt: skip
    with loading:  # while any thread loads a network, torch allocates no memory for new layers
        inject_adapter_in_model(config, network)  # also freezes all other weights
    network.train(network.training)  # new layers are in training mode, whatever the network's is
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
            named = convert_state_dict_to_diffusers(trained)  # renames the attention's alone
            if any(".lora_A." in key for key in named):  # diffusers would skip those: it reads one naming, not both
                named = trained
            for key, tensor in named.items():
                tensors[prefix + key.removeprefix("text_model.")] = tensor.float().cpu().contiguous()
    return tensors


class Active(NamedTuple):
    """A LoRA that is merged into the weights, and the factor of its update."""

    lora: LoRA
    scale: float


class MergedLoRAs:
    """The LoRAs that are merged into a U-Net and a text encoder, and the weights without them.

    The layers that they change have W + sum of scale_i * dW_i, computed in float32 from the original weights W at each
    change, and rounded once. The originals are kept in the CPU's memory while a LoRA changes the layer.

    Attributes:
        active: Name -> the LoRA and its scale, in the order in which they were added.
    """

    _owners: ClassVar[WeakKeyDictionary[nn.Module, ReferenceType[MergedLoRAs]]] = WeakKeyDictionary()
    """Network -> the LoRAs that were merged into it last."""

    def __init__(self) -> None:
        self.active: dict[str, Active] = {}
        self._originals: dict[tuple[str, str], Tensor] = {}

    def set(self, active: Mapping[str, Active], unet: nn.Module, text: nn.Module) -> None:
        """Replace the LoRAs and their scales by others.

        Args:
            active: Name -> the LoRA and its scale.
            unet: The U-Net's network.
            text: The text encoder's network.

        Raises:
            SourceError: A LoRA was made for other networks, or a weight would overflow.
            ArgumentError: LoRAs of another pipeline are in these networks.

        Whatever is raised, Ctrl-C included, nothing has changed then.
        """
        networks = {"unet": unet, "text_encoder": text}
        self._check_alone(networks.values())
        changes = _changes(active.values(), networks)
        try:
            self._apply(changes, networks)
        except BaseException:  # also Ctrl-C and a lack of memory
            self._apply(_changes(self.active.values(), networks), networks)
            raise
        self.active = dict(active)
        self._owners.update(dict.fromkeys(networks.values(), ref(self)))

    def _check_alone(self, networks: Iterable[nn.Module]) -> None:
        """Raise ArgumentError if LoRAs of another pipeline are in one of these networks: they would become part of the
        original weights."""
        for network in networks:
            other = self._owners[network]() if network in self._owners else None
            if other is not None and other is not self and other.active:
                raise ArgumentError(
                    "another pipeline with the same network has loaded LoRAs into it: unload them there, or load the "
                    "model a second time."
                )

    @torch.no_grad()
    def _apply(self, changes: Mapping[tuple[str, str], list[_Change]], networks: Mapping[str, nn.Module]) -> None:
        """Write the weights of all layers that are or were changed, and restore those that no longer are."""
        layers = {(part, name): layer for part, x in networks.items() for name, layer in _named_layers(x).items()}
        for key in [key for key in self._originals if key not in changes]:
            layers[key].weight.copy_(self._originals[key])
            del self._originals[key]  # only now: the copy may be interrupted
        for key, own in changes.items():
            weight = layers[key].weight
            if key not in self._originals:
                self._originals[key] = weight.detach().to("cpu", copy=True)
            weight.copy_(_merged(self._originals[key].to(weight.device), own, key[1]))


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
    MergedLoRAs().set({lora.name: Active(lora, scale)}, unet, text)


class _Change(NamedTuple):
    """Change that one LoRA makes to one layer."""

    label: str
    scale: float
    update: Update


def _merged(weight: Tensor, changes: Iterable[_Change], name: str) -> Tensor:
    """Return a weight plus its updates, computed in float32, in the weight's dtype. Raise SourceError if it is not
    finite."""
    merged = weight.float()
    for label, scale, update in changes:
        merged = merged + scale * update.delta(weight)
        if not is_finite(merged.to(weight.dtype)):
            raise SourceError(
                f"{label} at scale {scale:g} would make {clean(name)} infinite; give a smaller scale, or another file "
                "if this one is damaged."
            )
    return merged.to(weight.dtype)


def _named_layers(network: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """Return the layers that a LoRA can change, by the names that LoRA files give them."""
    layers = network.named_modules()
    return {plain_name(name): layer for name, layer in layers if isinstance(layer, (nn.Linear, nn.Conv2d))}


def _changes(active: Iterable[Active], networks: Mapping[str, nn.Module]) -> dict[tuple[str, str], list[_Change]]:
    """Return what LoRAs do to each layer, by (part, name). Raise SourceError if one does not fit the networks."""
    changes: dict[tuple[str, str], list[_Change]] = {}
    for part, network in networks.items():
        layers = _named_layers(network)
        for lora, scale in active:
            for name, update in getattr(lora, part).items():
                if name not in layers:
                    raise _misfit(lora.label, f"this one has no {clean(name)}")
                _check_shape(update, layers[name].weight, name, lora.label)
                changes.setdefault((part, name), []).append(_Change(lora.label, scale, update))
    return changes


def _check_shape(update: Update, weight: Tensor, name: str, label: str) -> None:
    """Raise SourceError unless an update has the shape of a weight."""
    found, wanted = [*update.factors.shape], [len(weight), weight[0].numel()]
    axis, magnitudes = update.magnitudes()
    if found == wanted:
        found, wanted = [magnitudes], [weight.shape[axis]]
    if found != wanted:
        its, own = (" x ".join(map(str, size)) for size in (found, wanted))
        raise _misfit(label, f"its {clean(name)} is {its}, where this one's is {own}")


def _misfit(label: str, problem: str) -> SourceError:
    return SourceError(f"{label} was made for another model: {problem}; give one of its own.")

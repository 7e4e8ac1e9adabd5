"""The parts of a model, in one table: where each is found, how its config is checked, and which class loads it.

A new part is an entry in `PARTS` and a method of `Source` that loads it.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sdkit.diffusion.schedule import LONGEST_CHAIN
from sdkit.loading import original_names, pixels
from sdkit.loading.configs import (
    BLOCKS,
    CLASSES,
    CONDITION,
    CONDITIONS,
    COUNT,
    COUNT_OR_LIST,
    COUNTS,
    LOW_RES,
    MOST_CLASSES,
    NESTED_COUNTS,
    NUMBER,
    POSITIVE,
    SIZE,
    UPSCALE,
    WHOLE,
    WHOLE_OR_LIST,
    WHOLES,
    WORD,
    WORDS,
    Check,
    or_null,
    within,
)
from sdkit.loading.original_names import Tensors


def _names(value: Any) -> bool:
    """Return whether a value is a list of at least one name."""
    named = isinstance(value, list) and all(isinstance(name, str) and name.strip() for name in value)
    return named and 0 < len(value) <= MOST_CLASSES


@dataclass(frozen=True, kw_only=True)
class Part:
    """One part of a model.

    Attributes:
        name: "vae", "unet", "controlnet", "classifier", "text", or "scheduler".
        noun: What messages call it.
        folder: Its subfolder in a pipeline's folder.
        config: The file name of its config.
        weights: File names of its weights, the preferred one first. Empty for the schedule, which has none.
        classes: The class that its config names -> the class that loads it, as "module:class". None for the pixel
            identity, which has no weights. Empty for the schedule, which is read as data.
        trainable: The classes that can be trained from scratch.
        telling: A key of the config -> the class that it implies if the config names none. The first match counts.
        checks: Keys of the config -> their checks. The keys are those that set the size of a network and those that
            sdkit itself computes with; the libraries check the others.
        shown: Keys of the config that a `Description` shows -> their defaults in diffusers.
        prefixes: Possible prefixes of the names of its tensors in the original layout. The first that occurs counts.
        modules: What those names begin with after the prefix.
        rename: Function that takes tensors of the original layout and the network, and returns the tensors under the
            network's own names. Unknown tensors keep their names.
    """

    name: str
    noun: str
    folder: str
    config: str = "config.json"
    weights: tuple[str, ...] = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
    classes: Mapping[str, str | None] = field(default_factory=dict)
    trainable: tuple[str, ...] = ()
    telling: Mapping[str, str] = field(default_factory=dict)
    checks: Mapping[str, Check] = field(default_factory=dict)
    shown: Mapping[str, Any] = field(default_factory=dict)
    prefixes: tuple[str, ...] = ()
    modules: tuple[str, ...] = ("",)
    rename: Callable[[Tensors, Any], Tensors] = lambda tensors, _network: tensors

    @property
    def config_path(self) -> str:
        """Path of its config in a pipeline's folder."""
        return f"{self.folder}/{self.config}"

    def accepts(self, name: str) -> bool:
        """Return whether a config that names the class `name` can be one of this part."""
        return name in self.classes or not self.classes

    def load_class(self, name: str) -> Any:
        """Import the class that loads a network whose config names `name`; for any other name, the first class."""
        return pkgutil.resolve_name(self.classes.get(name) or next(filter(None, self.classes.values())))


VAE = Part(
    name="vae",
    noun="a VAE",
    folder="vae",
    classes={
        "AutoencoderKL": "diffusers:AutoencoderKL",
        "AutoencoderTiny": "diffusers:AutoencoderTiny",
        "VQModel": "diffusers:VQModel",
        pixels.CLASS: None,
    },
    trainable=("AutoencoderKL", "VQModel"),
    telling={
        "encoder_block_out_channels": "AutoencoderTiny",
        "num_vq_embeddings": "VQModel",
        "latent_channels": "AutoencoderKL",
    },
    checks={
        "scaling_factor": POSITIVE,
        "shift_factor": or_null(NUMBER),
        **dict.fromkeys(("block_out_channels", "encoder_block_out_channels"), or_null(WHOLES)),
        "decoder_block_out_channels": WHOLES,
        **dict.fromkeys(("vq_embed_dim", "norm_num_groups"), or_null(WHOLE)),
        **dict.fromkeys(("in_channels", "out_channels", "latent_channels", "num_vq_embeddings"), WHOLE),
        **dict.fromkeys(("down_block_types", "up_block_types"), BLOCKS),
        "layers_per_block": COUNT,
        **dict.fromkeys(("num_encoder_blocks", "num_decoder_blocks"), COUNTS),
        "upsampling_scaling_factor": WHOLE,
    },
    shown={"latent_channels": 4, "scaling_factor": 0.18215},
    prefixes=("first_stage_model.", "vae.", ""),  # no prefix in the file of a VAE alone
    modules=("encoder.", "decoder.", "quant_conv.", "post_quant_conv."),
    rename=original_names.vae,
)
UNET = Part(
    name="unet",
    noun="a U-Net",
    folder="unet",
    classes={
        "UNet2DConditionModel": "diffusers:UNet2DConditionModel",
        "UNet2DModel": "diffusers:UNet2DModel",  # of no text: unconditional, or of classes
    },
    trainable=("UNet2DConditionModel", "UNet2DModel"),
    telling={"cross_attention_dim": "UNet2DConditionModel", "attn_norm_num_groups": "UNet2DModel"},
    checks={
        "sample_size": or_null(SIZE),
        "cross_attention_dim": WHOLE_OR_LIST,
        "block_out_channels": WHOLES,
        **dict.fromkeys(("in_channels", "out_channels", "conv_in_kernel", "conv_out_kernel"), WHOLE),
        **dict.fromkeys(("down_block_types", "up_block_types"), BLOCKS),
        "layers_per_block": COUNT_OR_LIST,
        **dict.fromkeys(
            ("transformer_layers_per_block", "reverse_transformer_layers_per_block"), or_null(NESTED_COUNTS)
        ),
        **dict.fromkeys(("attention_head_dim", "num_attention_heads"), or_null(WHOLE_OR_LIST)),
        **dict.fromkeys(
            (
                "norm_num_groups",
                "time_cond_proj_dim",
                "time_embedding_dim",
                "encoder_hid_dim",
                "num_class_embeds",
                "addition_time_embed_dim",
                "projection_class_embeddings_input_dim",
            ),
            or_null(WHOLE),
        ),
        "addition_embed_type": or_null(WORD),
        "addition_embed_type_num_heads": WHOLE,
        CONDITION: or_null((" or ".join((*CONDITIONS, LOW_RES)), lambda x: x in (*CONDITIONS, LOW_RES))),
        UPSCALE: or_null(WHOLE),
        CLASSES: or_null(("a list of names", _names)),
    },
    shown={"in_channels": 4, "cross_attention_dim": 1280, "sample_size": None},
    prefixes=("model.diffusion_model.",),
    rename=original_names.unet,
)
CONTROLNET = Part(
    name="controlnet",
    noun="a ControlNet",
    folder="controlnet",
    classes={"ControlNetModel": "diffusers:ControlNetModel"},
    telling=dict.fromkeys(("conditioning_channels", "conditioning_embedding_out_channels"), "ControlNetModel"),
    checks={
        "cross_attention_dim": WHOLE_OR_LIST,
        **dict.fromkeys(("block_out_channels", "conditioning_embedding_out_channels"), WHOLES),
        **dict.fromkeys(("in_channels", "conditioning_channels"), WHOLE),
        "down_block_types": BLOCKS,
        "layers_per_block": COUNT,
        "transformer_layers_per_block": or_null(NESTED_COUNTS),
        **dict.fromkeys(("attention_head_dim", "num_attention_heads"), or_null(WHOLE_OR_LIST)),
        **dict.fromkeys(
            (
                "norm_num_groups",
                "encoder_hid_dim",
                "num_class_embeds",
                "addition_time_embed_dim",
                "projection_class_embeddings_input_dim",
            ),
            or_null(WHOLE),
        ),
        "addition_embed_type": or_null(WORD),
        "addition_embed_type_num_heads": WHOLE,
    },
    shown={"in_channels": 4, "cross_attention_dim": 1280},
    prefixes=("control_model.",),
    rename=original_names.controlnet,
)
CLASSIFIER = Part(
    name="classifier",
    noun="a classifier",
    folder="classifier",
    classes={"EncoderUNet": "sdkit.loading.encoder_unet:EncoderUNet"},
    trainable=("EncoderUNet",),
    checks={
        "sample_size": or_null(SIZE),
        "block_out_channels": WHOLES,
        **dict.fromkeys(("in_channels", "num_classes", "norm_num_groups", "attention_head_dim"), WHOLE),
        "down_block_types": BLOCKS,
        "layers_per_block": COUNT,
        "class_names": or_null(WORDS),
        "latents": or_null(WORD),
    },
    shown={"in_channels": 3, "num_classes": 1000},
)
TEXT = Part(
    name="text",
    noun="a CLIP text encoder",
    folder="text_encoder",
    weights=("model.safetensors", "pytorch_model.bin"),
    classes=dict.fromkeys(("CLIPTextModel", "CLIPModel"), "transformers:CLIPTextModel"),
    telling={"text_config": "CLIPModel", "max_position_embeddings": "CLIPTextModel"},
    checks={
        **dict.fromkeys(
            ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "max_position_embeddings"), WHOLE
        ),
        "num_hidden_layers": COUNT,
        "hidden_act": WORD,
    },
    shown={"hidden_size": 512, "num_hidden_layers": 12, "max_position_embeddings": 77},
    prefixes=("cond_stage_model.",),
    rename=original_names.text,
)
SCHEDULER = Part(
    name="scheduler",
    noun="a noise schedule",
    folder="scheduler",
    config="scheduler_config.json",
    weights=(),
    checks={
        "_class_name": WORD,
        "num_train_timesteps": ("a whole number from 1", lambda x: type(x) is int and 1 <= x <= LONGEST_CHAIN),
        "beta_start": ("a number from 0 to 1", within("beta_start")),
        "beta_end": ("a number from 0 to 1", within("beta_end")),
        "trained_betas": (
            "a list of numbers from 0 to 1 or null",
            lambda x: x is None or (isinstance(x, list) and x != [] and all(map(within("trained_betas"), x))),
        ),
        "clip_sample_range": ("a number above 0", within("clip_sample_range")),
    },
    shown={"prediction_type": "epsilon", "timestep_spacing": "leading", "rescale_betas_zero_snr": False},
)
LOW_RES_SCHEDULER = Part(
    name="low_res_scheduler",
    noun="a noise schedule of the low-resolution image",
    folder="low_res_scheduler",
    config=SCHEDULER.config,
    weights=(),
    checks=SCHEDULER.checks,
)
"""The schedule by which an upsampler's low-resolution image is noised. A `Description` does not list it."""
PARTS = {part.name: part for part in (VAE, UNET, CONTROLNET, CLASSIFIER, TEXT, SCHEDULER)}
"""Name -> part, in the order in which a `Description` lists them."""

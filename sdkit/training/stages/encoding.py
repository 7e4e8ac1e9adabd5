"""The frozen networks of a stage that denoises: they turn batches into latents and embeddings of captions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sdkit.diffusion.conditioning import Conditioning
from sdkit.networks.autoencoder import VAE, latents_of
from sdkit.networks.text_encoder import TextEncoder
from sdkit.training.stages.denoising import DenoisingObjective

MOST_EMBEDDINGS = 4096  # captions with embeddings in memory, 0.24 MB each for SD 1.x; a latent cache can store all


class BatchEncoder:
    """Encoder of batches of examples (see `collated`): their latents, and their captions as conditioning.

    Args:
        vae: The VAE, which is frozen.
        text: The text encoder, or `ClassNames`.
        scale: Scale of the latents.
        shift: Shift of the latents.
        trains_text: Whether the text encoder is in training. Captions then stay token ids, and the network in
            training encodes them.
        half: Whether images are encoded in bfloat16.
        label: Makes the labels (B, D) of a batch, for a U-Net that reads embeddings of its images; None passes on the
            batch's own `label`, if it has one.

    Attributes:
        embeddings: Cache of captions' embeddings, on the CPU, by the bytes of their token ids.
    """

    def __init__(
        self, vae: VAE, text: TextEncoder, *, scale: float, shift: float, trains_text: bool = False, half: bool = False,
        label: Callable[[Mapping[str, Any]], Tensor] | None = None,
    ) -> None:  # fmt: skip
        self.vae, self.text, self.label = vae, text, label
        self.scale, self.shift, self.trains_text, self.half = scale, shift, trains_text, half
        self.embeddings: dict[bytes, Tensor] = {}

    def latents(self, batch: Mapping[str, Any]) -> Tensor:
        """Return scaled latents (B, 4, h, w), sampled from the posteriors with the batch's own noise."""
        mean, logvar = self._posterior(batch["pixels"]) if "pixels" in batch else (batch["mean"], batch["logvar"])
        return latents_of(mean, logvar, batch["posterior_eps"], self.scale, self.shift)

    def original(self, row: Mapping[str, Any], device: torch.device) -> Tensor:
        """Return the image of an example as pixels (3, H, W) in [-1, 1]. A cached one is decoded on a device."""
        if "pixels" in row:
            pixels: Tensor = row["pixels"]
            return pixels
        mean, logvar = (row[name][None].to(device) for name in ("mean", "logvar"))
        z = latents_of(mean, logvar, torch.zeros_like(mean), self.scale, self.shift)
        return self.vae.to(device).decode(z, output_type="pt")[0].cpu()

    def denoised(
        self, objective: DenoisingObjective, network: nn.Module, batch: Mapping[str, Any], *inputs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return a network's output for the noised latents of a batch, and its target, both (B, 4, h, w).

        Args:
            objective: The objective, which noises the latents and knows the target.
            network: Called with x_t, t (B,), the conditioning, and `inputs`.
            batch: A batch of `collated`.
            *inputs: Further inputs of the network.
        """
        t, eps = torch.tensor(batch["t"]), batch["eps"]
        x_t, target = objective.noised(self.latents(batch), eps, t)
        return self.output(network, x_t, t, batch, *inputs), target

    def output(self, network: nn.Module, x_t: Tensor, t: Tensor, batch: Mapping[str, Any], *inputs: Tensor) -> Tensor:
        """Return a network's output for noised latents (B, 4, h, w) at timesteps (B,). For the rest see `denoised`."""
        output: Tensor = network(x_t, t.to(x_t.device), self.conditioning(batch), *inputs)
        return output

    def _posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad(), torch.autocast(pixels.device.type, torch.bfloat16, enabled=self.half):
            return self.vae.to(pixels.device).posterior(pixels)

    def conditioning(self, batch: Mapping[str, Any]) -> Conditioning:
        """Return the denoiser's conditioning: the captions and their mask, or the labels; and the channels beside x_t,
        if there are any.

        A batch has these as `concat` (B, C', h, w), or `concat_pixels` (B, 3, H, W) to encode; and `told` (B,), which
        is 0 for samples that get zeros in their place.
        """
        concat = self._posterior(batch["concat_pixels"])[0] if "concat_pixels" in batch else batch.get("concat")
        if concat is not None and "told" in batch:
            concat = concat * batch["told"][:, None, None, None]
        label = batch.get("label") if self.label is None else self.label(batch)
        if not self.text.width:  # classes, or nothing
            return Conditioning(label=label, concat=concat)
        return Conditioning(self.captions(batch), batch["mask"], concat, label=label)

    def captions(self, batch: Mapping[str, Any]) -> Tensor:
        """Return embeddings (B, 77k, D), or token ids (B, k, 77) if the text encoder is in training."""
        if self.trains_text:
            ids: Tensor = batch["ids"]
            return ids
        if "embeddings" in batch:
            embeddings: Tensor = batch["embeddings"]
            return embeddings
        return torch.stack([self._embedding(ids, key) for ids, key in zip(batch["ids"], batch["keys"], strict=True)])

    @torch.no_grad()
    def _embedding(self, ids: Tensor, key: bytes) -> Tensor:
        """Return the embeddings (77k, D) of one caption, given its token ids (k, 77) as a tensor and as bytes.

        Captions are encoded one at a time: a resumed run starts with an empty cache and must get bit-identical
        embeddings.
        """
        if key in self.embeddings:
            return self.embeddings[key].to(ids.device)
        embedding: Tensor = self.text.to(ids.device)(ids).flatten(0, 1)
        if len(self.embeddings) < MOST_EMBEDDINGS:
            self.embeddings[key] = embedding.cpu()
        return embedding

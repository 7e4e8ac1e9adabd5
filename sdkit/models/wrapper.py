"""What the wrappers of pretrained networks share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Wrapper(nn.Module):
    """Holds one pretrained network, as `network`, all of whose weights are on one device and in one dtype."""

    network: Any

    @property
    def dtype(self) -> torch.dtype:
        """What the network computes in."""
        return self._weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the network computes."""
        return self._weight.device

    @property
    def _weight(self) -> Tensor:
        return next(self.parameters())

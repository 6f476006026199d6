"""Constant tables of formats, on whatever device the tensors at hand live."""

from __future__ import annotations

import torch
from torch import Tensor


class Table:
    """A constant tensor and its copies: one for every device that asked, made once. values: on the CPU."""

    def __init__(self, values: Tensor):
        self.values = values
        self._copies = {values.device: values}

    def on(self, device: torch.device) -> Tensor:
        """The values on a device; made outside inference mode, because they may later meet autograd."""
        if device not in self._copies:
            with torch.inference_mode(False):
                self._copies[device] = self.values.to(device)
        return self._copies[device]

"""Linear layers whose weights lie in oneDNN's blocked order, for a model on the CPU.

Decoding a batch streams every weight once a step. From the blocked order that is 1.2 to 2.4 times as fast as from rows
(measured at 1 to 64 rows, float32 and bfloat16); logits differ from the plain ones by rounding, as between batch sizes.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

LEAST_WEIGHTS = 1 << 14  # of a layer: below, the call costs more than the product


class PackedLinear(nn.Module):
    """A linear layer beside a packed copy of its weight. A single row in float32 goes through the plain one."""

    def __init__(self, plain: nn.Linear, rows: int) -> None:
        super().__init__()
        self.plain = plain
        self.packed = pack(plain.weight, rows)

    @property
    def weight(self) -> torch.Tensor:
        return self.plain.weight

    @property
    def bias(self) -> torch.Tensor | None:
        return self.plain.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype == torch.float32 and x.numel() == x.shape[-1]:  # streaming a plain matrix once is as fast
            return F.linear(x, self.plain.weight, self.plain.bias)
        linear: Any = torch.ops.mkldnn._linear_pointwise
        out = linear(x, self.packed, self.plain.bias, "none", [], "")
        assert isinstance(out, torch.Tensor)
        return out


def pack(weight: torch.Tensor, rows: int = 16) -> Any:
    """A copy of a linear weight in oneDNN's order for about `rows` rows; the order serves other numbers of rows too."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), rows)


def can_pack(weight: torch.Tensor) -> bool:
    """Is oneDNN there, and would it pack weights of this type where this one is?"""
    return torch._C._has_mkldnn and weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.bfloat16)


def pack_linears(model: nn.Module, rows: int = 16, least_weights: int = LEAST_WEIGHTS) -> int:
    """Packs the linear layers of a model in place, for batches of about `rows` rows; how many it packed.

    Smaller ones than `least_weights` stay plain. None is packed that `can_pack` says no to.
    """
    found = [
        (parent, name, child)
        for parent in model.modules()
        if not isinstance(parent, PackedLinear)
        for name, child in parent.named_children()
        if type(child) is nn.Linear and child.weight.numel() >= least_weights and can_pack(child.weight)
    ]
    with torch.inference_mode():
        for parent, name, child in found:
            setattr(parent, name, PackedLinear(child, rows))
    return len(found)


def copies_fit(model: nn.Module) -> bool:
    """Would packed copies of all linear weights take at most a quarter of the memory that is free now?"""
    linears = (m for m in model.modules() if type(m) is nn.Linear)
    wanted = sum(m.weight.numel() * m.weight.element_size() for m in linears)
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # a system that does not say
        return False
    return 4 * wanted <= free

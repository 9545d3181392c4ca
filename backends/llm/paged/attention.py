"""Attention over the paged cache, as a function that transformers' models call instead of their own.

A step packs the new tokens of all sequences into one row. For every layer the function writes their keys and values
into their blocks and lets each sequence attend to its own blocks. What belongs to which sequence is in the step's
`Layout`, handed over in a thread-local: some architectures drop keyword arguments on the way.

On a GPU the kernels of `backends/kernels` do both. What stands here is the path of the CPU, and of a GPU without
triton: one scaled-dot-product call a sequence over its gathered blocks, which measured faster on a CPU than padding all
sequences to the longest.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from .pool import KVPool

NAME = "flowc_paged"


@dataclass(slots=True)
class Span:
    """The new tokens of one sequence in a step: `rows` of the packed row; its cache holds `length` tokens with them.

    `key` names the sequence from step to step where a copy of its cache may be kept, see `decode_cache`.
    """

    rows: slice
    length: int
    blocks: torch.Tensor  # (blocks of the sequence,) int64, in order, on the CPU: those of a step travel together
    key: Hashable | None = None


@dataclass(slots=True)
class Layout:
    """Where a step's tokens go: for every packed token its block and its place in it, for every sequence its span."""

    pool: KVPool
    block: torch.Tensor  # (tokens,) int64
    offset: torch.Tensor  # (tokens,) int64
    spans: Sequence[Span]
    seen_layers: list[int] = field(default_factory=list)


class _Current(threading.local):
    layout: Layout | None = None


_current = _Current()


class use:
    """A context in which `paged_attention` works on a layout."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout

    def __enter__(self) -> Layout:
        _current.layout = self.layout
        return self.layout

    def __exit__(self, *_: object) -> None:
        _current.layout = None


def paged_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention outputs of shape (1, tokens, heads, value_dim), for query (1, heads, tokens, dim).

    `key` and `value`, of shape (1, kv_heads, tokens, ...), are those of the packed tokens and go into the cache.
    `sliding_window` W lets position p see (p - W, p]; `softcap` squashes scores (Gemma 2); `s_aux` are sink logits,
    one a head (GPT-OSS). Rotary embedding has been applied by the model.
    """
    layout = _current.layout
    assert layout is not None, "paged attention outside a step"
    layer = module.layer_idx
    layout.seen_layers.append(layer)
    kernels = _kernels_for(query)
    if kernels is not None:
        options = {"scaling": scaling, "sliding_window": sliding_window, "softcap": softcap, "s_aux": s_aux}
        return kernels(query, key, value, layout, layer, **options), None
    data = layout.pool.data
    key_dim, value_dim = key.shape[-1], value.shape[-1]
    data[layout.block, layer, 0, layout.offset, :, :key_dim] = key[0].transpose(0, 1).to(data.dtype)
    data[layout.block, layer, 1, layout.offset, :, :value_dim] = value[0].transpose(0, 1).to(data.dtype)
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    out = query.new_empty(1, query.shape[2], query.shape[1], value_dim)
    size = layout.pool.block_size
    for span in layout.spans:
        q = query[0, :, span.rows]  # (heads, new, dim)
        new = q.shape[1]
        first = 0
        if sliding_window is not None:  # whole blocks before the window are not even gathered
            first = max(0, span.length - new - sliding_window + 1) // size
        blocks = span.blocks[first : (span.length + size - 1) // size]
        both = data[blocks, layer]  # (blocks, 2, size, kv_heads, dim)
        cached = span.length - first * size
        k = both[:, 0].reshape(-1, *both.shape[3:])[:cached, :, :key_dim].transpose(0, 1)
        v = both[:, 1].reshape(-1, *both.shape[3:])[:cached, :, :value_dim].transpose(0, 1)
        out[0, span.rows] = _attend(q, k, v, scale, sliding_window, softcap, s_aux).transpose(0, 1)
    return out, None


def _kernels_for(query: torch.Tensor) -> Any:
    """The function that runs the kernels on a query's device, or None."""
    return triton_attention() if query.is_cuda else None


@functools.cache
def triton_attention() -> Any:
    """`kernels.paged_attention.paged_attention_triton`, imported at first use; None where triton is not installed."""
    try:
        return import_module("...kernels.paged_attention", __package__).paged_attention_triton
    except ModuleNotFoundError as e:
        if e.name != "triton":
            raise
        return None


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attention of one sequence: q (heads, new, dim) of its last tokens, k and v (kv_heads, cached, dim) of all."""
    heads, new, _ = q.shape
    kv_heads, cached, _ = k.shape
    group = heads // kv_heads
    mask = None
    if new > 1 or window is not None:
        at = torch.arange(cached - new, cached, device=q.device).unsqueeze(1)
        seen = torch.arange(cached, device=q.device).unsqueeze(0)
        mask = seen <= at
        if window is not None:
            mask &= seen > at - window
    grouped = q.reshape(kv_heads, group * new, -1)  # a group of query heads shares its keys: rows of one product
    full = mask.repeat(group, 1) if mask is not None else None
    if softcap is None and sinks is None:
        got = F.scaled_dot_product_attention(
            grouped.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0), attn_mask=full, scale=scale
        )[0]
        return got.reshape(heads, new, -1)
    scores = torch.matmul(grouped, k.transpose(1, 2)) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if full is not None:
        scores = scores.masked_fill(~full, torch.finfo(scores.dtype).min)
    if sinks is not None:
        column = (
            sinks.to(scores.dtype).reshape(kv_heads, group, 1).expand(-1, -1, new).reshape(kv_heads, group * new, 1)
        )
        weights = torch.softmax(torch.cat([scores, column], dim=-1).float(), dim=-1).to(v.dtype)[..., :-1]
    else:
        weights = torch.softmax(scores.float(), dim=-1).to(v.dtype)
    return torch.matmul(weights, v).reshape(heads, new, -1)


def register() -> None:
    """Makes the function known to transformers. No mask function goes with it: then no mask is built at all."""
    AttentionInterface.register(NAME, paged_attention)

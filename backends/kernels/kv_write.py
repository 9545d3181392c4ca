"""Writes the keys and values of a step's new tokens into their blocks of the paged cache.

Source: Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention", SOSP 2023,
section 5.1 (fused reshape and block write).
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton.language as tl

from .launch import Launch, kernel, power_of_two


@kernel
def _write(
    keys: "Any",
    values: "Any",
    cached_keys: "Any",
    cached_values: "Any",
    blocks: "Any",
    offsets: "Any",
    key_row_stride: "Any",
    key_head_stride: "Any",
    value_row_stride: "Any",
    value_head_stride: "Any",
    cache_block_stride: "Any",
    cache_slot_stride: "Any",
    cache_head_stride: "Any",
    HEADS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    HEADS_PAD: tl.constexpr,
    DIM_PAD: tl.constexpr,
) -> None:
    row = tl.program_id(0)
    block = tl.load(blocks + row).to(tl.int64)  # a pool has more elements than 32 bits count
    slot = tl.load(offsets + row).to(tl.int64)
    head = tl.arange(0, HEADS_PAD)[:, None]
    dim = tl.arange(0, DIM_PAD)[None, :]
    target = block * cache_block_stride + slot * cache_slot_stride + head * cache_head_stride + dim
    wide = row.to(tl.int64)
    mask = (head < HEADS) & (dim < KEY_DIM)
    key = tl.load(keys + wide * key_row_stride + head * key_head_stride + dim, mask=mask, other=0.0)
    tl.store(cached_keys + target, key.to(cached_keys.dtype.element_ty), mask=mask)
    mask = (head < HEADS) & (dim < VALUE_DIM)
    value = tl.load(values + wide * value_row_stride + head * value_head_stride + dim, mask=mask, other=0.0)
    tl.store(cached_values + target, value.to(cached_values.dtype.element_ty), mask=mask)


def kv_write_reference(
    key: torch.Tensor, value: torch.Tensor, data: torch.Tensor, layer: int, block: torch.Tensor, offset: torch.Tensor
) -> None:
    """The same as `kv_write`, by two indexed assignments."""
    data[block, layer, 0, offset, :, : key.shape[-1]] = key.to(data.dtype)
    data[block, layer, 1, offset, :, : value.shape[-1]] = value.to(data.dtype)


def launch_of(
    key: torch.Tensor, value: torch.Tensor, data: torch.Tensor, layer: int, block: torch.Tensor, offset: torch.Tensor
) -> Launch:
    """The launch that `kv_write` runs."""
    tokens, heads, key_dim = key.shape
    value_dim = value.shape[-1]
    assert key.stride(2) == value.stride(2) == data.stride(5) == 1, "the last dimension is not contiguous"
    assert heads == value.shape[1] == data.shape[4], "the pool has another number of heads"
    assert max(key_dim, value_dim) <= data.shape[5], "the pool's heads are smaller"
    assert len(block) == len(offset) == tokens == len(value), "one block, place, key and value a token"
    return Launch(
        _write,
        (tokens,),
        {
            "keys": key,
            "values": value,
            "cached_keys": data[:, layer, 0],
            "cached_values": data[:, layer, 1],
            "blocks": block,
            "offsets": offset,
            "key_row_stride": key.stride(0),
            "key_head_stride": key.stride(1),
            "value_row_stride": value.stride(0),
            "value_head_stride": value.stride(1),
            "cache_block_stride": data.stride(0),
            "cache_slot_stride": data.stride(3),
            "cache_head_stride": data.stride(4),
        },
        {
            "HEADS": heads,
            "KEY_DIM": key_dim,
            "VALUE_DIM": value_dim,
            "HEADS_PAD": power_of_two(heads),
            "DIM_PAD": power_of_two(max(key_dim, value_dim)),
        },
        warps=4,
        stages=1,
    )


def kv_write(
    key: torch.Tensor, value: torch.Tensor, data: torch.Tensor, layer: int, block: torch.Tensor, offset: torch.Tensor
) -> None:
    """Writes key (tokens, kv_heads, key_dim) and value (tokens, kv_heads, value_dim) into `data` at one layer.

    `data` is the pool, (blocks, layers, 2, block_size, kv_heads, head_dim); it may be of another float type and wider
    than either, what is beyond is left as it was. `block` and `offset`, (tokens,) integers, say where each token goes.
    Of two tokens sent to one place, which only rows of padding may be, either may win.
    """
    launch_of(key, value, data, layer, block, offset).run()


def catalogue() -> Iterator[tuple[str, Launch]]:
    """The launches that are compiled ahead of time."""
    for dtype in (torch.float16, torch.bfloat16):
        new = torch.empty(64, 8, 128, dtype=dtype, device="meta")
        data = torch.empty(4096, 32, 2, 16, 8, 128, dtype=dtype, device="meta")
        place = torch.empty(64, dtype=torch.int64, device="meta")
        yield f"kv_write/{str(dtype).removeprefix('torch.')}", launch_of(new, new, data, 3, place, place)

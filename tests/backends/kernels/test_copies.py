"""Writes into the cache and copies of its blocks: the same bits as torch's indexing gives."""

import pytest

pytest.importorskip("triton", reason="triton is not installed: it exists for Linux only, as the [gpu] extra")
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowc.backends.kernels.block_copy import (
    copy_blocks,
    copy_blocks_reference,
    gather_blocks,
    gather_blocks_reference,
    scatter_blocks,
    scatter_blocks_reference,
)
from flowc.backends.kernels.kv_write import kv_write, kv_write_reference
from tests.backends.kernels.device import DEVICE


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bytes: NaN equals NaN here, and 0.0 does not equal -0.0."""
    return tensor.contiguous().view(torch.uint8).cpu()


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**16),
    tokens=st.integers(0, 9),
    kv_heads=st.integers(1, 5),
    dims=st.tuples(st.integers(1, 24), st.integers(1, 24)),
    spare=st.integers(0, 3),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    packed=st.booleans(),
)
def test_kv_write(
    seed: int, tokens: int, kv_heads: int, dims: tuple[int, int], spare: int, dtype: torch.dtype, packed: bool
) -> None:
    random = torch.Generator().manual_seed(seed)
    key, value = (torch.randn(kv_heads, tokens, dim, generator=random).transpose(0, 1) for dim in dims)
    if packed:  # else as models hand it over, heads first
        key, value = key.contiguous(), value.contiguous()
    data = torch.randn(4, 3, 2, 4, kv_heads, max(dims) + spare, generator=random).to(dtype)
    place = torch.randperm(16, generator=random)[:tokens]
    wanted = data.clone()
    kv_write_reference(key, value, wanted, 1, place // 4, place % 4)
    got = data.to(DEVICE)
    kv_write(key.to(DEVICE), value.to(DEVICE), got, 1, (place // 4).to(DEVICE), (place % 4).to(DEVICE))
    assert torch.equal(bits(got), bits(wanted))


DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int8]


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**16),
    count=st.integers(0, 6),
    # a block of 3 x 5 numbers of one or two bytes is no whole number of words; (16, 70) needs more than one program
    shape=st.sampled_from([(1,), (3, 5), (2, 8), (16, 70), (64, 65)]),
    dtype=st.sampled_from(DTYPES),
    index=st.sampled_from([torch.int32, torch.int64]),
)
def test_blocks(seed: int, count: int, shape: tuple[int, ...], dtype: torch.dtype, index: torch.dtype) -> None:
    random = torch.Generator().manual_seed(seed)
    data = torch.randint(-128, 128, (12, *shape, dtype.itemsize), generator=random, dtype=torch.int8)
    data = data.view(dtype).squeeze(-1)  # any bits, those of NaNs too
    order = torch.randperm(12, generator=random).to(index)
    sources, targets = order[:count], order[6 : 6 + count]

    gathered = gather_blocks(data.to(DEVICE), sources.to(DEVICE))
    assert torch.equal(bits(gathered), bits(gather_blocks_reference(data, sources)))

    wanted, got = data.clone(), data.to(DEVICE, copy=True)
    scatter_blocks_reference(gathered.cpu(), wanted, targets)
    scatter_blocks(gathered, got, targets.to(DEVICE))
    assert torch.equal(bits(got), bits(wanted))

    wanted, got = data.clone(), data.to(DEVICE, copy=True)
    copy_blocks_reference(wanted, sources, targets)
    copy_blocks(got, sources.to(DEVICE), targets.to(DEVICE))
    assert torch.equal(bits(got), bits(wanted))


def test_gather_into_a_buffer() -> None:
    data = torch.arange(24.0).view(6, 4).to(DEVICE)
    staging = torch.full((5, 4), -1.0).to(DEVICE)
    blocks = torch.tensor([4, 4, 0]).to(DEVICE)
    out = gather_blocks(data, blocks, staging[1:4])
    assert out.data_ptr() == staging[1].data_ptr()
    assert staging[:, 0].tolist() == [-1.0, 16.0, 16.0, 0.0, -1.0]

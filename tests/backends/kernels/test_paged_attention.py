"""The paged attention kernels against float64, the engine's path on the CPU, and themselves in other company."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed: it exists for Linux only, as the [gpu] extra")
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowc.backends.kernels.paged_attention import (
    Tiling,
    paged_attention,
    paged_attention_reference,
    paged_attention_triton,
    plan,
    split_count,
)
from flowc.backends.llm.paged.attention import Layout, Span, use
from flowc.backends.llm.paged.attention import paged_attention as paged_attention_cpu
from flowc.backends.llm.paged.pool import KVPool
from tests.backends.kernels.device import DEVICE

# Small tiles: every boundary is crossed within a few dozen keys, and an interpreted tile costs milliseconds.
SMALL = (Tiling(16, 16, 4, 1), Tiling(16, 16, 4, 1))
TOLERANCE = {torch.float32: 2e-5, torch.float16: 3e-3}


@dataclass
class World:
    """A pool with sequences in scattered blocks, filled, with NaN wherever no token is."""

    query: torch.Tensor
    data: torch.Tensor
    new_rows: list[int]
    lengths: list[int]
    blocks: list[torch.Tensor]
    heads: int
    kv_heads: int

    @classmethod
    def make(
        cls,
        seed: int,
        sequences: list[tuple[int, int]],  # (cached before, new)
        *,
        kv_heads: int = 2,
        group: int = 2,
        dim: int = 16,
        block_size: int = 4,
        dtype: torch.dtype = torch.float32,
    ) -> "World":
        random = torch.Generator().manual_seed(seed)
        lengths = [before + new for before, new in sequences]
        counts = [-(-length // block_size) for length in lengths]
        data = torch.full((sum(counts) + 3, 2, 2, block_size, kv_heads, dim), torch.nan, dtype=dtype)
        order = (1 + torch.randperm(sum(counts) + 2, generator=random)).tolist()
        blocks = []
        for length, count in zip(lengths, counts, strict=True):
            mine = torch.tensor([order.pop() for _ in range(count)])
            for at in range(length):
                data[mine[at // block_size], 1, :, at % block_size] = torch.randn(
                    2, kv_heads, dim, generator=random
                ).to(dtype)
            blocks.append(mine.to(DEVICE))
        new_rows = [new for _, new in sequences]
        query = torch.randn(sum(new_rows), kv_heads * group, dim, generator=random).to(dtype)
        return cls(query.to(DEVICE), data.to(DEVICE), new_rows, lengths, blocks, kv_heads * group, kv_heads)

    def run(self, *, splits: int = 2, tilings: tuple[Tiling, Tiling] | None = SMALL, **options: Any) -> torch.Tensor:
        batches = plan(
            self.new_rows,
            self.lengths,
            self.blocks,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.data.shape[5],
            dtype=self.data.dtype,
            device=self.data.device,
            splits=splits,
            tilings=tilings,
        )
        return paged_attention(self.query, self.data, 1, batches, **options)

    def expected(self, **options: Any) -> torch.Tensor:
        return paged_attention_reference(
            self.query,
            self.data,
            1,
            self.new_rows,
            self.lengths,
            self.blocks,
            **options,
        )

    def check(self, *, splits: int = 2, **options: Any) -> None:
        got, wanted = self.run(splits=splits, **options), self.expected(**options)
        tolerance = TOLERANCE[self.data.dtype]
        torch.testing.assert_close(got.double(), wanted, atol=tolerance, rtol=tolerance)


SEQUENCES = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 20)), min_size=1, max_size=3)


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**16),
    sequences=SEQUENCES,
    kv_heads=st.integers(1, 2),
    group=st.sampled_from([1, 2, 3, 7, 16]),
    dim=st.sampled_from([8, 16, 24]),
    block_size=st.sampled_from([4, 16]),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    splits=st.sampled_from([1, 2, 4]),
    window=st.none() | st.integers(1, 50),
    softcap=st.none() | st.sampled_from([0.5, 5.0]),
    with_sinks=st.booleans(),
)
def test_equals_the_reference(
    seed: int,
    sequences: list[tuple[int, int]],
    kv_heads: int,
    group: int,
    dim: int,
    block_size: int,
    dtype: torch.dtype,
    splits: int,
    window: int | None,
    softcap: float | None,
    with_sinks: bool,
) -> None:
    world = World.make(seed, sequences, kv_heads=kv_heads, group=group, dim=dim, block_size=block_size, dtype=dtype)
    sinks = torch.linspace(-2.0, 4.0, kv_heads * group).to(DEVICE) if with_sinks else None
    world.check(splits=splits, window=window, softcap=softcap, sinks=sinks)


@pytest.mark.parametrize("splits", [1, 4])
def test_narrower_values_than_keys(splits: int) -> None:
    """Latent attention, expanded: values of 6 numbers in a pool of 16."""
    World.make(1, [(9, 5), (20, 1)], dim=16).check(splits=splits, value_dim=6, scale=0.3)


def test_a_window_hides_what_is_before_it() -> None:
    """With one visible key, the output is that key's value, whatever the scores."""
    world = World.make(2, [(33, 1), (0, 6)])
    got = world.run(window=1)
    for row, sequence in ((0, 0), (6, 1)):
        at = world.lengths[sequence] - 1
        value = world.data[world.blocks[sequence][at // 4], 1, 1, at % 4]
        torch.testing.assert_close(got[row], value.repeat_interleave(2, dim=0), atol=1e-6, rtol=0)


def test_a_row_does_not_depend_on_its_company() -> None:
    """Bit for bit: alone, beside others, in another order, prefilled beside decodes."""
    sequences = [(30, 1), (7, 9), (0, 18), (51, 1)]
    together = World.make(3, sequences)
    packed = together.run()
    row = 0
    for i, (_, new) in enumerate(sequences):
        alone = World(
            together.query[row : row + new],
            together.data,
            [new],
            [together.lengths[i]],
            [together.blocks[i]],
            together.heads,
            together.kv_heads,
        )
        assert torch.equal(alone.run(), packed[row : row + new])
        row += new


def test_chunks_give_the_rows_of_the_whole() -> None:
    """A prompt prefilled at once, and in chunks over its cached beginning: the same bits."""
    whole = World.make(4, [(0, 37)])
    expected = whole.run()
    for begin, end in ((0, 16), (16, 23), (23, 37)):
        chunk = World(whole.query[begin:end], whole.data, [end - begin], [end], whole.blocks, 4, 2)
        assert torch.equal(chunk.run(), expected[begin:end])


def test_own_tile_sizes() -> None:
    """The sizes that a device gets, once: 128 rows, 64 keys, 16 splits."""
    world = World.make(5, [(3, 40), (70, 1)], dtype=torch.float16)
    got = world.run(splits=16, tilings=None)
    torch.testing.assert_close(got.double(), world.expected(), atol=3e-3, rtol=3e-3)


def test_a_pool_beyond_32_bits() -> None:
    """Blocks 2**29 numbers apart: the fifth begins where 32 bits end. Only what is written takes memory."""
    world = World.make(8, [(5, 4), (8, 1)], dtype=torch.float16)
    expected = world.run()
    stride = 2**29
    shape, inner = world.data.shape, world.data.stride()[1:]
    count = sum(len(blocks) for blocks in world.blocks)
    far = torch.empty((count + 1) * stride, dtype=torch.float16, device=DEVICE)
    far = far.as_strided((count + 1, *shape[1:]), (stride, *inner))
    moved: list[torch.Tensor] = []
    for blocks in world.blocks:
        target = torch.arange(len(blocks)) + 1 + sum(len(m) for m in moved)
        for old, new in zip(blocks.tolist(), target.tolist(), strict=True):
            far[new] = world.data[old]
        moved.append(target.to(DEVICE))
    world.data, world.blocks = far, moved
    assert torch.equal(world.run(), expected)


def test_splits_come_from_the_pool() -> None:
    assert [split_count(tokens) for tokens in (1, 256, 257, 1024, 5000, 10**6)] == [1, 1, 2, 4, 16, 16]


@pytest.mark.parametrize(
    "options",
    [{}, {"sliding_window": 5}, {"softcap": 3.0}, {"scaling": 0.4}, {"s_aux": True}],
    ids=["plain", "window", "softcap", "scaling", "sinks"],
)
def test_equals_the_path_on_the_cpu(options: dict[str, Any]) -> None:
    """One step through both functions of the engine, writing included: the same pool after it and the same outputs."""
    random = torch.Generator().manual_seed(7)
    sequences = [(6, 3), (0, 9), (11, 1)]
    dim, heads, kv_heads = 16, 4, 2
    if options.get("s_aux"):
        options = {"s_aux": torch.randn(heads, generator=random)}
    before = torch.randn(20, 2, 2, 4, kv_heads, dim, generator=random)
    query, key, value = (torch.randn(1, count, 13, dim, generator=random) for count in (heads, kv_heads, kv_heads))

    def layout(device: torch.device) -> Layout:
        pool = KVPool(20, layers=2, block_size=4, kv_heads=kv_heads, head_dim=dim, dtype=torch.float32, device=device)
        pool.data.copy_(before)
        spans, block, offset, row = [], [], [], 0
        for cached, new in sequences:
            mine = [pool.allocate() or 0 for _ in range(-(-(cached + new) // 4))]
            block += [mine[at // 4] for at in range(cached, cached + new)]
            offset += [at % 4 for at in range(cached, cached + new)]
            spans.append(Span(slice(row, row + new), cached + new, torch.tensor(mine, device=device)))
            row += new
        return Layout(pool, torch.tensor(block, device=device), torch.tensor(offset, device=device), spans)

    plain, ours = layout(torch.device("cpu")), layout(torch.device(DEVICE))
    for layer in range(2):
        with use(plain):
            wanted, _ = paged_attention_cpu(
                SimpleNamespace(layer_idx=layer),
                query,
                key,
                value,
                None,
                **options,
            )
        moved: dict[str, Any] = {
            name: item.to(DEVICE) if isinstance(item, torch.Tensor) else item for name, item in options.items()
        }
        got = paged_attention_triton(
            query.to(DEVICE),
            key.to(DEVICE),
            value.to(DEVICE),
            ours,
            layer,
            **moved,
        )
        torch.testing.assert_close(got.cpu(), wanted, atol=2e-5, rtol=2e-5)
    assert torch.equal(ours.pool.data.cpu(), plain.pool.data)

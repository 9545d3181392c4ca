"""Copies whole blocks of the paged cache: out to a staging buffer, back from it, or from block to block.

A block is one contiguous piece of memory over all layers, so one kernel serves all three. To and from pinned host
memory a plain asynchronous copy per run of neighbouring blocks is the better tool where runs are long; this is for
blocks that lie scattered, which it brings together into one buffer that then travels at once.

Source: Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention", SOSP 2023,
section 5.1 (fused block copy).
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
import triton.language as tl

from .launch import Launch, kernel

_WORDS = 1024  # a program copies this many


@kernel
def _copy(
    source: "Any",
    target: "Any",
    source_rows: "Any",
    target_rows: "Any",
    words: "Any",
    GATHER: tl.constexpr,
    SCATTER: tl.constexpr,
    SIZE: tl.constexpr,
) -> None:
    item = tl.program_id(0)
    from_row = item.to(tl.int64)
    to_row = item.to(tl.int64)
    if GATHER:
        from_row = tl.load(source_rows + item).to(tl.int64)
    if SCATTER:
        to_row = tl.load(target_rows + item).to(tl.int64)
    at = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    mask = at < words
    piece = tl.load(source + from_row * words + at, mask=mask)
    tl.store(target + to_row * words + at, piece, mask=mask)


def _as_words(blocks: torch.Tensor) -> torch.Tensor:
    """The blocks as rows of the widest integers that divide them: what is copied are bits, a NaN's included."""
    assert blocks.is_contiguous(), "blocks have to be contiguous"
    size_bytes = math.prod(blocks.shape[1:]) * blocks.element_size()
    word = next(w for w in (torch.int64, torch.int32, torch.int16, torch.int8) if size_bytes % w.itemsize == 0)
    return blocks.view(-1).view(word).view(len(blocks), size_bytes // word.itemsize)


def launch_of(
    source: torch.Tensor, target: torch.Tensor, from_blocks: torch.Tensor | None, to_blocks: torch.Tensor | None
) -> Launch:
    """The launch that the functions of this module run; None stands for the numbers from 0 up."""
    assert (source.shape[1:], source.dtype) == (target.shape[1:], target.dtype), "blocks of two kinds"
    read, written = _as_words(source), _as_words(target)
    count = len(from_blocks) if from_blocks is not None else len(to_blocks if to_blocks is not None else source)
    assert to_blocks is None or len(to_blocks) == count, "one place for every block"
    unused = written if from_blocks is None or to_blocks is None else from_blocks
    words = read.shape[1]
    return Launch(
        _copy,
        (count, -(-words // _WORDS)),
        {
            "source": read,
            "target": written,
            "source_rows": unused if from_blocks is None else from_blocks,
            "target_rows": unused if to_blocks is None else to_blocks,
            "words": words,
        },
        {"GATHER": from_blocks is not None, "SCATTER": to_blocks is not None, "SIZE": _WORDS},
        warps=4,
        stages=1,
    )


def gather_blocks(data: torch.Tensor, blocks: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """The blocks of the pool with these numbers, (n, ...), one after another; written to `out` where it is given.

    `data` is the pool, (blocks, ...) and contiguous; `blocks` are (n,) integers on its device, and may repeat.
    """
    out = data.new_empty(len(blocks), *data.shape[1:]) if out is None else out
    assert len(out) == len(blocks), "the buffer has another number of blocks"
    launch_of(data, out, blocks, None).run()
    return out


def scatter_blocks(staged: torch.Tensor, data: torch.Tensor, blocks: torch.Tensor) -> None:
    """Writes block i of `staged`, (n, ...), over block `blocks[i]` of the pool. No number may come twice."""
    assert len(staged) == len(blocks), "one place for every block"
    launch_of(staged, data, None, blocks).run()


def copy_blocks(data: torch.Tensor, sources: torch.Tensor, targets: torch.Tensor) -> None:
    """Copies block `sources[i]` of the pool over block `targets[i]`, as a fork does before it writes.

    No number may come twice among the targets, nor be both a source and a target: all copies happen at once.
    """
    launch_of(data, data, sources, targets).run()


def gather_blocks_reference(data: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """The same as `gather_blocks`, by indexing."""
    return data[blocks.long()]


def scatter_blocks_reference(staged: torch.Tensor, data: torch.Tensor, blocks: torch.Tensor) -> None:
    """The same as `scatter_blocks`, by an indexed assignment."""
    data[blocks.long()] = staged


def copy_blocks_reference(data: torch.Tensor, sources: torch.Tensor, targets: torch.Tensor) -> None:
    """The same as `copy_blocks`, by indexing and an indexed assignment."""
    data[targets.long()] = data[sources.long()]


def catalogue() -> Iterator[tuple[str, Launch]]:
    """The launches that are compiled ahead of time."""
    data = torch.empty(4096, 32, 2, 16, 8, 128, dtype=torch.bfloat16, device="meta")
    numbers = torch.empty(64, dtype=torch.int64, device="meta")
    staged = torch.empty(64, *data.shape[1:], dtype=data.dtype, device="meta")
    yield "block_copy/gather", launch_of(data, staged, numbers, None)
    yield "block_copy/scatter", launch_of(staged, data, None, numbers)
    yield "block_copy/copy", launch_of(data, data, numbers, numbers)

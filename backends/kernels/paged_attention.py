"""Attention of a step's packed new tokens over the paged cache: one kernel for prefill, cached prefixes and decode.

A program takes one key-value head and a tile of new tokens of one sequence. The query heads that share the key-value
head are rows of the same product (grouped-query attention), so a decode of one token still fills a tile with its
group. Keys are read block by block through the sequence's table, scores kept in float32 with a running maximum (Dao et
al., "FlashAttention", 2022, section 3.1). A decode has one tile a head and would leave most of a GPU idle: there the
keys are split among a fixed number of programs whose results a second kernel joins (Dao et al., "Flash-Decoding for
long-context inference", 2023).

*The output for a token depends on its own sequence alone*, bit for bit: tiles of keys begin at multiples of their
size, a tile of keys that a row does not see changes nothing in that row, sequences with one new token always take the
decode path whoever else is in the step, and the number of splits comes from the pool and not from the batch.

Layout and window as in Kwon et al., "Efficient Memory Management for Large Language Model Serving with
PagedAttention", SOSP 2023; soft caps as in Gemma 2 (2024, section 2), sinks as in GPT-OSS: one logit a head that takes
part in the softmax and has no value.
"""

import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol

import torch
import triton.language as tl
from torch.nn.utils.rnn import pad_sequence

from .kv_write import kv_write
from .launch import Launch, kernel, power_of_two

MAX_SPLITS = 16  # 8 key-value heads in 16 parts are 128 programs: about one for each of an H200's 132 processors
LOG2E = tl.constexpr(1.4426950408889634)
SPLIT_TOKENS = 256  # fewer keys than this a split are not worth a second kernel's reading


@kernel
def _attention(
    out: "Any",
    partial: "Any",
    maxima: "Any",
    sums: "Any",
    query: "Any",
    keys: "Any",
    values: "Any",
    sinks: "Any",
    first_row: "Any",
    new_rows: "Any",
    lengths: "Any",
    tables: "Any",
    work: "Any",
    query_row_stride: "Any",
    query_head_stride: "Any",
    key_block_stride: "Any",
    key_slot_stride: "Any",
    key_head_stride: "Any",
    value_block_stride: "Any",
    value_slot_stride: "Any",
    value_head_stride: "Any",
    out_row_stride: "Any",
    out_head_stride: "Any",
    table_stride: "Any",
    heads: "Any",
    window: "Any",
    scale: "Any",
    softcap: "Any",
    GROUP: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KEY_PAD: tl.constexpr,
    VALUE_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
) -> None:
    TOKENS: tl.constexpr = BLOCK_M // GROUP
    item = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    sequence = tl.load(work + 2 * item)
    first_token = tl.load(work + 2 * item + 1) * TOKENS
    new = tl.load(new_rows + sequence)
    length = tl.load(lengths + sequence)

    m = tl.arange(0, BLOCK_M)
    token = first_token + m // GROUP
    head = kv_head * GROUP + m % GROUP
    live = (m < TOKENS * GROUP) & (token < new)
    position = length - new + token
    row = (tl.load(first_row + sequence) + token).to(tl.int64)
    key_dim = tl.arange(0, KEY_PAD)
    value_dim = tl.arange(0, VALUE_PAD)
    q = tl.load(
        query + row[:, None] * query_row_stride + head[:, None] * query_head_stride + key_dim[None, :],
        mask=live[:, None] & (key_dim[None, :] < KEY_DIM),
        other=0.0,
    )

    # The keys that some row of the tile sees: [first, last), in tiles that begin at multiples of BLOCK_N.
    last = tl.minimum(length - new + first_token + TOKENS, length)
    first = 0
    if HAS_WINDOW:
        first = tl.maximum(length - new + first_token - window + 1, 0) // BLOCK_N * BLOCK_N
    if SPLITS > 1:
        tiles = (last - first + BLOCK_N - 1) // BLOCK_N
        share = (tiles + SPLITS - 1) // SPLITS * BLOCK_N
        first = first + split * share
        last = tl.minimum(last, first + share)

    # Powers of two in place of e: one instruction. The maximum begins at a finite number, so that a row which has seen
    # nothing yet gives exp2(-inf) = 0 and never inf - inf.
    top = tl.full([BLOCK_M], -1.0e30, dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    if HAS_SINKS and SPLITS == 1:
        top = tl.load(sinks + head, mask=live, other=0.0).to(tl.float32) * LOG2E
        total += 1.0
    weighted = tl.zeros([BLOCK_M, VALUE_PAD], dtype=tl.float32)
    for start in range(first, last, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        cached = n < last
        entry = sequence.to(tl.int64) * table_stride + n // BLOCK_SIZE
        block = tl.load(tables + entry, mask=cached, other=0).to(tl.int64)  # a pool outgrows 32 bits
        slot = n % BLOCK_SIZE
        k = tl.load(
            keys
            + (block * key_block_stride + slot * key_slot_stride + kv_head * key_head_stride)[None, :]
            + key_dim[:, None],
            mask=cached[None, :] & (key_dim[:, None] < KEY_DIM),
            other=0.0,
        )
        scores = tl.dot(q, k, input_precision="ieee") * scale
        if HAS_SOFTCAP:
            ratio = scores / softcap
            shrunk = tl.exp2(tl.abs(ratio) * (-2.0 * LOG2E))  # tanh, written so that nothing overflows
            scores = tl.where(ratio < 0, -softcap, softcap) * ((1.0 - shrunk) / (1.0 + shrunk))
        seen = cached[None, :] & (n[None, :] <= position[:, None])
        if HAS_WINDOW:
            seen = seen & (n[None, :] > position[:, None] - window)
        scores = tl.where(seen, scores * LOG2E, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        shrink = tl.exp2(top - higher)
        weights = tl.exp2(scores - higher[:, None])
        # Masked also because what lies behind the last token may be anything: 0 times NaN is NaN.
        v = tl.load(
            values
            + (block * value_block_stride + slot * value_slot_stride + kv_head * value_head_stride)[:, None]
            + value_dim[None, :],
            mask=cached[:, None] & (value_dim[None, :] < VALUE_DIM),
            other=0.0,
        )
        total = total * shrink + tl.sum(weights, 1)
        weighted = tl.dot(weights.to(v.dtype), v, acc=weighted * shrink[:, None], input_precision="ieee")
        top = higher

    if SPLITS == 1:
        result = weighted / tl.where(total > 0, total, 1.0)[:, None]
        tl.store(
            out + row[:, None] * out_row_stride + head[:, None] * out_head_stride + value_dim[None, :],
            result.to(out.dtype.element_ty),
            mask=live[:, None] & (value_dim[None, :] < VALUE_DIM),
        )
    else:  # an item is one token here
        part = (item.to(tl.int64) * heads + head) * SPLITS + split
        tl.store(maxima + part, top, mask=live)
        tl.store(sums + part, total, mask=live)
        if first < last:
            tl.store(
                partial + part[:, None] * VALUE_DIM + value_dim[None, :],
                weighted,
                mask=live[:, None] & (value_dim[None, :] < VALUE_DIM),
            )


@kernel
def _join(
    out: "Any",
    partial: "Any",
    maxima: "Any",
    sums: "Any",
    sinks: "Any",
    first_row: "Any",
    new_rows: "Any",
    work: "Any",
    out_row_stride: "Any",
    out_head_stride: "Any",
    heads: "Any",
    VALUE_DIM: tl.constexpr,
    VALUE_PAD: tl.constexpr,
    SPLITS: tl.constexpr,
    HAS_SINKS: tl.constexpr,
) -> None:
    item = tl.program_id(0)
    head = tl.program_id(1)
    sequence = tl.load(work + 2 * item)
    live = tl.load(new_rows + sequence) > 0
    row = tl.load(first_row + sequence).to(tl.int64)
    part = (item.to(tl.int64) * heads + head) * SPLITS + tl.arange(0, SPLITS)
    value_dim = tl.arange(0, VALUE_PAD)
    tops = tl.load(maxima + part, mask=live, other=-1.0e30)
    totals = tl.load(sums + part, mask=live, other=0.0)
    top = tl.max(tops, 0)
    if HAS_SINKS:
        sink = tl.load(sinks + head).to(tl.float32) * LOG2E
        top = tl.maximum(top, sink)
    factor = tl.exp2(tops - top)
    total = tl.sum(factor * totals, 0)
    if HAS_SINKS:
        total += tl.exp2(sink - top)
    pieces = tl.load(
        partial + part[:, None] * VALUE_DIM + value_dim[None, :],
        mask=(totals > 0)[:, None] & (value_dim[None, :] < VALUE_DIM),  # a split without keys has written nothing
        other=0.0,
    )
    result = tl.sum(pieces * factor[:, None], 0) / tl.where(total > 0, total, 1.0)
    tl.store(
        out + row * out_row_stride + head * out_head_stride + value_dim,
        result.to(out.dtype.element_ty),
        mask=live & (value_dim < VALUE_DIM),
    )


# ------------------------------------------------------------------------------------------------ reference
def paged_attention_reference(
    query: torch.Tensor,
    data: torch.Tensor,
    layer: int,
    new_rows: Sequence[int],
    lengths: Sequence[int],
    blocks: Sequence[torch.Tensor],
    *,
    value_dim: int | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """What the kernels compute, (tokens, heads, value_dim), in float64 with a full matrix of scores a sequence and
    head.

    `query` is (tokens, heads, dim), the new tokens of all sequences one after another; `data` is the pool, (blocks,
    layers, 2, block_size, kv_heads, head_dim), with the new tokens already written; sequence i has `new_rows[i]` of the
    rows and `lengths[i]` cached tokens in `blocks[i]`, its new ones last. A window W lets position p see (p - W, p].
    """
    _, heads, key_dim = query.shape
    kv_heads = data.shape[4]
    value_dim = data.shape[5] if value_dim is None else value_dim
    factor = float(key_dim**-0.5 if scale is None else scale)
    out = torch.zeros(*query.shape[:2], value_dim, dtype=torch.float64, device=query.device)
    row = 0
    for new, length, table in zip(new_rows, lengths, blocks, strict=True):
        cached = data[table.long(), layer].double()  # (blocks, 2, size, kv_heads, head_dim)
        k = cached[:, 0].flatten(0, 1)[:length, :, :key_dim]
        v = cached[:, 1].flatten(0, 1)[:length, :, :value_dim]
        position = torch.arange(length - new, length, device=query.device)[:, None]
        at = torch.arange(length, device=query.device)[None, :]
        seen = at <= position
        if window is not None:
            seen &= at > position - window
        for head in range(heads):
            kv_head = head * kv_heads // heads
            scores = query[row : row + new, head].double() @ k[:, kv_head].T * factor
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            scores = scores.masked_fill(~seen, -math.inf)
            if sinks is not None:
                scores = torch.cat([scores, sinks[head].double().expand(new, 1)], dim=1)
            weights = torch.softmax(scores, dim=1)[:, :length]
            out[row : row + new, head] = weights @ v[:, kv_head]
        row += new
    return out


# ------------------------------------------------------------------------------------------------ planning
@dataclass(frozen=True, slots=True)
class Tiling:
    """The tile sizes of a launch: `block_m` rows (tokens times heads of a group) by `block_n` keys."""

    block_m: int
    block_n: int
    warps: int
    stages: int


def tiling(head_dim: int, dtype: torch.dtype, group: int, *, decode: bool) -> Tiling:
    """The tiles for a head dimension, the larger of keys' and values'; they fit the shared memory of capability 9.0."""
    wide = power_of_two(head_dim)
    half = dtype.itemsize == 2
    if decode:
        return Tiling(max(16, power_of_two(group)), 64 if wide <= 128 else 32, 4, 3 if half and wide <= 256 else 2)
    least = power_of_two(group)  # a tile holds at least one token
    if half and wide <= 128:
        return Tiling(max(128, least), 64, 8, 3)
    if half and wide <= 256:
        return Tiling(max(64, least), 64, 4 if least <= 64 else 8, 2)
    if half:
        return Tiling(max(64, least), 32, 8, 1)
    return Tiling(max(32 if wide <= 128 else 16, least), 32, 4, 2)


def split_count(capacity_tokens: int) -> int:
    """In how many parts decodes read their keys, for sequences of at most this length: a power of two up to 16."""
    return min(MAX_SPLITS, power_of_two(-(-capacity_tokens // SPLIT_TOKENS)))


@dataclass(frozen=True, slots=True)
class Batch:
    """The sequences of one launch; int32 on the device. Item i is tile `work[i, 1]` of the rows of sequence `work[i,
    0]`."""

    first_row: torch.Tensor  # (sequences,), in the packed row
    new_rows: torch.Tensor  # (sequences,); 0 makes an item do nothing, which fills up a captured graph
    lengths: torch.Tensor  # (sequences,), the new rows included
    tables: torch.Tensor  # (sequences, columns), block numbers
    work: torch.Tensor  # (items, 2)
    tiling: Tiling
    splits: int


def plan(
    new_rows: Sequence[int],
    lengths: Sequence[int],
    blocks: Sequence[torch.Tensor],
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    splits: int,
    tilings: tuple[Tiling, Tiling] | None = None,
) -> tuple[Batch, ...]:
    """The launches of a step, the same for all of its layers: sequences with several new rows, and those with one.

    `blocks[i]` are the block numbers of sequence i, in order, at least as many as its length needs. All small numbers
    travel to the device in one copy. `tilings` are those for prefill and for decode, chosen by `tiling` where not
    given.
    """
    group = heads // kv_heads
    starts = list(accumulate(new_rows, initial=0))
    batches = []
    for decode in (False, True):
        chosen = [i for i, new in enumerate(new_rows) if (new == 1) == decode and new > 0]
        if not chosen:
            continue
        tiles = tilings[decode] if tilings else tiling(head_dim, dtype, group, decode=decode)
        tokens = tiles.block_m // group
        assert tokens > 0, "a tile holds at least the heads of one group"
        work = [
            number for at, i in enumerate(chosen) for tile in range(-(-new_rows[i] // tokens)) for number in (at, tile)
        ]
        columns = ([starts[i] for i in chosen], [new_rows[i] for i in chosen], [lengths[i] for i in chosen], work)
        packed: list[int] = []
        ends = []
        for column in columns:  # each begins at a multiple of 16 bytes, or kernels would be compiled for either case
            ends.append((len(packed), len(packed) + len(column)))
            packed += column + [0] * (-len(column) % 4)
        host = torch.tensor(packed, dtype=torch.int32)
        if device.type == "cuda":
            host = host.pin_memory()
        sent = host.to(device, non_blocking=True)
        parts = [sent[begin:end] for begin, end in ends]
        table = pad_sequence([blocks[i] for i in chosen], batch_first=True).to(device=device, dtype=torch.int32)
        table = torch.nn.functional.pad(table, (0, -table.shape[1] % 16))  # and strides are multiples of 16
        batches.append(Batch(parts[0], parts[1], parts[2], table, parts[3].view(-1, 2), tiles, splits if decode else 1))
    return tuple(batches)


# ------------------------------------------------------------------------------------------------ launching
def launches_of(
    query: torch.Tensor,
    data: torch.Tensor,
    layer: int,
    batch: Batch,
    out: torch.Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> tuple[Launch, ...]:
    """The launches for one batch: the attention, and where the keys are split the kernel that joins the parts."""
    heads, key_dim = query.shape[1:]
    kv_heads, value_dim = data.shape[4], out.shape[2]
    assert query.stride(2) == data.stride(5) == out.stride(2) == 1, "the last dimension is not contiguous"
    assert heads % kv_heads == 0, f"{heads} heads cannot share {kv_heads} key-value heads alike"
    assert max(key_dim, value_dim) <= data.shape[5], "the pool's heads are smaller"
    assert query.dtype == data.dtype, f"queries are {query.dtype}, the cache {data.dtype}"
    items = len(batch.work)
    split = batch.splits > 1
    parts = (items, heads, batch.splits)
    partial = query.new_empty(*parts, value_dim, dtype=torch.float32) if split else out
    maxima = query.new_empty(parts, dtype=torch.float32) if split else out
    sums = query.new_empty(parts, dtype=torch.float32) if split else out
    value_pad = max(16, power_of_two(value_dim))
    shared = {"first_row": batch.first_row, "new_rows": batch.new_rows, "work": batch.work}
    shared |= {"out": out, "partial": partial, "maxima": maxima, "sums": sums}
    shared |= {"sinks": query if sinks is None else sinks}
    strides = {"out_row_stride": out.stride(0), "out_head_stride": out.stride(1), "heads": heads}
    common = {"VALUE_DIM": value_dim, "VALUE_PAD": value_pad, "SPLITS": batch.splits, "HAS_SINKS": sinks is not None}
    attention = Launch(
        _attention,
        (items, kv_heads, batch.splits),
        {
            **shared,
            **strides,
            "query": query,
            "keys": data[:, layer, 0],
            "values": data[:, layer, 1],
            "lengths": batch.lengths,
            "tables": batch.tables,
            "query_row_stride": query.stride(0),
            "query_head_stride": query.stride(1),
            "key_block_stride": data.stride(0),
            "key_slot_stride": data.stride(3),
            "key_head_stride": data.stride(4),
            "value_block_stride": data.stride(0),
            "value_slot_stride": data.stride(3),
            "value_head_stride": data.stride(4),
            "table_stride": batch.tables.stride(0),
            "window": window or 0,
            "scale": float(key_dim**-0.5 if scale is None else scale),
            "softcap": float(softcap or 0.0),
        },
        {
            **common,
            "GROUP": heads // kv_heads,
            "KEY_DIM": key_dim,
            "KEY_PAD": max(16, power_of_two(key_dim)),
            "BLOCK_SIZE": data.shape[3],
            "BLOCK_M": batch.tiling.block_m,
            "BLOCK_N": batch.tiling.block_n,
            "HAS_WINDOW": window is not None,
            "HAS_SOFTCAP": softcap is not None,
        },
        warps=batch.tiling.warps,
        stages=batch.tiling.stages,
    )
    if not split:
        return (attention,)
    return attention, Launch(_join, (items, heads), {**shared, **strides}, common, warps=4, stages=1)


def paged_attention(
    query: torch.Tensor,
    data: torch.Tensor,
    layer: int,
    batches: Sequence[Batch],
    *,
    value_dim: int | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention outputs (tokens, heads, value_dim) of query (tokens, heads, dim) over one layer of the pool.

    `data` is (blocks, layers, 2, block_size, kv_heads, head_dim), of the query's float type, and holds the new tokens
    already; `batches` come from `plan`. Rows of no sequence are left unset. `scale` is dim ** -0.5 unless given; a
    `window` W lets position p see (p - W, p]; `softcap` c turns scores s into c tanh(s / c); `sinks` are (heads,)
    logits.
    """
    out = query.new_empty(*query.shape[:2], data.shape[5] if value_dim is None else value_dim)
    for batch in batches:
        for launch in launches_of(
            query, data, layer, batch, out, scale=scale, window=window, softcap=softcap, sinks=sinks
        ):
            launch.run()
    return out


# ------------------------------------------------------------------------------------------------ the engine's side
class _Pool(Protocol):
    @property
    def data(self) -> torch.Tensor: ...
    @property
    def block_size(self) -> int: ...


class _Span(Protocol):
    @property
    def rows(self) -> slice: ...
    @property
    def length(self) -> int: ...
    @property
    def blocks(self) -> torch.Tensor: ...


class PagedLayout(Protocol):
    """What this file needs of a step's layout; `flowc.backends.llm.paged.attention.Layout` is one."""

    @property
    def pool(self) -> _Pool: ...
    @property
    def block(self) -> torch.Tensor: ...
    @property
    def offset(self) -> torch.Tensor: ...
    @property
    def spans(self) -> Sequence[_Span]: ...


class _Planned(threading.local):
    """The plan of the layout that came last on this thread: a step has one layout and many layers."""

    layout: PagedLayout | None = None
    shape: tuple[object, ...] = ()
    batches: tuple[Batch, ...] = ()


_planned = _Planned()


def paged_attention_triton(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: PagedLayout,
    layer: int,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention outputs (1, tokens, heads, value_dim) for query (1, heads, tokens, dim), key and value (1, kv_heads,
    tokens, ...).

    Writes the new keys and values into the layout's blocks, then attends, as the engine's function on the CPU does and
    with the same meaning of every argument. The spans follow one another in the packed row, without gaps. The layout
    and its spans must not change between the layers of a step.
    """
    data = layout.pool.data
    heads, tokens = query.shape[1:3]
    value_dim = value.shape[-1]
    shape = (heads, data.shape, data.dtype, query.dtype)
    if _planned.layout is not layout or _planned.shape != shape:
        spans = layout.spans
        new_rows = [span.rows.stop - span.rows.start for span in spans]
        starts = list(accumulate(new_rows, initial=0))
        assert [span.rows.start for span in spans] == starts[:-1], "rows with gaps"
        _planned.batches = plan(
            new_rows,
            [span.length for span in spans],
            [span.blocks for span in spans],
            heads=heads,
            kv_heads=data.shape[4],
            head_dim=data.shape[5],
            dtype=data.dtype,
            device=data.device,
            splits=split_count(len(data) * layout.pool.block_size),
        )
        _planned.layout, _planned.shape = layout, shape
    kv_write(_rows(key), _rows(value), data, layer, layout.block, layout.offset)
    out = paged_attention(
        _rows(query.to(data.dtype)),
        data,
        layer,
        _planned.batches,
        value_dim=value_dim,
        scale=scaling,
        window=sliding_window,
        softcap=softcap,
        sinks=s_aux,
    )
    return out.to(query.dtype).view(1, tokens, heads, value_dim)


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """(1, heads, tokens, dim) as (tokens, heads, dim), copied only if a row's numbers do not lie side by side."""
    rows = tensor[0].transpose(0, 1)
    return rows if rows.stride(2) == 1 else rows.contiguous()


# ------------------------------------------------------------------------------------------------ ahead of time
# head_dim, heads, kv_heads, float type, what else: the shapes of Llama 3 8B, Qwen3 0.6B, Gemma 2 and 3, Phi-3, GPT-OSS
_SHAPES: tuple[tuple[str, int, int, int, torch.dtype, dict[str, Any]], ...] = (
    ("llama3-8b", 128, 32, 8, torch.bfloat16, {}),
    ("llama3-8b", 128, 32, 8, torch.float16, {}),
    ("llama3-8b", 128, 32, 8, torch.float32, {}),
    ("llama3-1b", 64, 32, 8, torch.bfloat16, {}),
    ("phi3-mini", 96, 32, 32, torch.bfloat16, {"window": 2047}),
    ("gemma2-9b", 256, 16, 8, torch.bfloat16, {"window": 4096, "softcap": 50.0}),
    ("gemma3-4b", 256, 8, 4, torch.float32, {"window": 1024}),
    ("gpt-oss", 64, 64, 8, torch.bfloat16, {"window": 128, "sinks": True}),
    ("qwen2-7b", 128, 28, 4, torch.float16, {}),  # 7 heads a group: a tile is not filled
)


def catalogue() -> Iterator[tuple[str, Launch]]:
    """The launches that are compiled ahead of time: prefill, decode and join for the shapes of known models."""
    meta = torch.device("meta")
    for name, dim, heads, kv_heads, dtype, options in _SHAPES:
        data = torch.empty(1024, 4, 2, 16, kv_heads, dim, dtype=dtype, device=meta)
        for decode in (False, True):
            new = [1, 1] if decode else [100, 300]
            query = torch.empty(sum(new), heads, dim, dtype=dtype, device=meta)
            blocks = [torch.empty(64, dtype=torch.int64, device=meta)] * 2
            sinks = torch.empty(heads, dtype=dtype, device=meta) if options.get("sinks") else None
            (batch,) = plan(
                new,
                [1000, 1000],
                blocks,
                heads=heads,
                kv_heads=kv_heads,
                head_dim=dim,
                dtype=dtype,
                device=meta,
                splits=MAX_SPLITS,
            )
            launches = launches_of(
                query,
                data,
                1,
                batch,
                torch.empty_like(query),
                window=options.get("window"),
                softcap=options.get("softcap"),
                sinks=sinks,
            )
            label = f"{name}/{str(dtype).removeprefix('torch.')}"
            yield f"attention/{'decode' if decode else 'prefill'}/{label}", launches[0]
            for join in launches[1:]:
                yield f"attention/join/{label}", join

"""Scores index pages on the device and keeps the best k: the part of an IVF search whose lists are resident there.

Lists are cut into pages of 32 or 64 vectors in one slab, so that a cache of lists can be filled and emptied without
moving what stays. A work item is a query and a few pages of *its own probed lists*: what is resident and not probed by
the query is not scanned, so a result does not depend on what else the cache holds (TeleRAG scans every resident list
for every query). An item's scores stay in registers, and its k best leave by k rounds of a maximum; a merge over a
query's items follows.

Products and sums are float32 whatever the pages hold. A code's score is the same bits in every item, batch and cache
state; it is not the canonical score of the CPU, whose order of summation differs: ask for k + 6 and score those again
there.

Source: Lin et al., "TeleRAG: Efficient Retrieval-Augmented Generation Inference with Lookahead Retrieval", 2025,
sections 3 and 4 (pages of clusters on the GPU, search split between CPU and GPU).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import triton.language as tl

from .launch import Launch, kernel, power_of_two

Metric = Literal["ip", "l2"]

MAX_K = 128
CODES = 256  # vectors a work item holds the scores of
_NOBODY = 2**63 - 1  # the id of what is not there: greater than all others, so it loses every tie


@kernel
def _scan(
    found_scores: "Any",
    found_ids: "Any",
    queries: "Any",
    vectors: "Any",
    ids: "Any",
    lengths: "Any",
    scales: "Any",
    work_query: "Any",
    work_pages: "Any",
    query_stride: "Any",
    page_stride: "Any",
    vector_stride: "Any",
    k: "Any",
    DIM: tl.constexpr,
    PAGE: tl.constexpr,
    RUN: tl.constexpr,
    BLOCK_D: tl.constexpr,
    L2: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    NOBODY: tl.constexpr,
) -> None:
    item = tl.program_id(0).to(tl.int64)
    query = tl.load(work_query + item).to(tl.int64)
    code = tl.arange(0, RUN * PAGE)
    slot = code % PAGE
    page = tl.load(work_pages + item * RUN + code // PAGE).to(tl.int64)
    live = page >= 0
    live = live & (slot < tl.load(lengths + page, mask=live, other=0))
    where = page * page_stride + slot * vector_stride
    if HAS_SCALES:
        scale = tl.load(scales + page, mask=live, other=0.0)
    sums = tl.zeros([RUN * PAGE, BLOCK_D], dtype=tl.float32)
    for start in range(0, DIM, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        mask = live[:, None] & (d[None, :] < DIM)
        stored = tl.load(vectors + where[:, None] + d[None, :], mask=mask, other=0).to(tl.float32)
        asked = tl.load(queries + query * query_stride + d, mask=d < DIM, other=0.0)[None, :]
        if HAS_SCALES:
            stored = stored * scale[:, None]
        if L2:
            sums += (stored - asked) * (stored - asked)
        else:
            sums += stored * asked
    score = tl.sum(sums, 1)
    if L2:
        score = -score
    name = tl.load(ids + page * PAGE + slot, mask=live, other=-1)
    live = live & (name >= 0) & (score == score)  # deleted, or not a number
    score = tl.where(live, score, float("-inf"))
    name = tl.where(live, name, NOBODY)
    for place in range(k):
        best = tl.max(score, 0)
        first = tl.min(tl.where(score == best, name, NOBODY), 0)  # of equal scores the smallest id
        tl.store(found_scores + item * k + place, best)
        tl.store(found_ids + item * k + place, first)
        score = tl.where(name == first, float("-inf"), score)
        name = tl.where(name == first, NOBODY, name)


@dataclass(frozen=True, slots=True)
class Pages:
    """A slab of pages on one device, each with vectors of one list."""

    vectors: (
        torch.Tensor
    )  # (pages, page_size, dim): float32, float16, bfloat16 or int8; the last two dimensions contiguous
    ids: torch.Tensor  # (pages, page_size) int64, contiguous; negative: deleted
    lengths: torch.Tensor  # (pages,) int32: how many of a page's places are filled, from the first
    scales: torch.Tensor | None = None  # (pages,) float32: what the numbers of a page are multiplied with, for int8


@dataclass(frozen=True, slots=True)
class Work:
    """Which pages to scan for which query."""

    query: torch.Tensor  # (items,) int32, ascending
    pages: torch.Tensor  # (items, run) int32; -1: none
    rank: torch.Tensor  # (items,) int64: which of its query's items it is
    items: tuple[int, ...]  # items per query
    missing: tuple[tuple[int, int], ...]  # (query, list) that are probed and not resident, for the CPU


def plan_scan(
    probes: Sequence[Sequence[int]],
    resident: Mapping[int, Sequence[int]],
    *,
    page_size: int,
    device: torch.device,
) -> Work:
    """The work for queries whose probed lists are `probes` (-1: none), where `resident` gives the pages of a list.

    Pages of a query's lists are packed into items without regard to where lists end.
    """
    mine: list[list[int]] = []
    missing = []
    for number, lists in enumerate(probes):
        mine.append([])
        for probed in lists:
            held = resident.get(probed)
            if held is not None:
                mine[-1] += held
            elif probed >= 0:
                missing.append((number, probed))
    return replace(plan_pages(mine, page_size=page_size, device=device), missing=tuple(missing))


def plan_pages(pages: Sequence[Sequence[int] | npt.NDArray[np.int64]], *, page_size: int, device: torch.device) -> Work:
    """The work for queries of which each has its own pages to scan."""
    run = max(1, CODES // page_size)
    counts = [-(-len(mine) // run) for mine in pages]
    packed = np.full((sum(counts), run), -1, dtype=np.int32)
    first = 0
    for mine, count in zip(pages, counts, strict=True):
        packed[first : first + count].reshape(-1)[: len(mine)] = mine
        first += count
    every = np.array(counts, dtype=np.int64)
    rank = np.arange(len(packed)) - np.repeat(np.cumsum(every) - every, every)
    return Work(
        torch.from_numpy(np.repeat(np.arange(len(every), dtype=np.int32), every)).to(device),
        torch.from_numpy(packed).to(device),
        torch.from_numpy(rank).to(device),
        tuple(counts),
        (),
    )


def launch_of(
    queries: torch.Tensor,
    pages: Pages,
    work: Work,
    k: int,
    metric: Metric,
    scores: torch.Tensor,
    ids: torch.Tensor,
) -> Launch:
    """The launch that `page_scan` runs; `scores` and `ids`, (items, k), receive what each item finds."""
    _, page_size, dim = pages.vectors.shape
    assert 1 <= k <= MAX_K, f"k is {k}; it may be 1 to {MAX_K}"
    assert page_size == power_of_two(page_size), "a page's size is a power of two"
    assert (queries.dtype, queries.shape[1]) == (torch.float32, dim), f"queries are float32 of {dim} numbers"
    assert queries.stride(1) == pages.vectors.stride(2) == 1, "the last dimension is not contiguous"
    assert pages.ids.is_contiguous(), "ids are not contiguous"
    return Launch(
        _scan,
        (len(work.query),),
        {
            "found_scores": scores,
            "found_ids": ids,
            "queries": queries,
            "vectors": pages.vectors,
            "ids": pages.ids,
            "lengths": pages.lengths,
            "scales": pages.lengths if pages.scales is None else pages.scales,
            "work_query": work.query,
            "work_pages": work.pages,
            "query_stride": queries.stride(0),
            "page_stride": pages.vectors.stride(0),
            "vector_stride": pages.vectors.stride(1),
            "k": k,
        },
        {
            "DIM": dim,
            "PAGE": page_size,
            "RUN": work.pages.shape[1],
            "BLOCK_D": min(power_of_two(dim), 32 if pages.vectors.dtype == torch.float32 else 64),
            "L2": metric == "l2",
            "HAS_SCALES": pages.scales is not None,
            "NOBODY": _NOBODY,
        },
        warps=8,
        stages=2,
    )


def page_scan(
    queries: torch.Tensor, pages: Pages, work: Work, k: int, *, metric: Metric = "ip"
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k best of each query's resident vectors: scores (queries, k) float32 and ids (queries, k) int64.

    Ordered by score from the highest, equal scores by id from the lowest. For "l2" a score is the squared distance
    with a minus. Where a query has fewer, -inf and -1 fill up. `queries` are (queries, dim) float32; k is 1 to 128.
    """
    found_scores = queries.new_empty(len(work.query), k)
    found_ids = torch.empty(len(work.query), k, dtype=torch.int64, device=queries.device)
    launch_of(queries, pages, work, k, metric, found_scores, found_ids).run()
    return _merge(found_scores, found_ids, work, k)


def _merge(scores: torch.Tensor, ids: torch.Tensor, work: Work, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k best over the items of each query: rows side by side, sorted by id and then, stably, by score."""
    count, widest = len(work.items), max(work.items, default=0)
    columns = max(1, widest) * k
    all_scores = scores.new_full((count, columns), float("-inf"))
    all_ids = ids.new_full((count, columns), _NOBODY)
    if widest:
        query = work.query.long()
        all_scores.view(count, widest, k)[query, work.rank] = scores
        all_ids.view(count, widest, k)[query, work.rank] = ids
    all_ids, order = torch.sort(all_ids, dim=1, stable=True)
    all_scores, place = torch.sort(all_scores.gather(1, order), dim=1, descending=True, stable=True)
    best = all_ids.gather(1, place)[:, :k]
    return all_scores[:, :k].contiguous(), torch.where(best == _NOBODY, -1, best)


def page_scan_reference(
    queries: torch.Tensor, pages: Pages, work: Work, k: int, *, metric: Metric = "ip"
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same as `page_scan` but for rounding: every page of every item in float64, and one sort a query."""
    scores = torch.full((len(work.items), k), float("-inf"), dtype=torch.float64)
    ids = torch.full((len(work.items), k), -1, dtype=torch.int64)
    for query in range(len(work.items)):
        found: list[tuple[float, int]] = []
        for page in work.pages[work.query == query].flatten().tolist():
            if page < 0:
                continue
            length = int(pages.lengths[page])
            stored = pages.vectors[page, :length].double()
            if pages.scales is not None:
                stored = stored * pages.scales[page].double()
            asked = queries[query].double()
            score = -((stored - asked) ** 2).sum(1) if metric == "l2" else stored @ asked
            found += [(-s, i) for s, i in zip(score.tolist(), pages.ids[page, :length].tolist(), strict=True) if i >= 0]
        for place, (minus, number) in enumerate(sorted(found)[:k]):
            scores[query, place], ids[query, place] = -minus, number
    return scores.to(queries.device), ids.to(queries.device)


def catalogue() -> Iterator[tuple[str, Launch]]:
    """The launches that are compiled ahead of time."""
    meta = torch.device("meta")
    for dtype, dim, page_size, k, metric in (
        (torch.float32, 384, 64, 16, "ip"),
        (torch.float16, 384, 64, 16, "ip"),
        (torch.float16, 1024, 32, 128, "l2"),
        (torch.bfloat16, 768, 64, 106, "ip"),
        (torch.int8, 384, 32, 16, "ip"),
    ):
        pages = Pages(
            torch.empty(1000, page_size, dim, dtype=dtype, device=meta),
            torch.empty(1000, page_size, dtype=torch.int64, device=meta),
            torch.empty(1000, dtype=torch.int32, device=meta),
            torch.empty(1000, device=meta) if dtype == torch.int8 else None,
        )
        work = Work(
            torch.empty(32, dtype=torch.int32, device=meta),
            torch.empty(32, CODES // page_size, dtype=torch.int32, device=meta),
            torch.empty(32, dtype=torch.int64, device=meta),
            (32,),
            (),
        )
        queries = torch.empty(1, dim, device=meta)
        scores, ids = torch.empty(32, k, device=meta), torch.empty(32, k, dtype=torch.int64, device=meta)
        launch = launch_of(queries, pages, work, k, "l2" if metric == "l2" else "ip", scores, ids)
        yield f"page_scan/{str(dtype).removeprefix('torch.')}/{dim}/{page_size}/{k}", launch

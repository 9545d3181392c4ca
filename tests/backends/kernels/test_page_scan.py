"""The scan of index pages against float64, and against itself with another cache around it."""

import pytest

pytest.importorskip("triton", reason="triton is not installed: it exists for Linux only, as the [gpu] extra")
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowc.backends.kernels.page_scan import MAX_K, Metric, Pages, Work, page_scan, page_scan_reference, plan_scan
from tests.backends.kernels.device import DEVICE

METRICS: list[Metric] = ["ip", "l2"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int8]


class Slab:
    """Lists in pages in random order, with vectors of small whole numbers: every score is exact, and ties abound."""

    def __init__(self, seed: int, lists: list[int], *, page: int = 32, dim: int = 12, dtype: torch.dtype) -> None:
        self.random = torch.Generator().manual_seed(seed)
        self.page = page
        counts = [-(-length // page) for length in lists]
        total = sum(counts) + 2
        order = torch.randperm(total, generator=self.random).tolist()
        self.resident = {number: [order.pop() for _ in range(count)] for number, count in enumerate(counts)}
        vectors = torch.randint(-3, 4, (total, page, dim), generator=self.random).to(dtype)
        ids = torch.randperm(total * page, generator=self.random).view(total, page)
        ids[torch.rand(total, page, generator=self.random) < 0.1] = -1  # deleted
        lengths = torch.zeros(total, dtype=torch.int32)
        for number, length in enumerate(lists):
            for at, held in enumerate(self.resident[number]):
                lengths[held] = min(page, length - at * page)
        scales = None
        if dtype == torch.int8:
            scales = 2.0 ** torch.randint(-2, 3, (total,), generator=self.random).float()
        self.dim = dim
        self.pages = Pages(
            vectors.to(DEVICE), ids.to(DEVICE), lengths.to(DEVICE), None if scales is None else scales.to(DEVICE)
        )

    def queries(self, count: int) -> torch.Tensor:
        return torch.randint(-3, 4, (count, self.dim), generator=self.random).float().to(DEVICE)

    def work(self, probes: list[list[int]], resident: dict[int, list[int]] | None = None) -> Work:
        held = self.resident if resident is None else resident
        return plan_scan(probes, held, page_size=self.page, device=torch.device(DEVICE))


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**16),
    lists=st.lists(st.integers(0, 150), min_size=1, max_size=5),
    probes=st.lists(st.sets(st.integers(-1, 6), max_size=5), min_size=1, max_size=3),
    page=st.sampled_from([32, 64]),
    dim=st.sampled_from([1, 12, 40, 70]),
    dtype=st.sampled_from(DTYPES),
    k=st.sampled_from([1, 5, 16, 40]),
    metric=st.sampled_from(METRICS),
)
def test_equals_the_reference(
    seed: int, lists: list[int], probes: list[set[int]], page: int, dim: int, dtype: torch.dtype, k: int, metric: Metric
) -> None:
    slab = Slab(seed, lists, page=page, dim=dim, dtype=dtype)
    work, queries = slab.work([sorted(p) for p in probes]), slab.queries(len(probes))
    assert work.missing == tuple((q, c) for q, p in enumerate(probes) for c in sorted(p) if c >= len(lists))
    scores, ids = page_scan(queries, slab.pages, work, k, metric=metric)
    wanted_scores, wanted_ids = page_scan_reference(queries, slab.pages, work, k, metric=metric)
    assert ids.tolist() == wanted_ids.tolist()
    assert scores.tolist() == wanted_scores.tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_scores_of_unit_vectors(dtype: torch.dtype) -> None:
    """Real numbers: within float32's rounding of float64 over the same stored codes, with the largest k."""
    slab = Slab(1, [300, 20, 90], dim=96, dtype=dtype)
    random = torch.Generator().manual_seed(2)
    vectors = torch.nn.functional.normalize(torch.randn(slab.pages.vectors.shape, generator=random), dim=-1)
    pages = Pages(vectors.to(dtype).to(DEVICE), slab.pages.ids, slab.pages.lengths)
    queries = torch.nn.functional.normalize(torch.randn(2, 96, generator=random), dim=-1).to(DEVICE)
    work = slab.work([[0, 1, 2], [2]])
    scores, ids = page_scan(queries, pages, work, MAX_K)
    wanted_scores, wanted_ids = page_scan_reference(queries, pages, work, MAX_K)
    torch.testing.assert_close(scores.double(), wanted_scores, atol=1e-6, rtol=0)
    assert (ids == -1).tolist() == (wanted_ids == -1).tolist()
    for got, wanted in zip(ids.tolist(), wanted_ids.tolist(), strict=True):
        assert len(set(got) - set(wanted)) <= 1, "only the last may fall to the other side of a rounding"


def test_the_cache_around_it_changes_nothing() -> None:
    """The same bits with other lists resident, other queries beside it and its pages elsewhere in the slab."""
    slab = Slab(3, [100, 70, 33], dim=24, dtype=torch.float16)
    noisy = torch.randn(slab.pages.vectors.shape, generator=slab.random).half().to(DEVICE)
    pages = Pages(noisy, slab.pages.ids, slab.pages.lengths)
    queries = torch.randn(3, 24, generator=slab.random).to(DEVICE)
    first = page_scan(queries, pages, slab.work([[1, 0], [2], [0]]), 10)
    second = page_scan(queries[:1], pages, slab.work([[1, 0]], {0: slab.resident[0], 1: slab.resident[1]}), 10)
    shuffled = torch.randperm(len(noisy), generator=slab.random)
    place = {int(old): new for new, old in enumerate(shuffled.tolist())}
    at = shuffled.to(DEVICE)
    moved = Pages(noisy[at], pages.ids[at], pages.lengths[at])
    resident = {number: [place[page] for page in held] for number, held in slab.resident.items()}
    third = page_scan(queries[:1], moved, slab.work([[0, 1]], resident), 10)
    for scores, ids in (second, third):
        assert torch.equal(scores[0], first[0][0])
        assert torch.equal(ids[0], first[1][0])


def test_nothing_to_scan() -> None:
    slab = Slab(4, [5], dtype=torch.float32)
    scores, ids = page_scan(slab.queries(2), slab.pages, slab.work([[3], [-1]]), 4)
    assert torch.isinf(scores).all()
    assert ids.tolist() == [[-1] * 4] * 2


def test_a_vector_that_is_no_number_is_not_found() -> None:
    slab = Slab(5, [40], dim=4, dtype=torch.float32)
    slab.pages.vectors[slab.resident[0][0], 3] = torch.nan
    slab.pages.ids[slab.resident[0][0], 3] = 10**12
    scores, ids = page_scan(slab.queries(1), slab.pages, slab.work([[0]]), 64)
    assert not torch.isnan(scores).any()
    assert 10**12 not in ids[0].tolist()


def test_a_slab_beyond_32_bits() -> None:
    """Pages 2**30 bytes apart: the third begins where 32 bits end. Only what is written takes memory."""
    slab = Slab(6, [90], dim=8, dtype=torch.int8)
    stride = 2**30
    count = len(slab.pages.vectors)
    far = torch.empty(count * stride, dtype=torch.int8, device=DEVICE).as_strided((count, 32, 8), (stride, 8, 1))
    for page in slab.resident[0]:
        far[page] = slab.pages.vectors[page]
    queries, work = slab.queries(1), slab.work([[0]])
    near = page_scan(queries, slab.pages, work, 20)
    again = page_scan(queries, Pages(far, slab.pages.ids, slab.pages.lengths, slab.pages.scales), work, 20)
    assert torch.equal(near[0], again[0])
    assert torch.equal(near[1], again[1])

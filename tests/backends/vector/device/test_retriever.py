"""An index opened with a device: the same results, and advice that moves its lists."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from flowc.backends.embed.hashing import HashingEmbedder
from flowc.backends.vector import Passage, build_index, open_index
from flowc.backends.vector.device.retriever import DeviceRetriever
from flowc.backends.vector.device.simulated import SimulatedDevice
from flowc.commands.doctor import _index
from flowc.config import load_config
from flowc.engine import BoundResources
from flowc.ir.errors import ResourceError
from flowc.ir.values import Docs
from flowc.passes.cost import PASS_RATES
from flowc.runtime.protocols import ClusterCache, ElasticRetriever, SearchRequest

Opened = Callable[[], DeviceRetriever]


@pytest.fixture
def opened(
    passages: list[Passage], embedder: HashingEmbedder, tmp_path: Path
) -> Iterator[Callable[..., DeviceRetriever]]:
    """Opens an index of `passages` (16 lists, 3 probed) with a simulated device."""
    path = tmp_path / "index"
    build_index(passages, embedder, path, nlist=16, nprobe=3)
    made: list[DeviceRetriever] = []

    def open_it(device_bytes: int = 1 << 20) -> DeviceRetriever:
        device = SimulatedDevice(launch_s=0.0)
        found = open_index(path, embedder, device=device, device_bytes=device_bytes)
        assert isinstance(found, DeviceRetriever)
        made.append(found)
        return found

    yield open_it
    for retriever in made:
        retriever.close()


def until(what: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not what():
        assert time.monotonic() < end, "it does not come"
        time.sleep(0.001)


def is_idle(cached: DeviceRetriever) -> bool:
    with cached.cache._lock:
        return not (cached.cache._changed or cached.cache._queue or cached.cache._flying)


def docs(retriever: ElasticRetriever, texts: list[str]) -> list[list[tuple[int, float]]]:  # type: ignore[type-arg]
    out = []
    for found in retriever.search([SearchRequest(text, 5) for text in texts]):
        assert isinstance(found, Docs)
        out.append([(doc.id, doc.score) for doc in found])
    return out


def test_searches_give_what_they_give_without_a_device(
    opened: Opened, passages: list[Passage], embedder: HashingEmbedder
) -> None:
    cached = opened()
    plain = open_index(cached.path, embedder)
    assert isinstance(cached, ElasticRetriever)
    assert isinstance(cached, ClusterCache)
    assert not isinstance(plain, ClusterCache)
    texts = [p.text[:60] for p in passages[:40]]
    for _ in range(3):
        assert docs(cached, texts) == docs(plain, texts)
        until(lambda: is_idle(cached))
    assert cached.cache.stats().hits > 0
    plain.close()


def test_advice_brings_lists_and_release_lets_them_go(opened: Opened, passages: list[Passage]) -> None:
    cached = opened()
    text = passages[3].text[:80]
    cached.predict("a", text, 1.0)
    until(lambda: len(cached.cache.resident()) > 0)
    until(lambda: is_idle(cached))
    docs(cached, [text])
    stats = cached.cache.stats()
    assert (stats.hits, stats.misses) == (3, 0)
    assert cached.value_per_byte() >= 0
    cached.release("a")
    assert not cached.cache._predictions
    assert cached.set_bound(0) == 0
    assert len(cached.cache.resident()) == 0


def test_its_rates_are_what_the_cost_model_asks_for(opened: Opened, passages: list[Passage]) -> None:
    cached = opened()
    assert "device_scan_bytes_per_s" not in cached.rates()
    docs(cached, [p.text[:60] for p in passages[:20]])
    until(lambda: len(cached.cache.resident()) > 0)
    rates = cached.rates()
    assert set(rates) <= set(PASS_RATES)
    assert min(rates.values()) > 0
    assert rates["probe_bytes"] == pytest.approx(rates["index_bytes"] * 3 / 16)
    assert rates["index_bytes"] == len(passages) * 64 * 2


def test_a_search_before_is_mixed_into_the_prediction(
    opened: Opened, passages: list[Passage], embedder: HashingEmbedder
) -> None:
    cached = opened()
    text = passages[7].text[:40]
    before = cached._plan([text])[0]
    found = docs(cached, [text])[0]
    after = cached._plan([text])[0]
    mixed = embedder.embed([text])[0] + cached.vectors([i for i, _ in found]).mean(axis=0)
    mixed = np.ascontiguousarray(mixed / np.linalg.norm(mixed))
    assert before is not None
    assert after is not None
    assert after[0].tolist() == cached.lists.nearest_lists(mixed, 12, 0).tolist() != before[0].tolist()


def test_updates_and_compaction_go_on_beside_the_device(
    opened: Opened, passages: list[Passage], embedder: HashingEmbedder
) -> None:
    cached = opened()
    texts = [p.text[:60] for p in passages[:10]]
    docs(cached, texts)
    until(lambda: is_idle(cached))
    cached.add([Passage(p.text + " once more") for p in passages[:10]])
    cached.delete([0, 3])
    hits = cached.cache.stats().hits
    with_updates = docs(cached, texts)
    assert cached.cache.stats().hits > hits
    cached.save()
    plain = open_index(cached.path, embedder)
    assert with_updates == docs(plain, texts)
    plain.close()
    first = cached.cache
    cached.compact().result()
    assert docs(cached, texts) == with_updates
    assert cached.cache is not first
    until(lambda: is_idle(cached))
    assert docs(cached, texts) == with_updates
    assert cached.cache.stats().hits > 0


def test_what_a_device_cannot_hold_is_said(
    built: Callable[[str], Path], passages: list[Passage], embedder: HashingEmbedder
) -> None:
    with pytest.raises(ResourceError, match="index of words") as error:
        open_index(built("bm25"), device="simulated")
    assert error.value.code == "F063"


def test_after_the_end_a_search_says_so_and_advice_is_silent(opened: Opened) -> None:
    cached = opened()
    cached.close()
    cached.predict("a", "text", 1.0)
    cached.follow("a", "and a few more words than five of them")
    cached.release("a")
    found = cached.search([SearchRequest("text", 3)])
    assert isinstance(found[0], ResourceError)


def test_the_configuration_says_it_and_the_doctor_shows_it(built: Callable[[str], Path]) -> None:
    section = {"path": str(built("ivf")), "device": "simulated", "device_bytes": 100_000}
    config = load_config(built("ivf"), environ={}, flags={"index": {"docs": section}})
    resources = BoundResources(config)
    found = resources.index("docs")
    assert isinstance(found, DeviceRetriever)
    assert found.cache.bound_bytes <= 100_000
    resources.close()
    for deep in (False, True):
        assert "clusters on simulated, at most 100,000 bytes" in _index(config.index["docs"], deep)

"""Vectors on the disk: the same bits as without, each distinct text computed once, and never another model's."""

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowc.backends.embed import open_embedder
from flowc.backends.embed.cached import CachedEmbedder
from flowc.backends.embed.hashing import HashingEmbedder
from flowc.backends.vector import build_index
from flowc.ir.errors import ResourceError
from flowc.runtime.protocols import Embedder


class Counting(HashingEmbedder):
    """Knows what it was asked to compute."""

    def __init__(self, dim: int = 16) -> None:
        super().__init__(dim)
        self.asked: list[str] = []

    def embed_many(self, texts: Sequence[str], progress: Any = None) -> Any:
        self.asked += texts
        return super().embed_many(texts, progress)


@given(st.lists(st.lists(st.sampled_from(["a", "b b", "", "c\ud800", "d" * 99]), max_size=9), max_size=4))
def test_vectors_are_those_of_the_embedder_and_computed_once(
    tmp_path_factory: pytest.TempPathFactory, calls: list[list[str]]
) -> None:
    inner = Counting()
    cached = CachedEmbedder(inner, tmp_path_factory.mktemp("cache"))
    assert isinstance(cached, Embedder)
    told: list[tuple[int, int]] = []
    for texts in calls:
        got = cached.embed_many(texts, lambda done, total: told.append((done, total)))
        assert np.array_equal(got, HashingEmbedder(16).embed(texts))
        assert got.shape == (len(texts), 16)
        if texts:
            assert told[-1] == (len(texts), len(texts))
    assert len(inner.asked) == len(set(inner.asked)) == len({t for texts in calls for t in texts})


def test_a_second_build_embeds_only_what_is_new(tmp_path: Path) -> None:
    texts = [f"passage {n}" for n in range(50)]
    first, second = Counting(), Counting()
    whole = build_index(texts, CachedEmbedder(first, tmp_path / "cache"), tmp_path / "one")
    build_index([*texts, "one more"], CachedEmbedder(second, tmp_path / "cache"), tmp_path / "two")
    assert len(first.asked) == 50
    assert second.asked == ["one more"]
    plain = build_index(texts, HashingEmbedder(16), tmp_path / "three")
    assert plain.generation == whole.generation  # the same bytes


def test_another_model_has_another_file(tmp_path: Path) -> None:
    small, large = (CachedEmbedder(HashingEmbedder(dim), tmp_path) for dim in (16, 32))
    assert small.embed_many(["x"]).shape == (1, 16)
    assert large.embed_many(["x"]).shape == (1, 32)
    assert small.path != large.path
    assert (small.hits, large.hits) == (0, 0)
    assert open_embedder("hashing:16", cache=tmp_path).embed_many(["x"]).shape == (1, 16)


def test_many_writers_at_once(tmp_path: Path) -> None:
    texts = [f"text {n}" for n in range(200)]
    wanted = HashingEmbedder(16).embed(texts)
    errors: list[BaseException] = []

    def work(start: int) -> None:
        try:
            mine = CachedEmbedder(HashingEmbedder(16), tmp_path)
            for n in range(start, start + 100, 20):
                assert np.array_equal(mine.embed_many(texts[n : n + 60]), wanted[n : n + 60])
        except BaseException as e:
            errors.append(e)

    threads = [threading.Thread(target=work, args=(start,)) for start in (0, 30, 60, 90)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


def test_a_file_that_is_no_cache_is_named(tmp_path: Path) -> None:
    cached = CachedEmbedder(HashingEmbedder(16), tmp_path / "folder")
    cached.embed_many(["x"])
    for file in cached.path.parent.iterdir():
        file.unlink()
    cached.path.write_bytes(b"not a database" * 100)
    with pytest.raises(ResourceError, match="cannot be used") as caught:
        cached.embed_many(["x"])
    assert caught.value.code == "F060"
    assert "delete it" in (caught.value.hint or "")
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="cannot be used"):
        CachedEmbedder(HashingEmbedder(16), tmp_path / "file").embed_many(["x"])

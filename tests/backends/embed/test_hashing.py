"""The model-free embedder: the same bits everywhere, and words in common bring texts together."""

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowc.backends.embed import open_embedder
from flowc.backends.embed.hashing import HashingEmbedder
from flowc.ir.errors import ConfigError
from flowc.runtime.protocols import Embedder


@given(st.lists(st.text(max_size=40), max_size=5), st.sampled_from([8, 64, 384]))
def test_vectors_are_unit_and_functions_of_their_text(texts: list[str], dim: int) -> None:
    embedder = HashingEmbedder(dim)
    vectors = embedder.embed(texts)
    assert vectors.shape == (len(texts), dim)
    assert vectors.dtype == np.float32
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    assert np.array_equal(vectors, embedder.embed_many(texts))
    fresh = HashingEmbedder(dim)
    for text, vector in zip(reversed(texts), vectors[::-1], strict=True):
        assert np.array_equal(fresh.embed([text])[0], vector)


def test_words_in_common_bring_texts_together() -> None:
    embedder = open_embedder("hashing")
    assert isinstance(embedder, Embedder)
    query, near, far, plural, same = embedder.embed(
        [
            "How do I sort a list?",
            "Use sorted() to sort any list of items",
            "Sockets connect two hosts",
            "sort lists",
            "SORT list",
        ]
    )
    assert query @ near > 0.4 > abs(query @ far) + 0.2
    assert np.array_equal(plural, same)


def test_the_bits_do_not_depend_on_the_process() -> None:
    code = (
        "from flowc.backends.embed.hashing import HashingEmbedder as H;import hashlib;"
        "print(hashlib.sha256(H(384).embed(['sort a list', '', 'naïve']).tobytes()).hexdigest())"
    )
    path = ":".join(p for p in sys.path if p)
    seen = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONPATH": path, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
        ).stdout
        for seed in ("1", "2")
    }
    # A changed value here means that every index made with this embedder must be built again: change the fingerprint.
    assert seen == {"694b7f63b2171a1a6ac1e6142e0301a4d50b6a89cb31320b93722ee0ddd0bebc\n"}


def test_names_and_options() -> None:
    embedder = open_embedder("hashing:64", seed=3)
    assert (embedder.dim, embedder.spec, embedder.fingerprint) == (64, "hashing:64", "hashing-1/64/seed3")
    assert HashingEmbedder(64).fingerprint != embedder.fingerprint
    wrong: dict[str, Any]
    for wrong in ({"dim": 7}, {"dim": 12}, {"dim": 8192}, {"seed": -1}, {"colour": "red"}):
        with pytest.raises(ConfigError) as caught:
            open_embedder("hashing", **wrong)
        assert caught.value.code == "F050"
    with pytest.raises(ConfigError, match="number after the colon"):
        open_embedder("hashing:big")

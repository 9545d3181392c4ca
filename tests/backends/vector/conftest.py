"""A few hundred real passages, and indexes of them that are built once."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from flowc.backends.vector import Passage, build_index, read_jsonl

if TYPE_CHECKING:
    from flowc.backends.embed.hashing import HashingEmbedder

# Reading documents takes the standard library alone; everything else here takes what [local] installs, as in CI.
if importlib.util.find_spec("faiss") is None and not os.environ.get("CI"):
    collect_ignore = [
        "test_bm25.py",
        "test_bundle.py",
        "test_calibrate.py",
        "test_confidence.py",
        "test_ivf.py",
        "test_scan.py",
        "test_store.py",
    ]


@pytest.fixture(scope="session")
def passages(root: Path) -> list[Passage]:
    return read_jsonl(root / "data/pydocs/passages.jsonl.gz", strict=True).passages[::40]


@pytest.fixture(scope="session")
def embedder() -> HashingEmbedder:
    from flowc.backends.embed.hashing import HashingEmbedder

    return HashingEmbedder(64)


@pytest.fixture(scope="session")
def built(
    passages: list[Passage], embedder: HashingEmbedder, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """The folder of an index of `passages`: "flat", "ivf" (16 lists, 3 probed), "fp32" (the same) or "bm25"."""
    made: dict[str, Path] = {}

    def build(kind: str) -> Path:
        if kind not in made:
            out = tmp_path_factory.mktemp("index") / kind
            if kind == "ivf":
                build_index(passages, embedder, out, nlist=16, nprobe=3)
            elif kind == "fp32":
                build_index(passages, embedder, out, nlist=16, nprobe=3, codec="fp32")
            elif kind == "bm25":
                build_index(passages, None, out)
            else:
                build_index(passages, embedder, out)
            made[kind] = out
        return made[kind]

    return build

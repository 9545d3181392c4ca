"""Embedders: text to unit vectors. Importing this package loads no model and no numpy."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowc.ir.errors import ConfigError, ResourceError

if TYPE_CHECKING:
    from .cached import CachedEmbedder
    from .hashing import HashingEmbedder
    from .sentence import SentenceEmbedder

__all__ = ["open_embedder"]


def open_embedder(
    name_or_path: str | os.PathLike[str] = "minilm", *, cache: str | os.PathLike[str] | None = None, **options: Any
) -> SentenceEmbedder | HashingEmbedder | CachedEmbedder:
    """The embedder called "minilm" or "hashing", or the sentence encoder in a local directory.

    In the folder `cache` vectors for indexes are kept by the content of their text, for later builds. `options` go to
    `SentenceEmbedder` or `HashingEmbedder`. Weights are read on first use. Raises `ConfigError` for an option that the
    embedder does not have, `ResourceError` for a model that is not there.
    """
    spec = os.fspath(name_or_path)
    if cache is not None:
        inner = open_embedder(spec, **options)
        from .cached import CachedEmbedder

        return CachedEmbedder(inner, cache)
    try:
        if spec == "minilm":
            from .minilm import MiniLMEmbedder

            return MiniLMEmbedder(**options)
        if spec == "hashing" or spec.startswith("hashing:"):
            from .hashing import HashingEmbedder

            if spec != "hashing":
                options = {"dim": _dim(spec), **options}
            return HashingEmbedder(**options)
        if not Path(spec).is_dir() and os.sep not in spec:
            raise ResourceError(
                f"no embedder is called {spec!r}",
                code="F064",
                hint='"minilm", "hashing", or the path of a directory with a sentence encoder',
            )
        from .sentence import SentenceEmbedder

        return SentenceEmbedder(spec, **options)
    except TypeError as e:
        raise ConfigError(f"embedder {spec!r}: {e}", hint="see flowc.backends.embed.sentence") from e
    except ImportError as e:
        raise ResourceError(
            f"embedder {spec!r} needs the package {e.name}", code="F060", hint="pip install 'flowc[local]'"
        ) from e


def _dim(spec: str) -> int:
    try:
        return int(spec.partition(":")[2])
    except ValueError:
        raise ConfigError(f"embedder {spec!r}: expected a number after the colon", hint='as in "hashing:384"') from None

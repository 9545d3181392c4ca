"""Document sets that come with flowc: passages, vectors made beforehand, and questions with known answers.

A set is a folder with manifest.json (format "flowc-passages/1": sizes and SHA-256 of the other files, where the text
comes from, the fingerprint of the embedder behind the vectors), passages.jsonl.gz, and, where it has them,
vectors.fp16.npy and queries.jsonl.gz.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from flowc.backends.embed import open_embedder
from flowc.ir.errors import ResourceError

from .documents import Passage, read_jsonl

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from flowc.runtime.protocols import Embedder

    from .store import Manifest

__all__ = ["Bundle", "Query", "find_bundle", "index_bundle", "read_bundle"]

FORMAT = "flowc-passages/1"


@dataclass(frozen=True, slots=True)
class Query:
    """A question and the ids of the passages that answer it, any one of which is right."""

    kind: str
    text: str
    relevant: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Bundle:
    """A document set. `vectors`, of shape (len(passages), dim), belong to the embedder with that fingerprint."""

    path: Path
    name: str
    passages: tuple[Passage, ...]
    vectors: npt.NDArray[np.float16] | None
    embedder: str
    fingerprint: str
    about: dict[str, Any]

    def queries(self, kind: str | None = None) -> tuple[Query, ...]:
        """The set's questions, of one kind or all, in the order of the file; () if it has none."""
        file = self.path / "queries.jsonl.gz"
        if not file.exists():
            return ()
        _check(file, self.about)
        with gzip.open(file, "rt", encoding="utf-8") as stream:
            rows = [json.loads(line) for line in stream]
        found = (Query(r["kind"], r["text"], tuple(r["relevant"])) for r in rows)
        return tuple(q for q in found if kind is None or q.kind == kind)


def find_bundle(name: str = "pydocs") -> Path:
    """The folder of the document set called `name`: in $FLOWC_DATA, or beside flowc's own folders.

    Raises `ResourceError` F061 if it is not there.
    """
    places = [Path(p) for p in (os.environ.get("FLOWC_DATA", ""),) if p]
    places.append(Path(__file__).resolve().parents[2] / "data")
    for place in places:
        if (place / name / "manifest.json").exists():
            return place / name
    raise ResourceError(
        f"the document set {name!r} is not here",
        code="F061",
        hint="it is part of flowc's repository (data/); set FLOWC_DATA to the folder that holds it",
    )


def read_bundle(path: str | os.PathLike[str]) -> Bundle:
    """The document set in a folder, after its files were found to match their checksums.

    Raises `ResourceError`: F061 if it is not there, F062 if it is damaged, F060 without numpy for its vectors.
    """
    root = Path(path)
    try:
        about = json.loads((root / "manifest.json").read_text("utf-8"))
        if about["format"] != FORMAT:
            raise ValueError(f"format {about['format']!r}")
        files = about["files"]
        made = about["vectors"] or {}
        name, count = str(about["name"]), int(about["passages"])
    except FileNotFoundError:
        raise ResourceError(f"no document set at {root}", code="F061", hint="it has no manifest.json") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise _damaged(root, f"manifest.json cannot be read ({type(e).__name__}: {e})") from e
    _check(root / "passages.jsonl.gz", about)
    passages = tuple(read_jsonl(root / "passages.jsonl.gz", strict=True).passages)
    vectors = None
    if "vectors.fp16.npy" in files and made:
        _check(root / "vectors.fp16.npy", about)
        try:
            import numpy as np
        except ImportError as e:
            hint = "pip install 'flowc[local]'"
            raise ResourceError(f"the package {e.name} is not installed", code="F060", hint=hint) from e
        vectors = np.load(root / "vectors.fp16.npy", mmap_mode="r", allow_pickle=False)
        if vectors.shape != (count, made.get("dim")):
            raise _damaged(root, f"{vectors.shape} vectors for {count} passages")
    if len(passages) != count:
        raise _damaged(root, f"{len(passages)} passages instead of {count}")
    return Bundle(root, name, passages, vectors, made.get("embedder", ""), made.get("fingerprint", ""), about)


def index_bundle(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    embedder: Embedder | None = None,
    kind: Literal["auto", "flat", "ivf", "hnsw", "bm25", "hybrid"] = "auto",
    nlist: int | None = None,
    nprobe: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Manifest:
    """The manifest of an index of a document set, built in `out`: in about a second where its vectors can be used.

    `source` is a set's name or folder. Without `embedder` the set's own is taken, if it is installed, and BM25 is built
    if it is not. Vectors of the set are used if the embedder's fingerprint is theirs, else the passages are embedded.
    """
    from . import build_index

    name = os.fspath(source)
    bundle = read_bundle(name if os.path.isdir(name) else find_bundle(name))
    if embedder is None and kind != "bm25" and bundle.embedder:
        with contextlib.suppress(ResourceError):
            embedder = open_embedder(bundle.embedder)
    vectors = None
    if embedder is not None and kind != "bm25" and bundle.vectors is not None:
        vectors = bundle.vectors if embedder.fingerprint == bundle.fingerprint else None
    return build_index(
        bundle.passages, embedder, out, kind=kind, nlist=nlist, nprobe=nprobe, vectors=vectors, progress=progress
    )


def _check(file: Path, about: dict[str, Any]) -> None:
    try:
        info = about["files"][file.name]
        with file.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
        if found != info["sha256"]:
            raise _damaged(file.parent, f"{file.name} does not match its checksum")
    except (OSError, KeyError, TypeError) as e:
        raise _damaged(file.parent, f"{file.name} cannot be read ({type(e).__name__}: {e})") from e


def _damaged(root: Path, what: str) -> ResourceError:
    return ResourceError(f"the document set at {root} is damaged: {what}", code="F062", hint="check it out again")

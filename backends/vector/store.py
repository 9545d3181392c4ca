"""What every index on disk has: a manifest, checksums, passages that are fetched one by one, and saves that are atomic.

    docs.index/
      manifest.json            what the index is, and size and SHA-256 of each file
      3f9a1c20b7de/            the files of one generation, named after their content
        passages.jsonl         one passage a line
        offsets.npy            int64 (count + 1): where each line starts
        ...                    what the kind of index adds

A save writes a new generation beside the old one and then replaces manifest.json: before that moment readers find the
old index whole, after it the new one, and a process killed at any time leaves one of the two. Readers that have the old
files mapped keep them. Nothing in an index depends on the clock, so the same input gives the same bytes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import io
import json
import mmap
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from flowc.ir.errors import ResourceError
from flowc.ir.values import Doc

from .columns import ColumnsBuilder
from .documents import Passage

__all__ = [
    "FORMAT",
    "KINDS",
    "EmbedderInfo",
    "FileInfo",
    "IndexWriter",
    "Manifest",
    "PassageStore",
    "WriteLock",
    "check_files",
    "damaged",
    "read_manifest",
    "stored",
]

KINDS = ("flat", "ivf", "hnsw", "bm25", "hybrid")
FORMAT = "flowc-index/2"
_FORMATS = ("flowc-index/1", FORMAT)  # the first knew no metadata, no updates, one metric and two codecs
_MANIFEST = "manifest.json"
_LOCK = ".lock"
_UPDATES = ("added.jsonl", "added.codes.npy", "added.clusters.npy", "deleted.npy")
_OURS = re.compile(r"[0-9a-f]{12}(-\d+)?|\.tmp-.*|\.lock|manifest\.json")
_REBUILD = "build the index again with `flowc index build`"


@dataclass(frozen=True, slots=True)
class FileInfo:
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class EmbedderInfo:
    """The embedder that made an index's vectors. `spec` is what `open_embedder` takes."""

    spec: str
    fingerprint: str
    dim: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """What an index is. `kind`: one of `KINDS`; `nlist`, `nprobe`, `codec` and `embedder` are for vectors.

    `count` passages are searched: of the `rows` in the main files and the `added` beside them, less the `deleted`. Ids
    are given in order, up to `next_id`, and never again. `calibration` says where searches of this index may stop
    early; empty for none, as in indexes of before it existed and in those that have changed since.
    """

    kind: str
    count: int
    metric: str
    generation: str = ""
    nlist: int = 0
    nprobe: int = 0
    codec: str = ""
    embedder: EmbedderInfo | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    reasons: tuple[str, ...] = ()
    calibration: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, FileInfo] = field(default_factory=dict)
    rows: int = -1  # -1: as many as `count`
    added: int = 0
    deleted: int = 0
    next_id: int = -1

    def __post_init__(self) -> None:
        if self.rows < 0:
            object.__setattr__(self, "rows", self.count)
        if self.next_id < 0:
            object.__setattr__(self, "next_id", self.rows + self.added)

    def to_json(self) -> str:
        row = {"format": FORMAT, **dataclasses.asdict(self)}
        return json.dumps(row, indent=2, ensure_ascii=False) + "\n"

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files.values())


def damaged(path: Path, what: str) -> ResourceError:
    """The error for an index whose files are not what was written."""
    return ResourceError(f"the index at {path} is damaged: {what}", code="F062", hint=_REBUILD)


def read_manifest(path: str | os.PathLike[str]) -> Manifest:
    """The manifest of the index at `path`, checked for form.

    Raises `ResourceError`: F061 if there is no index, F062 if the manifest is damaged or of a format that this release
    does not read.
    """
    root = Path(path)
    try:
        text = (root / _MANIFEST).read_text("utf-8")
    except FileNotFoundError:
        if not root.exists():
            raise ResourceError(
                f"no index at {root}", code="F061", hint=f"build one with `flowc index build DOCUMENTS -o {root}`"
            ) from None
        left = sorted(p.name for p in root.iterdir())
        unfinished = any(_OURS.fullmatch(name) for name in left)
        raise ResourceError(
            f"{root} is not an index: it has no manifest.json" + (" (a build did not finish)" if unfinished else ""),
            code="F061",
            hint=_REBUILD if unfinished else f"build one with `flowc index build {root} -o {root.name}.index`",
        ) from None
    except NotADirectoryError:
        raise ResourceError(
            f"{root} is a file, not an index", code="F061", hint="name the folder that `flowc index build` wrote"
        ) from None
    except (OSError, UnicodeDecodeError) as e:
        raise damaged(root, f"manifest.json cannot be read ({e})") from e
    try:
        row = json.loads(text)
        form = row.get("format")
    except (ValueError, AttributeError, RecursionError) as e:
        raise damaged(root, f"manifest.json is not a JSON object ({e})") from e
    if form not in _FORMATS:
        raise ResourceError(
            f"{root} is of format {form!r}; this release of flowc reads {FORMAT!r}",
            code="F062" if str(form).startswith("flowc-index/") else "F061",
            hint=_REBUILD,
        )
    try:
        return _manifest(row)
    except (KeyError, TypeError, ValueError) as e:
        raise damaged(root, f"manifest.json lacks or garbles a field ({type(e).__name__}: {e})") from e


def _manifest(row: dict[str, Any]) -> Manifest:
    def number(value: Any, least: int) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{value!r} is not a number from {least}")
        return value

    files = {
        str(name): FileInfo(number(info["size_bytes"], 0), str(info["sha256"])) for name, info in row["files"].items()
    }
    for name in (row["generation"], *files):
        if not re.fullmatch(r"[\w.-]+", name) or name.startswith("."):  # never a path out of the index
            raise ValueError(f"{name!r} is not a file name")
    calibration = dict(row.get("calibration", {}))
    for line in calibration.get("rows", ()):
        if not all(isinstance(line[name], (int, float)) for name in ("k", "nprobe", "eps", "gap")):
            raise TypeError("a row of the calibration holds something else than numbers")
    info = row["embedder"]
    embedder = EmbedderInfo(str(info["spec"]), str(info["fingerprint"]), number(info["dim"], 1)) if info else None
    vectors = row["kind"] != "bm25"
    if row["kind"] not in KINDS:
        raise ValueError(f"unknown kind {row['kind']!r}")
    if vectors and embedder is None:
        raise ValueError("no embedder")
    count = number(row["count"], 0)
    rows, added, deleted = (number(row.get(n, d), 0) for n, d in (("rows", count), ("added", 0), ("deleted", 0)))
    if rows + added - deleted != count:
        raise ValueError(f"{rows} rows, {added} added and {deleted} deleted do not make {count}")
    return Manifest(
        kind=str(row["kind"]),
        count=count,
        metric=str(row["metric"]),
        generation=str(row["generation"]),
        nlist=number(row["nlist"], 1 if vectors else 0),
        nprobe=number(row["nprobe"], 1 if vectors else 0),
        codec=str(row["codec"]),
        embedder=embedder,
        settings=dict(row["settings"]),
        reasons=tuple(str(r) for r in row["reasons"]),
        calibration=calibration,
        files=files,
        rows=rows,
        added=added,
        deleted=deleted,
        next_id=number(row.get("next_id", rows + added), rows + added),
    )


def check_files(path: Path, manifest: Manifest, *, verify: bool) -> Path:
    """The folder of the index's files, after their sizes and (`verify`) their SHA-256 were found as written."""
    folder = path / manifest.generation
    for name, info in manifest.files.items():
        file = folder / name
        try:
            size = file.stat().st_size
        except FileNotFoundError:
            raise damaged(path, f"{name} is missing") from None
        if size != info.size_bytes:
            raise damaged(path, f"{name} has {size:,} bytes instead of {info.size_bytes:,}")
        if verify:
            with file.open("rb") as stream:
                found = hashlib.file_digest(stream, "sha256").hexdigest()
            if found != info.sha256:
                raise damaged(path, f"{name} does not match its checksum")
    return folder


# ------------------------------------------------------------------------------------------------ reading passages
class PassageStore:
    """The passages of an index by id: main ones from a mapped file, those added since in memory.

    Passages are only ever appended, so searches that know of fewer are not disturbed. Safe to use from several threads.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self._path = path
        folder = path / manifest.generation
        self._map: mmap.mmap | None = None
        self._ids: npt.NDArray[np.int64] | None = None
        self.count = manifest.rows
        self.first = manifest.next_id - manifest.added  # the id of the first passage that was added
        self.added: list[dict[str, Any]] = []
        try:
            self._offsets = np.load(folder / "offsets.npy", mmap_mode="r", allow_pickle=False)
            with (folder / "passages.jsonl").open("rb") as stream:
                if self.count:
                    self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
            if "ids.npy" in manifest.files:
                self._ids = np.load(folder / "ids.npy", mmap_mode="r", allow_pickle=False)
            if manifest.added:
                with (folder / "added.jsonl").open("rb") as stream:
                    self.added = [self._parsed(line, self.first + n) for n, line in enumerate(stream)]
        except (OSError, ValueError, EOFError) as e:
            self.close()
            raise damaged(path, f"its passages cannot be opened ({e})") from e
        good = self._offsets.dtype == np.int64 and self._offsets.shape == (self.count + 1,)
        if not good or int(self._offsets[-1]) != (0 if self._map is None else len(self._map)):
            self.close()
            raise damaged(path, "offsets.npy does not fit passages.jsonl")
        fits = self._ids is None or (self._ids.dtype == np.int64 and self._ids.shape == (self.count,))
        if not fits or len(self.added) != manifest.added:
            self.close()
            raise damaged(path, "the numbers of its passages do not fit each other")

    @property
    def ids(self) -> npt.NDArray[np.int64]:
        """The ids of the main passages, rising, in the order of their rows."""
        return np.arange(self.count) if self._ids is None else self._ids

    def doc(self, id: int, score: float = 0.0) -> Doc:
        """The passage with this id."""
        row = self.row(id)
        return Doc(id, row["text"], score, row.get("source", ""), row.get("title", ""))

    def passage(self, id: int) -> Passage:
        """The passage with this id, as it was given."""
        row = self.row(id)
        return Passage(**{name: row[name] for name in ("text", "title", "source", "key", "meta") if name in row})

    def row(self, id: int) -> dict[str, Any]:
        """The stored fields of a passage: text, and title, source, key and meta where it has them."""
        if id >= self.first and id - self.first < len(self.added):
            return self.added[id - self.first]
        at = id if self._ids is None else int(np.searchsorted(self._ids, id))
        if not 0 <= at < self.count or (self._ids is not None and int(self._ids[at]) != id):
            raise damaged(self._path, f"it names passage {id} of {self.count}")
        if self._map is None:
            raise ResourceError(f"the index at {self._path} was closed", code="F060", hint="open it again")
        return self._parsed(self._map[int(self._offsets[at]) : int(self._offsets[at + 1])], id)

    def _parsed(self, line: bytes, id: int) -> dict[str, Any]:
        try:
            row = json.loads(line)
            if not isinstance(row["text"], str):
                raise TypeError("text is not a string")
        except (ValueError, KeyError, TypeError) as e:
            raise damaged(self._path, f"passage {id} cannot be read ({e})") from e
        return dict(row)

    def close(self) -> None:
        if self._map is not None:
            self._map.close()
            self._map = None


def stored(passage: Passage) -> dict[str, Any]:
    """A passage as an index keeps it."""
    row: dict[str, Any] = {"text": passage.text}
    row |= {n: v for n in ("title", "source", "key") if (v := getattr(passage, n))}
    if passage.meta:
        row["meta"] = dict(passage.meta)
    return row


# ------------------------------------------------------------------------------------------------ writing
class _HashedFile(io.RawIOBase):
    """A file that knows its SHA-256; closing it puts it on the disk for good."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("xb")
        self._digest = hashlib.sha256()
        self._size = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._file.write(data)
        self._digest.update(data)
        size = memoryview(data).nbytes
        self._size += size
        return size

    def finish(self) -> FileInfo:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return FileInfo(self._size, self._digest.hexdigest())

    def abandon(self) -> None:
        with contextlib.suppress(OSError):
            self._file.close()


class WriteLock:
    """The right to write an index, for one writer at a time on this machine; readers need none.

    Raises `ResourceError` F060 if another process, or another writer of this one, has it. The system takes it back from
    a process that is killed.
    """

    def __init__(self, out: Path) -> None:
        self._handle: int | None = os.open(out / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.release()
            raise ResourceError(
                f"another process is writing the index at {out}", code="F060", hint="wait until it has finished"
            ) from None

    def release(self) -> None:
        """Gives it back."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


class IndexWriter:
    """Writes one generation of an index. Used as a context: what is not committed leaves no trace.

    `lock` is the index's, if the caller has it. Raises `ResourceError` F060 if `out` is something else than an index,
    if another process is writing it, or if the disk is full; in each case an index that was there is intact.
    """

    def __init__(self, out: str | os.PathLike[str], lock: WriteLock | None = None) -> None:
        self.out = Path(out)
        self._files: dict[str, FileInfo] = {}
        self._given = lock
        self._lock: WriteLock | None = None
        self._made_root = False
        self._folder = self.out

    def __enter__(self) -> IndexWriter:
        with self._os_errors():
            if self.out.is_dir():
                self._refuse_foreign()
            elif self.out.exists():
                raise ResourceError(f"{self.out} is a file", code="F060", hint="name a folder for the index")
            else:
                self.out.mkdir(parents=True)
                self._made_root = True
            self._lock = self._given or WriteLock(self.out)
            try:
                self._folder = Path(tempfile.mkdtemp(prefix=".tmp-", dir=self.out))
            except OSError:
                self._release()
                raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._lock is None:
            return
        shutil.rmtree(self._folder, ignore_errors=True)
        self._release()
        if self._made_root and not (self.out / _MANIFEST).exists():
            shutil.rmtree(self.out, ignore_errors=True)

    def _release(self) -> None:
        if self._lock is not None and self._given is None:
            self._lock.release()
        self._lock = None

    @contextlib.contextmanager
    def file(self, name: str) -> Iterator[IO[bytes]]:
        """A new file of the index, to be written from front to back."""
        with self._os_errors():
            raw = _HashedFile(self._folder / name)
            try:
                buffered = io.BufferedWriter(raw, 1 << 20)
                yield buffered
                buffered.flush()
                self._files[name] = raw.finish()
            finally:
                raw.abandon()

    def array(self, name: str, values: np.ndarray[Any, Any]) -> None:
        """A numpy array as a file of the index."""
        with self.file(name) as stream:
            np.lib.format.write_array(stream, values, allow_pickle=False)

    def rows(self, name: str, rows: Iterable[Mapping[str, Any]]) -> list[int]:
        """Objects, one a line; returns where each line starts, and where the last one ends."""
        offsets = [0]
        with self.file(name) as stream:
            for row in rows:
                line = json.dumps(row, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
                stream.write(line)
                offsets.append(offsets[-1] + len(line))
        return offsets

    def passages(self, passages: Iterable[Passage], ids: npt.NDArray[np.int64] | None = None) -> int:
        """The passages, where they start and what they can be filtered by; returns how many. `ids`: not 0, 1, 2, ..."""
        columns = ColumnsBuilder()

        def rows() -> Iterator[dict[str, Any]]:
            for passage in passages:
                row = stored(passage)
                columns.add(row)
                yield row

        offsets = self.rows("passages.jsonl", rows())
        self.array("offsets.npy", np.array(offsets, dtype=np.int64))
        if ids is not None:
            self.array("ids.npy", ids)
        if columns.fields:
            with self.file("fields.json") as stream:
                stream.write(json.dumps(columns.values(), ensure_ascii=False).encode("utf-8", "replace"))
            self.array("fields.npy", columns.codes())
        return len(offsets) - 1

    def keep(self, path: Path, manifest: Manifest) -> None:
        """Takes over the files of a generation that an update leaves as they are: by a link, not by a copy."""
        with self._os_errors():
            for name, info in manifest.files.items():
                if name in _UPDATES:
                    continue
                source, target = path / manifest.generation / name, self._folder / name
                try:
                    os.link(source, target)
                except OSError as e:
                    if e.errno in (errno.ENOENT, errno.ENOSPC, errno.EDQUOT):
                        raise
                    shutil.copyfile(source, target)  # a file system without links
                self._files[name] = info

    def commit(self, manifest: Manifest) -> Manifest:
        """The manifest as saved. After this the new index is the index, on disk, whatever happens next."""
        with self._os_errors():
            files = dict(sorted(self._files.items()))
            content = json.dumps({name: info.sha256 for name, info in files.items()}).encode()
            generation = hashlib.sha256(content).hexdigest()[:12]
            _sync(self._folder)
            generation = self._place(generation, files)
            manifest = dataclasses.replace(manifest, generation=generation, files=files)
            waiting = self.out / f".tmp-{_MANIFEST}"
            with waiting.open("wb") as stream:
                stream.write(manifest.to_json().encode())
                stream.flush()
                os.fsync(stream.fileno())
            _sync(self.out)
            os.replace(waiting, self.out / _MANIFEST)
            _sync(self.out)
        self._clean(generation)
        return manifest

    def _place(self, generation: str, files: Mapping[str, FileInfo]) -> str:
        """Gives the new files their name, or finds the same ones there already and takes those."""
        for name in (generation, *(f"{generation}-{n}" for n in range(1, 1000))):
            if not (self.out / name).exists():
                os.rename(self._folder, self.out / name)
                return name
            whole = Manifest("", 0, "", name, files=files)
            with contextlib.suppress(ResourceError):
                check_files(self.out, whole, verify=True)
                return name
        raise OSError(errno.EEXIST, "a thousand damaged copies are in the way")

    def _clean(self, generation: str) -> None:
        for entry in self.out.iterdir():
            if entry.name not in (generation, _MANIFEST, _LOCK) and _OURS.fullmatch(entry.name):
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry, ignore_errors=True)
                else:
                    entry.unlink(missing_ok=True)

    def _refuse_foreign(self) -> None:
        hint = "name a folder that does not exist yet, is empty, or holds an index"
        foreign = sorted(p.name for p in self.out.iterdir() if not _OURS.fullmatch(p.name))
        if foreign:
            raise ResourceError(
                f"{self.out} holds other files ({', '.join(foreign[:3])}{', ...' if len(foreign) > 3 else ''})",
                code="F060",
                hint=hint,
            )
        with contextlib.suppress(OSError, ValueError, AttributeError):
            form = str(json.loads((self.out / _MANIFEST).read_text("utf-8")).get("format"))
            if not form.startswith("flowc-index/"):
                raise ResourceError(f"{self.out} holds something else ({form})", code="F060", hint=hint)

    @contextlib.contextmanager
    def _os_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as e:
            full = e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            old = (self.out / _MANIFEST).exists()
            raise ResourceError(
                f"the index at {self.out} cannot be written: {e.strerror or e}",
                code="F060",
                hint=("free some space, or build elsewhere" if full else "check the folder and its permissions")
                + ("; the index that was there is unchanged" if old else ""),
            ) from e


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

"""`flowc index`: builds, describes, searches and updates retrieval indexes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from flowc.config import load_config

from .console import INDEXES, Failed, UsageError, emit, emit_json, is_terminal, many, note, show_error, table

app = typer.Typer(
    help="Build, describe, search and update retrieval indexes.", no_args_is_help=True, rich_markup_mode=None
)
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
Filter = Annotated[
    str | None,
    typer.Option(
        "--where", help='Conditions on metadata as JSON: {"lang": "en", "year": {">=": 2020}}.', metavar="JSON"
    ),
]
Where = Annotated[str, typer.Argument(help="An index folder, or the name of one in flowc.toml.", metavar="INDEX")]


class Kind(StrEnum):
    auto, flat, ivf, hnsw, bm25, hybrid = "auto", "flat", "ivf", "hnsw", "bm25", "hybrid"


class Codec(StrEnum):
    fp16, fp32, sq8 = "fp16", "fp32", "sq8"


@app.command("build")
def build(
    source: Annotated[
        str, typer.Argument(help="A folder of text, Markdown or HTML; a file; JSONL; or `pydocs`.", metavar="SOURCE")
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="The index folder to write.", metavar="DIR")],
    embedder: Annotated[
        str | None,
        typer.Option(
            "--embedder", help="minilm, hashing, a model folder, or a name in flowc.toml.", show_default="minilm"
        ),
    ] = None,
    kind: Annotated[Kind, typer.Option("--kind", help="bm25 needs no embedder.")] = Kind.auto,
    nlist: Annotated[
        int | None, typer.Option("--nlist", min=1, help="Clusters.", show_default="from the number of passages")
    ] = None,
    nprobe: Annotated[
        int | None, typer.Option("--nprobe", min=1, help="Clusters to probe.", show_default="measured")
    ] = None,
    codec: Annotated[Codec, typer.Option("--codec", help="How vectors are stored.")] = Codec.fp16,
    words: Annotated[
        int | None, typer.Option("--words", min=8, help="Words in a passage, about.", show_default="100")
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Stop at the first file or line that cannot be read.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Build an index of SOURCE. An index that is already at DIR stays whole until the new one is on the disk."""
    from flowc.backends.vector import build_index

    progress = _Steps()
    with progress:
        if not Path(source).exists() and (bundle := _bundle(source)) is not None:
            from flowc.backends.vector.bundle import index_bundle

            opened = _embedder(embedder) if embedder is not None and kind is not Kind.bm25 else None
            manifest = index_bundle(
                bundle, out, embedder=opened, kind=kind.value, nlist=nlist, nprobe=nprobe, progress=progress.step
            )
            errors: list[Any] = []
            files = 1
        else:
            from flowc.backends.vector import read_passages

            options = {} if words is None else {"words": words}
            reading = read_passages(source, strict=strict, **options)  # type: ignore[arg-type]
            errors, files = reading.errors, reading.files
            for error in errors:
                show_error(error)
            opened = None if kind is Kind.bm25 else _embedder(embedder)
            manifest = build_index(
                reading.passages,
                opened,
                out,
                kind=kind.value,
                nlist=nlist,
                nprobe=nprobe,
                codec=codec.value,
                progress=progress.step,
            )
    if as_json:
        emit_json(
            {
                "path": str(out),
                "kind": manifest.kind,
                "passages": manifest.count,
                "files": files,
                "size_bytes": manifest.size_bytes,
            }
            | {"nlist": manifest.nlist, "nprobe": manifest.nprobe, "reasons": list(manifest.reasons)}
            | {"errors": [str(e.message) for e in errors]}
        )
    else:
        size = _size(manifest.size_bytes)
        emit(f"{out}: {manifest.count} passages from {many(files, 'file')}, {manifest.kind}, {size}")
    for reason in manifest.reasons:
        note(f"  {reason}")
    if errors:
        unread = many(len(errors), "file or line", "files or lines")
        note(f"{unread} could not be read; all others are in the index")
        raise Failed


@app.command("info")
def info(
    index: Where,
    recall: Annotated[
        bool, typer.Option("--recall", help="Measure recall by nprobe against a scan of everything.")
    ] = False,
    k: Annotated[int, typer.Option("-k", min=1, help="Recall at how many.")] = 10,
    sample: Annotated[int, typer.Option("--sample", min=1, help="On excerpts of how many of its own passages.")] = 200,
    queries: Annotated[
        Path | None, typer.Option("--queries", help="On the lines of this file instead.", metavar="FILE")
    ] = None,
    as_json: Json = False,
) -> None:
    """Describe an index, after checking every file against its checksum."""
    from flowc.backends.vector import index_info

    asked = None
    if queries is not None:
        try:
            asked = [line for line in queries.read_text("utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as e:
            raise UsageError(f"{queries} cannot be read: {e}") from None
        if not asked:
            raise UsageError(f"{queries} holds no queries", hint="one a line")
    found = index_info(_path(index), recall=recall or asked is not None, k=k, sample=sample, queries=asked)
    if as_json:
        emit_json(found.as_dict())
        return
    rows: list[tuple[str, str]] = []
    for key, value in found.as_dict().items():
        if value in (None, "", 0, {}, (), []) or key in ("recall", "recall_s", "reasons"):
            continue
        shown = (
            _size(value)
            if key == "size_bytes"
            else ", ".join(map(str, value))
            if isinstance(value, list | tuple)
            else str(value)
        )
        rows.append((key, shown))
    rows += [("why", reason) for reason in found.reasons]
    times = found.recall_s or {}
    rows += [
        (f"recall@{found.recall_k}, nprobe {n}", f"{r:.3f}, {1e6 * times[n]:,.0f} us a query")
        for n, r in (found.recall or {}).items()
    ]
    table(rows, ("what", "value"))


@app.command("search")
def search(
    index: Where,
    query: Annotated[str, typer.Argument(help="What to look for.", metavar="QUERY")],
    k: Annotated[int, typer.Option("-k", min=1, help="How many passages.")] = 4,
    nprobe: Annotated[
        int | None, typer.Option("--nprobe", min=1, help="Clusters to probe.", show_default="the index's own")
    ] = None,
    where: Filter = None,
    embedder: Annotated[str | None, typer.Option("--embedder", help="Another embedder than the index names.")] = None,
    as_json: Json = False,
) -> None:
    """Search an index: score, source, title and text of the nearest passages, best first."""
    from flowc.backends.vector import open_index
    from flowc.runtime.protocols import SearchRequest

    from .values import to_json

    opened = open_index(_path(index), _embedder(embedder) if embedder is not None else None)
    try:
        (docs,) = opened.search([SearchRequest(query, k, nprobe, where=_conditions(where))])
    finally:
        opened.close()
    if isinstance(docs, Exception):
        raise docs
    if as_json:
        emit_json(to_json(docs))
        return
    for rank, doc in enumerate(docs, 1):
        emit(f"[{rank}] {doc.score:.3f}  {doc.source}  {doc.title}".rstrip())
        emit("    " + " ".join(doc.text.split()))


@app.command("add")
def add(
    index: Where,
    source: Annotated[
        str, typer.Argument(help="A folder of text, Markdown or HTML; a file; or JSONL.", metavar="SOURCE")
    ],
    upsert: Annotated[
        bool, typer.Option("--upsert", help="A passage takes the place of the one with its id, if there is one.")
    ] = False,
    embedder: Annotated[str | None, typer.Option("--embedder", help="The embedder, if not the one it names.")] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Stop at the first file or line that cannot be read.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Add the passages of SOURCE to an index. Those who search it meanwhile are not disturbed."""
    from flowc.backends.vector import read_passages

    reading = read_passages(source, strict=strict)
    for error in reading.errors:
        show_error(error)
    with _updating(index, embedder) as opened:
        ids = opened.upsert(reading.passages) if upsert else opened.add(reading.passages)
        manifest = opened.save()
    if as_json:
        emit_json(
            {"path": str(_path(index)), "added": len(ids), "first_id": ids[0] if ids else None}
            | {"passages": manifest.count, "errors": [str(e.message) for e in reading.errors]}
        )
    else:
        emit(f"{_path(index)}: {many(len(ids), 'passage')} added, {manifest.count} in all")
    if reading.errors:
        raise Failed


@app.command("delete")
def delete(
    index: Where,
    keys: Annotated[list[str] | None, typer.Option("--id", help="The id of a row of JSONL; may be repeated.")] = None,
    numbers: Annotated[
        list[int] | None, typer.Option("--number", help="The number of a passage, as search gives it; may be repeated.")
    ] = None,
    where: Filter = None,
    as_json: Json = False,
) -> None:
    """Delete passages from an index: by id, by number, or by their metadata, as `{"source": "old.html"}`."""
    if not keys and not numbers and where is None:
        raise UsageError("nothing says what to delete", hint="use --id, --number or --where")
    with _updating(index) as opened:
        count = opened.delete(numbers, keys=keys, where=_json_object(where))
        manifest = opened.save()
    if as_json:
        emit_json({"path": str(_path(index)), "deleted": count, "passages": manifest.count})
    else:
        emit(f"{_path(index)}: {many(count, 'passage')} deleted, {manifest.count} in all")


@app.command("compact")
def compact(index: Where, as_json: Json = False) -> None:
    """Write an index and its updates as one. Results stay what they are."""
    with _updating(index) as opened:
        manifest = opened.compact().result()
    if as_json:
        emit_json({"path": str(_path(index)), "passages": manifest.count, "size_bytes": manifest.size_bytes})
    else:
        emit(f"{_path(index)}: {many(manifest.count, 'passage')}, {_size(manifest.size_bytes)}")


@contextmanager
def _updating(index: str, embedder: str | None = None) -> Iterator[Any]:
    """The index, open for updates."""
    from flowc.backends.vector import open_index
    from flowc.ir.errors import ResourceError

    opened = open_index(_path(index), _embedder(embedder) if embedder is not None else None)
    try:
        if not hasattr(opened, "updates"):
            raise ResourceError(
                f"an index of kind {opened.manifest.kind} takes no updates",
                code="F063",
                hint="build it again with `flowc index build`",
            )
        yield opened
    finally:
        opened.close()


def _json_object(text: str | None) -> dict[str, Any] | None:
    if text is None:
        return None
    try:
        found = json.loads(text)
    except ValueError as e:
        raise UsageError(f"--where is not JSON: {e}", hint="""as in --where '{"lang": "en"}'""") from None
    if not isinstance(found, dict):
        raise UsageError("--where is not a JSON object", hint="""as in --where '{"lang": "en"}'""")
    return found


def _conditions(text: str | None) -> Any:
    from flowc.ir.options import as_where

    try:
        return as_where(_json_object(text))
    except ValueError as e:
        raise UsageError(str(e)) from None


class _Steps:
    """Progress of a build on stderr: a bar on a terminal, a line for each stage elsewhere."""

    def __init__(self) -> None:
        self._stage = ""
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> _Steps:
        import sys

        if is_terminal(sys.stderr):
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._bar.start()
        return self

    def step(self, stage: str, done: int, total: int) -> None:
        if self._bar is None:
            if stage != self._stage:
                note(f"{stage} ({total})")
        elif stage != self._stage:
            self._task = self._bar.add_task(stage, total=total, completed=done)
        else:
            self._bar.update(self._task, completed=done, total=total)
        self._stage = stage

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()


def _bundle(name: str) -> Path | None:
    from flowc.backends.vector.bundle import find_bundle
    from flowc.ir.errors import ResourceError

    if "/" in name or "\\" in name:
        return None
    try:
        return find_bundle(name)
    except ResourceError:
        return None


def _embedder(name: str | None) -> Any:
    from flowc.backends.embed import open_embedder

    config = load_config()
    chosen = name or ("default" if "default" in config.embedder else "minilm")
    if chosen in config.embedder:
        return open_embedder(config.embedder[chosen].spec, **config.embedder[chosen].arguments())
    return open_embedder(chosen)


def _path(text: str) -> Path:
    """The folder, or that of the index of this name: configured, or at its usual place."""
    folder = Path(text)
    if "/" in text or "\\" in text or (folder / "manifest.json").is_file():
        return folder
    config = load_config()
    if text in config.index:
        return config.index[text].path
    for place in (INDEXES / text, folder):
        if place.is_dir():
            return place
    known = ", ".join(config.index)
    raise UsageError(
        f"there is no index folder {text}, and no [index.{text}] in the configuration",
        hint=f"configured are {known}" if known else "build one with `flowc index build SOURCE -o DIR`",
    )


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1000
    return f"{count:.3g} TB"

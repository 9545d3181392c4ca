"""How this folder was made: the Python documentation as passages, questions with known answers, and vectors.

    apt-get download python3.11-doc && dpkg-deb -x python3.11-doc_*.deb pkg
    python data/pydocs/make.py text pkg/usr/share/doc --version 3.11.2-6+deb12u9
    python data/pydocs/make.py vectors

`text` writes passages.jsonl.gz, queries.jsonl.gz and LICENSE; `vectors` embeds the passages (about ten minutes on one
core) into vectors.fp16.npy; each brings manifest.json up to date. The same package and the same flowc give the same
bytes. Standard library and flowc only.

A query's own words are kept out of what it must find: a FAQ passage does not show its question, and tables of contents
are left out. "faq" queries are the FAQ's own questions, answered by any passage of their section; "index" queries are
entries of the general index, answered by the passage that holds the target of the link.
"""

from __future__ import annotations

import argparse
import collections
import gzip
import hashlib
import html
import io
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flowc.backends.vector.documents import Page, Passage, embedded_text, parse_html, read_jsonl, split_page

HERE = Path(__file__).resolve().parent
SKIP = re.compile(r"genindex|search|_|py-modindex|whatsnew/changelog|contents|copyright|download")


def pages(base: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(base.rglob("*.html")):
        rel = path.relative_to(base).as_posix()
        if not SKIP.match(rel):
            yield rel, path.read_text("utf-8")


def by_question(page: Page) -> Iterator[tuple[str, Page]]:
    """A FAQ page cut at its questions: (question, what stands under it without the question itself)."""
    question = ""
    held: list[Any] = []
    for block in page.blocks:
        if block.kind == "heading" and block.text.endswith("?"):
            yield question, Page(page.title, tuple(held))
            question = re.sub(r"^\d+(\.\d+)*\.\s+", "", block.text)
            held = []
        else:
            held.append(block)
    yield question, Page(page.title, tuple(held))


def make_text(base: Path) -> tuple[list[Passage], list[dict[str, Any]]]:
    rows: dict[tuple[str, str], int] = {}
    passages: list[Passage] = []
    anchors: dict[tuple[str, str], int] = {}
    queries: list[dict[str, Any]] = []

    def add(found: list[Passage]) -> list[int]:
        ids = []
        for passage in found:
            key = (passage.title, passage.text)
            if key not in rows:
                rows[key] = len(passages)
                passages.append(passage)
            ids.append(rows[key])
            for anchor in passage.anchors:
                anchors.setdefault((passage.source, anchor), rows[key])
        return ids

    def ask(kind: str, text: str, relevant: list[int]) -> None:
        queries.append({"qid": len(queries), "kind": kind, "text": text, "relevant": relevant})

    for rel, text in pages(base):
        page = parse_html(text)
        if rel.startswith("faq/"):
            for question, part in by_question(page):
                ids = add(split_page(part, rel))
                if question and ids:
                    ask("faq", question, ids)
        else:
            add(split_page(page, rel))

    index: dict[str, set[int]] = collections.defaultdict(set)
    for path in sorted(base.glob("genindex-*.html")):
        head = ""
        for page_name, anchor, entry in re.findall(
            r'<li><a href="([^"#]+)#([^"]+)">(.*?)</a>', path.read_text("utf-8"), re.S
        ):
            term = " ".join(html.unescape(re.sub("<[^>]+>", "", entry)).split())
            if term.startswith("("):
                term = f"{head} {term}"
            else:
                head = term.split(" (")[0]
            if not re.match(r"\[\d+\]$", term) and (page_name, anchor) in anchors:
                index[term].add(anchors[page_name, anchor])
    for term in sorted(index):
        ask("index", term, sorted(index[term]))
    return passages, queries


def write_gz(path: Path, rows: list[dict[str, Any]]) -> None:
    raw = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    out = io.BytesIO()
    with gzip.GzipFile(filename="", mode="wb", compresslevel=9, fileobj=out, mtime=0) as stream:
        stream.write(raw)
    path.write_bytes(out.getvalue())


def update_manifest(**changes: Any) -> None:
    path = HERE / "manifest.json"
    manifest: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"format": "flowc-passages/1"}
    manifest.update(changes)
    manifest["files"] = {
        name: {
            "size_bytes": (HERE / name).stat().st_size,
            "sha256": hashlib.sha256((HERE / name).read_bytes()).hexdigest(),
        }
        for name in ("passages.jsonl.gz", "queries.jsonl.gz", "vectors.fp16.npy")
        if (HERE / name).exists()
    }
    path.write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")


def text_command(root: Path, version: str) -> None:
    base = next(root.glob("python3*/html/index.html")).parent
    passages, queries = make_text(base)
    write_gz(
        HERE / "passages.jsonl.gz",
        [{"id": i, "source": p.source, "title": p.title, "text": p.text} for i, p in enumerate(passages)],
    )
    write_gz(HERE / "queries.jsonl.gz", queries)
    (HERE / "LICENSE").write_bytes(next(root.glob("python3*-doc/copyright")).read_bytes())
    words = sum(len(p.text.split()) for p in passages)
    (HERE / "vectors.fp16.npy").unlink(missing_ok=True)
    update_manifest(
        name="pydocs",
        about="The documentation of Python 3.11 as passages of about 100 words, in English",
        licence="PSF-2.0 (code examples 0BSD); see LICENSE and NOTICE",
        origin={"package": "python3.11-doc (Debian)", "version": version, "upstream": "https://docs.python.org/3.11/"},
        passages=len(passages),
        pages=len({p.source for p in passages}),
        mean_words=round(words / len(passages), 1),
        queries=dict(collections.Counter(q["kind"] for q in queries)),
        vectors=None,
    )


def vectors_command() -> None:
    import numpy as np

    from flowc.backends.embed import open_embedder

    embedder = open_embedder("minilm", threads=1)
    passages = read_jsonl(HERE / "passages.jsonl.gz", strict=True).passages

    def progress(done: int, total: int) -> None:
        print(f"\r{done}/{total} passages", end="", file=sys.stderr, flush=True)

    vectors = embedder.embed_many([embedded_text(p) for p in passages], progress=progress)
    np.save(HERE / "vectors.fp16.npy", vectors.astype(np.float16))
    update_manifest(
        vectors={
            "embedder": "minilm",
            "fingerprint": embedder.fingerprint,
            "dim": embedder.dim,
            "dtype": "float16",
            "of": "{title}: {text}",
        }
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    text = commands.add_parser("text", help="passages, queries and the licence from the unpacked package")
    text.add_argument("root", type=Path, help="the package's usr/share/doc")
    text.add_argument("--version", required=True, help="the package's version")
    commands.add_parser("vectors", help="embed the passages")
    args = parser.parse_args()
    if args.command == "text":
        text_command(args.root, args.version)
    else:
        vectors_command()
    return 0


if __name__ == "__main__":
    sys.exit(main())

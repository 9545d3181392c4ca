"""Files to passages: plain text, Markdown, HTML and JSONL, read with the standard library alone.

A file becomes a `Page` (a title and a run of blocks: headings, paragraphs, list items, definition terms, code); a page
becomes passages of about a hundred words that end where a block or a sentence ends. Reading is deterministic: files in
order of their path, the same bytes give the same passages. What cannot be read is collected as an `InputError` that
names the file and the line; everything else is still read.
"""

from __future__ import annotations

import gzip
import html.parser
import json
import math
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from flowc.ir.errors import InputError, Loc, ResourceError

__all__ = [
    "RESERVED",
    "SUFFIXES",
    "WORDS",
    "Block",
    "Page",
    "Passage",
    "Reading",
    "check_meta",
    "embedded_text",
    "parse_html",
    "parse_markdown",
    "parse_text",
    "read_jsonl",
    "read_passages",
    "split_page",
]

WORDS = 100  # about 120-130 word pieces: what small sentence encoders were trained on
SUFFIXES = (".txt", ".md", ".markdown", ".html", ".htm")
_JSONL = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz")

Kind = Literal["heading", "text", "item", "term", "code"]


@dataclass(frozen=True, slots=True)
class Passage:
    """One unit of retrieval. `key` is the user's own name for it, `anchors` are the ids of elements that it covers.

    `meta` are texts, numbers and booleans by field name, which searches may be filtered by, as by `source` and `key`.
    """

    text: str
    title: str = ""
    source: str = ""
    key: str = ""
    anchors: tuple[str, ...] = ()
    meta: Mapping[str, str | int | float | bool] = field(default_factory=dict)


RESERVED = ("id", "key", "source", "text", "title")
"""Names that no field of a passage's `meta` may have."""


def check_meta(meta: object) -> str:
    """What is wrong with a passage's metadata; empty if nothing is."""
    if not isinstance(meta, Mapping):
        return f'"meta" must be an object, found {type(meta).__name__}'
    for name, value in meta.items():
        if not isinstance(name, str) or not name or name in RESERVED:
            return f'"meta" cannot have a field called {name!r}'
        if not isinstance(value, str | int | float | bool) or value != value or value in (math.inf, -math.inf):
            return f'the field {name!r} of "meta" must be a text, a finite number, true or false, found {value!r}'
    return ""


def embedded_text(passage: Passage) -> str:
    """What an index embeds and weighs of a passage: "title: text", as `str(Doc)` shows it."""
    return f"{passage.title}: {passage.text}" if passage.title else passage.text


@dataclass(frozen=True, slots=True)
class Block:
    """One block of a page. Text is one line, except code, which keeps its lines; `level` counts for headings only."""

    kind: Kind
    text: str
    level: int = 0
    anchors: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Page:
    title: str
    blocks: tuple[Block, ...]


@dataclass(slots=True)
class Reading:
    """What was read, and what could not be."""

    passages: list[Passage] = field(default_factory=list)
    errors: list[InputError] = field(default_factory=list)
    files: int = 0


# ------------------------------------------------------------------------------------------------ reading files
def read_passages(
    path: str | os.PathLike[str],
    *,
    words: int = WORDS,
    strict: bool = False,
    suffixes: Sequence[str] = SUFFIXES,
    on_file: Callable[[str], None] | None = None,
) -> Reading:
    """Every passage of a folder (recursively), of one text file, or of a JSONL file, in the order of their paths.

    A passage's `source` is the file's path relative to the folder, with forward slashes. Hidden files and folders are
    passed over, links to folders are not followed. Passages with equal title and text are kept once.

    With `strict` the first unreadable file or line is raised as `InputError`; otherwise they are collected in
    `Reading.errors`. Raises `ResourceError` F061 if `path` does not exist or holds no file of a known kind.
    """
    root = Path(path)
    reading = Reading()
    if root.is_dir():
        names = [n for n in _walk(root) if n.lower().endswith(tuple(suffixes))]
        if not names:
            raise ResourceError(
                f"no documents in {root}",
                code="F061",
                hint=f"the folder must hold files that end in {', '.join(suffixes)}; or name a JSONL file",
            )
        files = [(root / name, name) for name in names]
    elif root.is_file():
        if root.name.lower().endswith(_JSONL):
            return read_jsonl(root, strict=strict)
        if not root.name.lower().endswith(tuple(suffixes)):
            raise ResourceError(
                f"{root} is not a kind of file that can be read",
                code="F061",
                hint=f"flowc reads {', '.join((*suffixes, *_JSONL))}",
            )
        files = [(root, root.name)]
    else:
        raise ResourceError(f"{root} does not exist", code="F061", hint="name a folder of documents or a JSONL file")
    seen: set[tuple[str, str]] = set()
    for file, name in files:
        if on_file is not None:
            on_file(name)
        try:
            text = _decode(file.read_bytes(), name)
        except OSError as e:
            _report(reading, InputError(f"{name} cannot be read: {e.strerror or e}", loc=Loc(name, 0)), strict)
            continue
        except InputError as e:
            _report(reading, e, strict)
            continue
        reading.files += 1
        for passage in split_page(_parse(text, name), name, words=words):
            if (passage.title, passage.text) not in seen:
                seen.add((passage.title, passage.text))
                reading.passages.append(passage)
    return reading


def read_jsonl(path: str | os.PathLike[str], *, strict: bool = False) -> Reading:
    """The rows of a JSONL file (or .jsonl.gz), one passage each, never split.

    A row is an object with "text" and, if wanted, "title", "source", "id" (a string or an integer) and "meta" (an
    object of texts, numbers and booleans). A row without a source is called by its id, or else by its line. A malformed
    line becomes an `InputError` with its number.
    """
    file = Path(path)
    reading = Reading(files=1)
    taken: dict[str, int] = {}
    number = 0
    try:
        raw = file.open("rb")
    except OSError as e:
        raise ResourceError(f"{file} cannot be opened: {e.strerror or e}", code="F061", hint="check the path") from e
    with raw:
        stream = gzip.GzipFile(fileobj=raw) if file.name.lower().endswith(".gz") else raw
        lines = iter(stream)
        while True:
            try:
                line = next(lines, None)
            except (OSError, EOFError, zlib.error) as e:  # a truncated or damaged gzip file: the rows before it stand
                _report(reading, InputError(f"cannot be read on: {e}", loc=Loc(str(file), number + 1)), strict)
                break
            if line is None:
                break
            number += 1
            if not line.strip():
                continue
            try:
                passage = _row(line, file, number)
                if passage.key:
                    first = taken.setdefault(passage.key, number)
                    if first != number:
                        raise InputError(
                            f"the id {passage.key!r} was already used on line {first}", loc=Loc(str(file), number)
                        )
            except InputError as e:
                _report(reading, e, strict)
            else:
                reading.passages.append(passage)
    return reading


def _row(line: bytes, file: Path, number: int) -> Passage:
    where = Loc(str(file), number)
    form = 'one object a line: {"text": "...", "title": "...", "source": "...", "id": "..."}'
    try:
        text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
    except UnicodeDecodeError as e:
        raise InputError(f"not UTF-8 (byte {e.start} of the line)", loc=where, hint=form) from e
    try:
        row: Any = json.loads(text)
    except json.JSONDecodeError as e:
        raise InputError(
            f"malformed JSON: {e.msg}", loc=Loc(str(file), number, e.colno - 1, e.colno), source=text, hint=form
        ) from e
    except RecursionError as e:
        raise InputError("JSON is nested too deeply", loc=where, hint=form) from e
    if not isinstance(row, dict):
        raise InputError(f"expected an object, found {type(row).__name__}", loc=where, source=_short(text), hint=form)
    for name in ("text", "title", "source"):
        if not isinstance(row.get(name, ""), str):
            found = type(row[name]).__name__
            raise InputError(f'"{name}" must be a string, found {found}', loc=where, source=_short(text), hint=form)
    key = row.get("id", "")
    if isinstance(key, bool) or not isinstance(key, (str, int)):
        found = type(key).__name__
        raise InputError(f'"id" must be a string or an integer, found {found}', loc=where, source=_short(text))
    if "text" not in row or not row["text"].strip():
        what = "is empty" if "text" in row else "is missing"
        raise InputError(f'"text" {what}', loc=where, source=_short(text), hint=form)
    problem = check_meta(row.get("meta", {}))
    if problem:
        raise InputError(problem, loc=where, source=_short(text), hint=form)
    key = str(key)
    source = row.get("source") or key or f"{file.name}:{number}"
    text, title, source, key = (  # lone surrogates cannot be stored
        _clean(value) for value in (row["text"], row.get("title", ""), source, key)
    )
    meta = {_clean(name): _clean(v) if isinstance(v, str) else v for name, v in row.get("meta", {}).items()}
    return Passage(text, title, source, key, meta=meta)


def _clean(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


def _short(text: str) -> str:
    text = text.rstrip("\r\n")
    return text if len(text) <= 100 else text[:97] + "..."


def _report(reading: Reading, error: InputError, strict: bool) -> None:
    if strict:
        raise error
    reading.errors.append(error)


def _walk(root: Path) -> list[str]:
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [f for f in folders if not f.startswith(".")]
        base = Path(folder).relative_to(root)
        found += [(base / f).as_posix() for f in files if not f.startswith(".")]
    return sorted(found)


def _decode(data: bytes, name: str) -> str:
    """Text by its byte order mark, else by an HTML page's own declaration, else as UTF-8."""
    for mark, encoding in ((b"\xef\xbb\xbf", "utf-8-sig"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16")):
        if data.startswith(mark):
            return data.decode(encoding, "replace")
    encoding = "utf-8"
    if name.lower().endswith((".html", ".htm")):
        declared = re.search(rb"<meta[^>]+charset\s*=\s*[\"']?\s*([\w-]+)", data[:2048], re.I)
        encoding = declared[1].decode("ascii", "replace") if declared else encoding
    try:
        text = data.decode(encoding)
    except LookupError:
        raise InputError(f"{name} declares the unknown character set {encoding!r}", loc=Loc(name, 0)) from None
    except UnicodeDecodeError as e:
        raise InputError(
            f"{name} is not {encoding.upper()} (byte {e.start})",
            loc=Loc(name, 1 + data.count(b"\n", 0, e.start)),
            source="",
            hint="convert the file to UTF-8, or leave it out",
        ) from None
    if "\0" in text:
        raise InputError(f"{name} is not text (it holds NUL bytes)", loc=Loc(name, 0))
    return text


def _parse(text: str, name: str) -> Page:
    lower = name.lower()
    stem = Path(name).stem
    if lower.endswith((".html", ".htm")):
        return parse_html(text, fallback_title=stem)
    if lower.endswith((".md", ".markdown")):
        return parse_markdown(text, fallback_title=stem)
    return parse_text(text, fallback_title=stem)


# ------------------------------------------------------------------------------------------------ HTML
_SPACE = re.compile(r"\s+")
_NUMBER = re.compile(r"^(?:\d+\.)+\d*\s+|^[A-Z]\.\s+")  # "3.1.2. Strings" is called "Strings"
_HEADINGS = {f"h{n}": n for n in range(1, 7)}
_BREAKS = frozenset(
    "address article aside blockquote body caption center dd details div dl dt fieldset figcaption figure form "
    "h1 h2 h3 h4 h5 h6 header hr li main ol p pre section summary table tbody td tfoot th thead title tr ul".split()
)
_VOID = frozenset("area base br col embed hr img input link meta param source track wbr".split())
_HIDDEN = frozenset("script style noscript template svg nav footer iframe button select textarea object".split())
# Things around the text that sites mark by class alone: permalinks, tables of contents, breadcrumbs, side bars.
_HIDDEN_CLASS = re.compile(
    r"headerlink|toctree-wrapper|contents|(?:local-)?toc|breadcrumbs?|related|sphinxsidebar|sidebar|"
    r"nav(?:bar|igation|footer|header)?|footer|skip-link|visually-hidden|sr-only|editsection|printfooter|catlinks"
)
# An end tag may be left out before these: opening one closes what stands left of it.
_IMPLIED_END = {
    "li": {"li"},
    "dt": {"dt", "dd"},
    "dd": {"dt", "dd"},
    "tr": {"tr", "td", "th"},
    "td": {"td", "th"},
    "th": {"td", "th"},
    "option": {"option"},
}
_SCOPE = {"li": {"ul", "ol"}, "dt": {"dl"}, "dd": {"dl"}, "tr": {"table"}, "td": {"table", "tr"}, "th": {"table", "tr"}}


class _HTML(html.parser.HTMLParser):
    """Flattens a page to blocks. Text inside <main>, <article> or role=main is told from the rest."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.blocks: list[tuple[Block, bool]] = []
        self.head_title = ""
        self._stack: list[tuple[str, bool, bool]] = []  # tag, hides its text, opens the main part
        self._hidden = self._main = self._pre = self._in_title = 0
        self._text: list[str] = []
        self._anchors: list[str] = []
        self._cells: list[str] = []
        self._kind: Kind = "text"
        self._level = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _IMPLIED_END:
            self._close_implied(tag)
        if tag in _BREAKS and tag not in ("td", "th"):  # cells wait for the end of their row
            self._flush()
        values = dict(attrs)
        if tag == "br":
            self._text.append("\n" if self._pre else " ")
        alt = values.get("alt")
        if tag == "img" and alt and not re.fullmatch(r"\S+\.\w{2,4}", alt):  # a file's name describes nothing
            self._text.append(f" {alt} ")
        if tag not in _VOID:
            classes = (values.get("class") or "").split()
            hides = tag in _HIDDEN or "hidden" in values or any(_HIDDEN_CLASS.fullmatch(c) for c in classes)
            main = tag in ("main", "article") or values.get("role") == "main"
            self._stack.append((tag, hides, main))
            self._hidden += hides
            self._main += main
            self._pre += tag == "pre"
            self._in_title += tag == "title"
        anchor = values.get("id") or (values.get("name") if tag == "a" else None)
        if anchor and not self._hidden:
            self._anchors.append(anchor)
        if tag in _HEADINGS:
            self._kind, self._level = "heading", _HEADINGS[tag]
        elif tag == "pre":
            self._kind = "code"
        elif tag == "li":
            self._kind = "item"
        elif tag == "dt":
            self._kind = "term"

    def handle_endtag(self, tag: str) -> None:
        if tag in _VOID or all(open_tag != tag for open_tag, _, _ in self._stack):
            return
        while self._stack:
            if self._pop() == tag:
                break

    def _pop(self) -> str:
        tag, hides, main = self._stack[-1]
        if tag in ("td", "th"):
            self._cells.append(self._take())
        elif tag in _BREAKS:
            self._flush()
        self._stack.pop()
        self._hidden -= hides
        self._main -= main
        self._pre -= tag == "pre"
        self._in_title -= tag == "title"
        return tag

    def _close_implied(self, tag: str) -> None:
        for at in range(len(self._stack) - 1, -1, -1):
            name = self._stack[at][0]
            if name in _IMPLIED_END[tag]:
                while len(self._stack) > at:
                    self._pop()
                return
            if name in _SCOPE.get(tag, ()):
                return

    def handle_data(self, data: str) -> None:
        if self._in_title:
            self.head_title += data
        elif not self._hidden:
            self._text.append(data)

    def _take(self) -> str:
        text = "".join(self._text)
        self._text = []
        return _code(text) if self._kind == "code" else _SPACE.sub(" ", text).strip()

    def _flush(self) -> None:
        text = self._take()
        if any(tag in ("td", "th") for tag, _, _ in self._stack):
            if text:  # paragraphs inside a cell belong to its row
                self._text = [text, " "]
            return
        if self._cells:
            text = " | ".join(c for c in (*self._cells, text) if c)
            self._cells = []
        if text:  # anchors of an empty element, as of a <section>, stand for the text that follows
            self.blocks.append((Block(self._kind, text, self._level, tuple(self._anchors)), self._main > 0))
            self._anchors = []
            self._kind = "text"
            self._level = 0

    def finish(self) -> None:
        self.close()
        while self._stack:
            self._pop()
        self._flush()


def parse_html(text: str, fallback_title: str = "") -> Page:
    """The page's title and blocks: its <main> part if it has one, without scripts, navigation and permalinks."""
    parser = _HTML()
    parser.feed(text)
    parser.finish()
    inside = [block for block, main in parser.blocks if main and block.text]
    blocks = [b for b, main in parser.blocks if main or not inside]
    title = next((b.text for b in blocks if b.kind == "heading" and b.level == 1 and b.text), "")
    title = title or _SPACE.sub(" ", parser.head_title).strip() or fallback_title
    return Page(_NUMBER.sub("", title) or title, tuple(blocks))


def _code(text: str) -> str:
    lines = [line.rstrip() for line in text.expandtabs(4).splitlines()]
    while lines and not lines[0]:
        lines.pop(0)
    while lines and not lines[-1]:
        lines.pop()
    indent = min((len(line) - len(line.lstrip()) for line in lines if line), default=0)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(line[indent:] for line in lines))


# ------------------------------------------------------------------------------------------------ Markdown and text
_FENCE = re.compile(r"^ {0,3}(`{3,}|~{3,})")
_ATX = re.compile(r"^ {0,3}(#{1,6})(?:\s+(.*?))?(?:\s+#+)?\s*$")
_SETEXT = re.compile(r"^ {0,3}(=+|-{2,})\s*$")
_ITEM = re.compile(r"^\s*(?:[-*+]|\d{1,9}[.)])\s+")
_RULE = re.compile(r"^ {0,3}(?:(?:-\s*){3,}|(?:\*\s*){3,}|(?:_\s*){3,})$")
_TABLE_RULE = re.compile(r"^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)+\|?\s*$")
_INLINE: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"!\[([^\]]*)\]\([^)]*\)"), r"\1"),
    (re.compile(r"\[([^\]]+)\]\([^)\s]*(?:\s+\"[^\"]*\")?\)"), r"\1"),
    (re.compile(r"\[([^\]]+)\]\[[^\]]*\]"), r"\1"),
    (re.compile(r"<(https?://[^>\s]+)>"), r"\1"),
    (re.compile(r"</?[a-zA-Z][^<>]*>"), ""),
    (re.compile(r"(\*\*|__)(?=\S)(.+?)(?<=\S)\1"), r"\2"),
    (re.compile(r"(?<![\w*])\*(?=\S)([^*]+?)(?<=\S)\*(?![\w*])"), r"\1"),
)


def parse_markdown(text: str, fallback_title: str = "") -> Page:
    """The blocks of a Markdown page: marks of emphasis and link targets dropped, fenced code kept line by line."""
    text = re.sub(r"<!--.*?-->", "", text, flags=re.S)
    lines = text.expandtabs(4).splitlines()
    title = ""
    if lines and lines[0].strip() == "---" and "---" in (line.strip() for line in lines[1:]):  # front matter
        end = 1 + next(i for i, line in enumerate(lines[1:]) if line.strip() == "---")
        named = (re.match(r"title:\s*(.+)", line) for line in lines[1:end])
        title = next((m[1].strip().strip("\"'") for m in named if m), "")
        lines = lines[end + 1 :]
    blocks = list(_markdown_blocks(lines))
    title = title or next((b.text for b in blocks if b.kind == "heading"), "") or fallback_title
    return Page(title, tuple(blocks))


def _markdown_blocks(lines: list[str]) -> Iterator[Block]:
    kind: Kind = "text"
    held: list[str] = []

    def done() -> Iterator[Block]:
        nonlocal kind
        if held:
            if kind == "code":
                yield Block("code", _code("\n".join(held)))
            else:
                yield Block(kind, _inline(" ".join(held)))
            held.clear()
        kind = "text"

    at = 0
    while at < len(lines):
        line = lines[at]
        at += 1
        fence = _FENCE.match(line)
        if fence:
            yield from done()
            close = re.compile(r"^ {0,3}" + re.escape(fence[1][0]) + "{" + str(len(fence[1])) + r",}\s*$")
            while at < len(lines) and not close.match(lines[at]):
                held.append(lines[at])
                at += 1
            at += 1
            kind = "code"
            yield from done()
            continue
        heading = _ATX.match(line)
        if heading:
            yield from done()
            if heading[2]:
                yield Block("heading", _inline(heading[2]), len(heading[1]))
            continue
        under = _SETEXT.match(line)
        if under and held and kind == "text":
            said = _inline(" ".join(held))
            held.clear()
            yield Block("heading", said, 1 if under[1][0] == "=" else 2)
            continue
        if not line.strip() or _RULE.match(line):
            yield from done()
            continue
        if line.startswith("    ") and not held:
            while at <= len(lines) and (line.startswith("    ") or not line.strip()):
                held.append(line)
                line = lines[at] if at < len(lines) else "end"
                at += 1
            at -= 1
            kind = "code"
            yield from done()
            continue
        if _TABLE_RULE.match(line):
            continue
        line = re.sub(r"^\s*(?:>\s?)+", "", line)
        if line.strip().startswith("|"):
            yield from done()
            cells = (cell.strip() for cell in line.strip().strip("|").split("|"))
            held.append(" | ".join(cell for cell in cells if cell))
            yield from done()
            continue
        item = _ITEM.match(line)
        if item:
            yield from done()
            kind, line = "item", line[item.end() :]
        if line.strip():
            held.append(line.strip())
    yield from done()


def _inline(text: str) -> str:
    kept: list[str] = []

    def keep(found: re.Match[str]) -> str:  # code spans and escaped marks are text as they stand
        kept.append(found[2].strip() if found[1] else found[3])
        return f"\0{len(kept) - 1}\0"

    text = re.sub(r"(?<!\\)(`+)(.+?)(?<!`)\1(?!`)|\\([!-/:-@\[-`{-~])", keep, text.replace("\0", ""))
    for pattern, new in _INLINE:
        text = pattern.sub(new, text)
    text = re.sub("\0(\\d+)\0", lambda m: kept[int(m[1])], text)
    return _SPACE.sub(" ", text).strip()


def parse_text(text: str, fallback_title: str = "") -> Page:
    """Paragraphs, parted by blank lines; the title is the file's name."""
    paragraphs = (_SPACE.sub(" ", part).strip() for part in re.split(r"\n[ \t\f]*(?:\n[ \t\f]*)+", text.strip()))
    return Page(fallback_title, tuple(Block("text", p) for p in paragraphs if p))


# ------------------------------------------------------------------------------------------------ passages
_TINY = 12  # words: less than this is a remark that belongs to what stands next to it
_SENTENCE = re.compile(r"(?:(?<=[.!?…])|(?<=[.!?…][\"')\]”’]))\s+(?=[\"'(\[“‘]*[A-Z0-9])|(?<=[。！？])")


def split_page(page: Page, source: str, *, words: int = WORDS) -> list[Passage]:
    """The page as passages of about `words` words, titled "page: section".

    A passage ends with a section, before a definition once it is 40 % full, where a block would fill it beyond 140 %,
    and inside a block only if the block alone is that long; then at the end of a sentence, or of a line of code. A
    section of fewer than 12 words joins the next one under its own heading, so nothing is lost and little is tiny.
    """
    out: list[Passage] = []
    held: list[str] = []  # the lines of the passage in the making
    count = 0
    anchors: list[str] = []
    heading = ""

    def title() -> str:
        return f"{page.title}: {heading}" if heading and heading != page.title else page.title

    def emit() -> None:
        nonlocal count
        if held:
            out.append(Passage("\n".join(held), title(), source, "", tuple(anchors)))
            held.clear()
            anchors.clear()
        count = 0

    for block in page.blocks:
        if block.kind == "heading" and block.text:
            if count >= _TINY:
                emit()
            named = _NUMBER.sub("", block.text) or block.text
            if held:
                held.append(named)
                count += len(named.split())
            else:
                heading = named
            anchors += block.anchors
            continue
        if block.kind == "term" and count >= 0.4 * words:
            emit()
        pieces = _pieces(block, words)
        for piece in pieces:
            size = len(piece.split())
            if held and count + size > 1.4 * words:
                emit()
            anchors += block.anchors if piece is pieces[0] else ()
            held.append(piece)
            count += size
            if count >= words:
                emit()
    if held and count < _TINY and out and out[-1].title == title() and len(out[-1].text.split()) < 1.5 * words:
        last = out.pop()
        held.insert(0, last.text)
        anchors[:0] = last.anchors
    emit()
    return out


def _pieces(block: Block, words: int) -> list[str]:
    """The block in pieces of at most about 1.4 * `words` words, cut at sentences or lines; [] for an empty block."""
    text = f"- {block.text}" if block.kind == "item" else block.text
    if not block.text:
        return []
    if len(text.split()) <= 1.4 * words:
        return [text]
    glue = "\n" if block.kind == "code" else " "
    units = text.split("\n") if block.kind == "code" else _SENTENCE.split(text)
    return [glue.join(group) for group in _pack(_cut(units, words), words)]


def _cut(units: Iterable[str], words: int) -> Iterator[str]:
    """The units, with those that are too long for a passage cut by words."""
    for unit in units:
        said = unit.split(" ")
        if len(said) <= 1.4 * words:
            yield unit
        else:
            yield from (" ".join(said[at : at + words]) for at in range(0, len(said), words))


def _pack(units: Iterable[str], words: int) -> Iterator[list[str]]:
    group: list[str] = []
    count = 0
    for unit in units:
        size = len(unit.split())
        if group and count + size > 1.2 * words:
            yield group
            group, count = [], 0
        group.append(unit)
        count += size
    if group:
        yield group

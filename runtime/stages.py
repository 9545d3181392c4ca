"""What operations of the stage level hold while they are under way: text in pieces, searches in steps, advice given."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING

from flowc.ir.errors import RunError
from flowc.ir.values import Docs

from .protocols import SearchRequest

if TYPE_CHECKING:
    from .lanes import Lane
    from .program import Handle, LaneItem

OnPiece = Callable[[str], None]

LINES = "lines"
"""The `split` of `llm.each` that stands for `str.splitlines`."""


def split(text: str, by: str) -> list[str]:
    """`text.splitlines()` for `lines`, else `text.split(by)`."""
    return text.splitlines() if by == LINES else text.split(by)


class Splitter:
    """`split` of a text that comes in pieces: however it is cut, the items are those of the whole text."""

    __slots__ = ("_by", "_ends_in_cr", "_open", "_tail")

    def __init__(self, by: str) -> None:
        self._by = by
        self._open: list[str] = []  # the item that is not closed yet
        self._tail = ""  # its last characters, which may be a separator's first
        self._ends_in_cr = False  # the last line ended in "\r": a "\n" that comes now belongs to that end

    def feed(self, piece: str) -> Sequence[str]:
        """The items that this piece closes."""
        return self._lines(piece) if self._by == LINES else self._parts(piece)

    def _lines(self, piece: str) -> Sequence[str]:
        if self._ends_in_cr and piece:
            self._ends_in_cr = False
            piece = piece.removeprefix("\n")
        lines = piece.splitlines()
        if not lines:
            return ()
        if lines == [piece]:
            self._open.append(piece)
            return ()
        lines[0] = "".join([*self._open, lines[0]])
        ended = len((piece + "x").splitlines()) > len(lines)
        self._ends_in_cr = piece.endswith("\r")
        self._open = [] if ended else [lines.pop()]
        return lines

    def _parts(self, piece: str) -> Sequence[str]:
        by = self._by
        if not by:
            return ()  # Python says what is wrong once it splits the whole text
        recent = self._tail + piece
        if by not in recent:
            self._open.append(piece)
            self._tail = recent[max(0, len(recent) - len(by) + 1) :]
            return ()
        items = "".join([*self._open, piece]).split(by)
        rest = items.pop()
        self._open = [rest]
        self._tail = rest[max(0, len(rest) - len(by) + 1) :]
        return items


def close_items(given: list[str], text: str, by: str) -> None:
    """Adds to the items that were closed on the way those that the end of the text closes."""
    items = split(text, by)
    if items[: len(given)] != given:
        raise RunError(
            "the backend's pieces of text are not the text that it returned",
            hint="`on_text` must see all of it, in order",
        )
    given += items[len(given) :]


class Words:
    """Keeps what a generation writes until somebody wants it, then passes it on. Written to from a lane's thread."""

    __slots__ = ("_lock", "_pieces", "_to", "heard")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pieces: list[str] = []
        self._to: OnPiece | None = None
        self.heard = False  # has anybody been given a part of it?

    def __call__(self, piece: str) -> None:
        with self._lock:
            if self._to is None:
                self._pieces.append(piece)
            else:
                self.heard = True
                self._to(piece)

    def pass_to(self, to: OnPiece) -> None:
        """Gives `to` what there is, and from now on each piece as it comes."""
        with self._lock:
            so_far = "".join(self._pieces)
            self._pieces.clear()
            self._to = to
            if so_far:
                self.heard = True
                to(so_far)


FOLLOWED = (5, 10, 20)
"""Words after which a search to come is predicted again; from the last on, each time so many more have been written."""


class Follower:
    """Tells caches of clusters what has been written so far, when enough of it is new."""

    __slots__ = ("_next", "_pieces", "_to", "_words")

    def __init__(self, to: Sequence[tuple[Callable[[Hashable, str], None], Hashable]]) -> None:
        self._to = to
        self._pieces: list[str] = []
        self._words = 0
        self._next = FOLLOWED[0]

    def __call__(self, piece: str) -> None:
        self._pieces.append(piece)
        self._words += piece.count(" ") + piece.count("\n")
        if self._words < self._next:
            return
        last = FOLLOWED[-1]
        self._next = next((n for n in FOLLOWED if n > self._words), (self._words // last + 1) * last)
        text = "".join(self._pieces)
        self._pieces = [text]
        for follow, key in self._to:
            try:
                follow(key, text)
            except Exception:
                pass  # advice: the search finds what it finds


def all_of(listeners: Sequence[OnPiece]) -> OnPiece | None:
    """One listener for all."""
    if len(listeners) < 2:
        return listeners[0] if listeners else None

    def tell(piece: str) -> None:
        for listener in listeners:
            listener(piece)

    return tell


class Announced:
    """What a backend was told to expect under a key, until `cancel` says that it is of no use any more."""

    __slots__ = ("_release", "follow", "key")

    def __init__(
        self, key: Hashable, release: Callable[[Hashable], None], follow: Callable[[Hashable, str], None] | None = None
    ) -> None:
        self.key = key
        self.follow = follow
        self._release: Callable[[Hashable], None] | None = release

    def cancel(self) -> None:
        release, self._release = self._release, None
        if release is not None:
            try:
                release(self.key)
            except Exception:
                pass  # advice


class Searching:
    """A search in pieces, from `ivf.begin` to `ivf.finish`: one item in its lane, whoever asks first.

    `partials` wait for a result that is good enough, each with how certain it must be. Only the driver's thread writes
    to it; `error` is what `ivf.finish` raises.
    """

    __slots__ = ("begun_s", "docs", "error", "item", "lane", "partials", "request", "timeout_s")

    lane: Lane

    def __init__(self, request: SearchRequest, begun_s: float, timeout_s: float | None) -> None:
        self.request = request
        self.begun_s = begun_s
        self.timeout_s = timeout_s  # for all of it
        self.item: LaneItem | None = None
        self.partials: list[tuple[Handle, float]] = []
        self.docs: Docs | None = None
        self.error: BaseException | None = None

    def answer(self, docs: Docs | None) -> None:
        """The search is over: who waits for a part of it gets the whole, or nothing where there is none."""
        self.docs = docs
        partials, self.partials = self.partials, []
        for handle, _ in partials:
            if not handle.dead:
                handle.driver.post([(handle, True, Docs() if docs is None else docs)])

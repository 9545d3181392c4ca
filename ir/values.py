"""Values that flow between operations and that users see: documents and token chunks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, SupportsIndex, final, overload

__all__ = ["UNDEF", "Conversation", "Doc", "Docs", "Undef"]


@final
class Undef:
    """The type of `UNDEF`, which stands for the value of a variable that is not bound."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "UNDEF"

    def __reduce__(self) -> str:
        return "UNDEF"  # one per process: compared with `is`


UNDEF: Final = Undef()


class Conversation(str):
    """A conversation as plain text. A model that has a form of its own for `messages` writes them in that instead."""

    __slots__ = ("messages",)
    messages: tuple[Mapping[str, str], ...]

    def __new__(cls, text: str, messages: Iterable[Mapping[str, str]]) -> Conversation:
        made = super().__new__(cls, text)
        made.messages = tuple(dict(m) for m in messages)
        return made

    def __reduce__(self) -> tuple[type, tuple[str, tuple[Mapping[str, str], ...]]]:
        return Conversation, (str(self), self.messages)


@dataclass(frozen=True, slots=True)
class Doc:
    """One retrieved passage. `score` is the retriever's (higher is better); `source` names where it comes from."""

    id: int
    text: str
    score: float = 0.0
    source: str = ""
    title: str = ""

    def __str__(self) -> str:
        return f"{self.title}: {self.text}" if self.title else self.text


class Docs(tuple[Doc, ...]):
    """An immutable ranked list of passages, best first; inside an f-string it reads as a numbered list.

    >>> print(Docs([Doc(7, "Use sorted().", 0.9, "howto/sorting.html", "Sorting")]))
    [1] Sorting: Use sorted().
    """

    __slots__ = ()

    def __new__(cls, docs: Iterable[Doc] = ()) -> Docs:
        return super().__new__(cls, tuple(docs))

    @property
    def texts(self) -> tuple[str, ...]:
        return tuple(doc.text for doc in self)

    @property
    def ids(self) -> tuple[int, ...]:
        return tuple(doc.id for doc in self)

    @property
    def sources(self) -> tuple[str, ...]:
        return tuple(doc.source for doc in self)

    def __str__(self) -> str:
        return "\n".join(f"[{rank}] {doc}" for rank, doc in enumerate(self, 1))

    __repr__ = __str__  # a list of results inside an f-string reads like the results themselves

    def __add__(self, other: Any) -> Any:
        joined = tuple.__add__(self, other)
        return Docs(joined) if isinstance(other, Docs) else joined

    @overload
    def __getitem__(self, index: SupportsIndex) -> Doc: ...
    @overload
    def __getitem__(self, index: slice) -> Docs: ...
    def __getitem__(self, index: SupportsIndex | slice) -> Doc | Docs:
        picked = tuple.__getitem__(self, index)
        return Docs(picked) if isinstance(index, slice) else picked  # type: ignore[return-value, arg-type]

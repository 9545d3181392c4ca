"""What passages can be filtered by: for each field its distinct values, and for each passage the number of its value.

A condition is looked at once for each distinct value, in Python, and then taken to all passages by one table look-up in
numpy, so that texts, numbers of any size and booleans need no columns of their own kinds.
"""

from __future__ import annotations

import difflib
import json
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from flowc.ir.errors import ResourceError
from flowc.ir.options import Scalar, Where, holds, where_key

__all__ = ["Columns", "ColumnsBuilder", "fields_of", "met"]

Mask = npt.NDArray[np.bool_]
_BUILT_IN = ("key", "source")


def fields_of(row: Mapping[str, Any]) -> dict[str, Scalar]:
    """What a stored passage can be filtered by: its metadata, its key and its source."""
    return {**row.get("meta", {}), **{name: row[name] for name in _BUILT_IN if row.get(name)}}


class ColumnsBuilder:
    """Collects the fields of passages, in the order of their rows."""

    def __init__(self) -> None:
        self.fields: dict[str, dict[tuple[type, Scalar], int]] = {}
        self._codes: dict[str, array[int]] = {}
        self._rows = 0

    def add(self, row: Mapping[str, Any]) -> None:
        """One more stored passage."""
        for name, value in fields_of(row).items():
            numbers = self.fields.setdefault(name, {})
            codes = self._codes.setdefault(name, array("i"))
            codes.extend([-1] * (self._rows - len(codes)))
            codes.append(numbers.setdefault((type(value), value), len(numbers)))
        self._rows += 1

    def values(self) -> dict[str, list[Scalar]]:
        """For each field its distinct values, in the order of their numbers."""
        return {name: [value for _, value in numbers] for name, numbers in self.fields.items()}

    def codes(self) -> npt.NDArray[np.int32]:
        """Of shape (fields, rows): the number of each passage's value, -1 for none."""
        out = np.full((len(self.fields), self._rows), -1, dtype=np.int32)
        for at, name in enumerate(self.fields):
            out[at, : len(self._codes[name])] = self._codes[name]
        return out


class Columns:
    """The fields of an index: of its main passages from a mapped file, of those added since from the passages.

    Safe to use from several threads.
    """

    _KEPT = 64  # filters whose passages are remembered

    def __init__(self, folder: Path, rows: int, *, present: bool) -> None:
        self._values: dict[str, list[Scalar]] = {}
        self._codes: npt.NDArray[np.int32] = np.empty((0, rows), dtype=np.int32)
        self._rows = rows
        self._main: OrderedDict[tuple[Any, ...], Mask] = OrderedDict()
        self._added: OrderedDict[tuple[Any, ...], list[bool]] = OrderedDict()
        if present:
            self._values = json.loads((folder / "fields.json").read_text("utf-8"))
            self._codes = np.load(folder / "fields.npy", mmap_mode="r", allow_pickle=False)
            if self._codes.shape != (len(self._values), rows):
                raise ValueError("fields.npy does not fit fields.json")

    def names(self, added: Iterable[Mapping[str, Any]]) -> set[str]:
        """The fields that a filter may name."""
        return {*self._values, *_BUILT_IN, *(name for row in added for name in row.get("meta", ()))}

    def rows(self, where: Where) -> Mask:
        """Of each main passage whether it meets all conditions."""
        key = where_key(where)
        found = self._main.get(key)
        if found is None:
            found = np.ones(self._rows, dtype=np.bool_)
            for condition in where:
                if condition[0] not in self._values:
                    found = np.zeros(self._rows, dtype=np.bool_)
                    break
                met = np.array([holds(condition, value) for value in self._values[condition[0]]] + [False])
                found &= met[self._codes[list(self._values).index(condition[0])]]  # -1, no value, is the last
            self._main[key] = found
            while len(self._main) > self._KEPT:
                self._main.popitem(last=False)
        return found

    def added(self, where: Where, rows: Sequence[Mapping[str, Any]]) -> list[bool]:
        """The same of each passage that was added. `rows` only ever grow, so what was looked at before is known."""
        known = self._added.get(where_key(where), [])
        if len(known) < len(rows):
            known = known + [met(where, row) for row in rows[len(known) :]]
            self._added[where_key(where)] = known
            while len(self._added) > self._KEPT:
                self._added.popitem(last=False)
        return known[: len(rows)]

    def key_rows(self) -> tuple[list[Scalar], npt.NDArray[np.int32]]:
        """The distinct keys, and for each main passage the number of its key (-1: none)."""
        if "key" not in self._values:
            return [], np.full(self._rows, -1, dtype=np.int32)
        return self._values["key"], self._codes[list(self._values).index("key")]

    def check(self, where: Where, added: Sequence[Mapping[str, Any]]) -> None:
        """Raises `ResourceError` F063 for a field that no passage of the index has."""
        if all(condition[0] in self._values or condition[0] in _BUILT_IN for condition in where):
            return
        known = self.names(added)
        for name, _, _ in where:
            if name not in known:
                close = difflib.get_close_matches(name, known, 1)
                raise ResourceError(
                    f"no passage of the index has the metadata field {name!r}",
                    code="F063",
                    hint=f"did you mean {close[0]!r}?" if close else f"its fields are {', '.join(sorted(known))}",
                )


def met(where: Where, row: Mapping[str, Any]) -> bool:
    """Does a stored passage meet all conditions?"""
    fields = fields_of(row)
    return all(condition[0] in fields and holds(condition, fields[condition[0]]) for condition in where)

"""Plain Python that may run a second time, with other inputs or at another time; and work that is begun ahead."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from flowc.ir.core import Attrs, Names, Op, Region, Value
from flowc.ir.ops import keyword_operands

from .facts import Facts

MAX_OPS: Final = 8  # of a slice: more is no longer next to nothing
_OWN: Final = frozenset({"group", "wave", "batch", "site", "lookahead", "raises"})
"""Attributes of an operation that one begun ahead for it does not have."""
_UNSHARED: Final = frozenset({"near", "kv", "ahead"})  # keyword operands likewise


@dataclass(frozen=True, slots=True)
class Slice:
    """The pure operations of a region that make an op's operands, in program order; `sources` come from elsewhere."""

    ops: tuple[Op, ...]
    operands: tuple[Value, ...]
    sources: tuple[Value, ...]

    def cloned(self, names: Names, instead: Mapping[str, Value] | None = None) -> tuple[tuple[Op, ...], list[Value]]:
        """Copies of the operations, with values in place of named sources; and what they give as operands."""
        now = dict(instead or {})
        copies = []
        for op in self.ops:
            operands = tuple(now.get(v.name, v) for v in op.operands)
            results = tuple(Value(names.fresh(v.name), v.type) for v in op.results)
            copies.append(replace(op, operands=operands, results=results))
            now.update(zip((v.name for v in op.results), results, strict=True))
        return tuple(copies), [now.get(v.name, v) for v in self.operands]


def slice_of(
    op: Op, region: Region, made: Mapping[str, int], facts: Facts, *, stops: Collection[str] = ()
) -> Slice | None:
    """What makes the op's operands in this region; None if that is more than some pure plain Python.

    `made` holds which op of the region makes which value; those named in `stops` are sources all the same.
    """
    found: set[int] = set()
    sources: dict[str, Value] = {}
    work = list(_shared_operands(op))
    while work:
        value = work.pop()
        at = made.get(value.name)
        if at is None or value.name in stops:
            sources[value.name] = value
        elif at not in found:
            maker = region.ops[at]
            if not _is_free(maker, facts) or len(found) == MAX_OPS:
                return None
            found.add(at)
            work += maker.operands
    return Slice(tuple(region.ops[i] for i in sorted(found)), _shared_operands(op), tuple(sources.values()))


def makers_of(region: Region) -> dict[str, int]:
    """Value -> position of the op of the region that makes it."""
    return {v.name: i for i, op in enumerate(region.ops) for v in op.results}


def _is_free(op: Op, facts: Facts) -> bool:
    """May it run again, at any time, with nobody the wiser?"""
    if op.name not in ("const", "template", "py", "equals") or "group" in op.attrs or op.attrs.get("is_async"):
        return False
    return facts.effect(op).is_pure and not facts.is_observable(op)


def _shared_operands(op: Op) -> tuple[Value, ...]:
    keywords = keyword_operands(op)
    return tuple(v for i, v in enumerate(op.operands) if not any(keywords.get(n) == i for n in _UNSHARED))


def begun_ahead(op: Op, operands: Sequence[Value], result: Value) -> Op:
    """The op begun ahead, with these operands instead of its own."""
    attrs = {n: a for n, a in op.attrs.items() if n not in _OWN and n != "kw"}
    kw = tuple(n for n in op.attr("kw", ()) if n not in _UNSHARED)
    if kw:
        attrs["kw"] = kw
    return Op(f"ahead.{op.name}", tuple(operands), (result,), Attrs(attrs), loc=op.loc)

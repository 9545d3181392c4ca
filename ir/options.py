"""What a search may be asked besides its text: conditions on metadata, and leave to stop early. Both as plain literals.

    where = {"lang": "en", "kind": ["howto", "faq"], "year": {">=": 2020, "<": 2024}}

A condition is a value (equal to it), a list of values (equal to one of them) or a range: a mapping of `<`, `<=`, `>`,
`>=` to a number or a text. All conditions must hold; a passage without the field meets none. Numbers compare with
numbers, texts with texts (so ISO dates have ranges), and true is not 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = [
    "Bounded",
    "Budget",
    "Condition",
    "Scalar",
    "Where",
    "as_stop",
    "as_where",
    "holds",
    "stop_literal",
    "where_key",
]

Scalar = str | int | float | bool
Condition = tuple[str, str, Any]
"""(field, operator, value): the operator is `==`, `in` (the value is a tuple) or one of a range."""
Where = tuple[Condition, ...]
"""Conditions in one order, whatever order they were written in: equal filters are equal values."""

_RANGE = {
    "<": lambda a, b: a < b,
    "<=": lambda a, b: a <= b,
    ">": lambda a, b: a > b,
    ">=": lambda a, b: a >= b,
}


@dataclass(frozen=True, slots=True)
class Bounded:
    """Stops a search early where its result would still change for at most a share `eps` of queries.

    That share was measured when the index was built, on queries that the index describes; where it was not measured
    (an `eps` too small for the sample, a larger k or nprobe, a filter, an index that has changed since), the search
    runs to its end.
    """

    eps: float


@dataclass(frozen=True, slots=True)
class Budget:
    """Stops a search after so many lists, or so many seconds after it began; one list is scanned in any case."""

    lists: int | None = None
    seconds: float | None = None


def as_where(value: object) -> Where | None:
    """The conditions in their one order; None for no condition. Takes a mapping as above, or what this returns.

    Raises `ValueError` with what is wrong and what is right.
    """
    if value is None:
        return None
    conditions: list[Condition] = []
    if isinstance(value, Mapping):
        for field, wanted in value.items():
            if not isinstance(field, str) or not field:
                raise ValueError(f"a field of `where` is a text, not {field!r}")
            if isinstance(wanted, Mapping):
                if not wanted:
                    raise ValueError(f"the range of `{field}` is empty: it takes {_or(_RANGE)}")
                conditions += [_limit(field, op, limit) for op, limit in wanted.items()]
            elif isinstance(wanted, list | tuple | set | frozenset):
                conditions.append(_condition(field, "in", tuple(wanted)))
            else:
                conditions.append(_condition(field, "==", wanted))
    elif isinstance(value, tuple) and all(isinstance(c, tuple) and len(c) == 3 for c in value):
        conditions = [_condition(*c) for c in value]
    else:
        raise ValueError(f"`where` is a mapping of fields to conditions, not {type(value).__name__}")
    return tuple(one for _, one in sorted({_order(c): c for c in conditions}.items())) or None


def where_key(where: Where | None) -> tuple[Any, ...]:
    """What tells two filters apart: Python holds 1 and true for equal."""
    return () if where is None else _order(where)


def _condition(field: Any, op: Any, value: Any) -> Condition:
    if not isinstance(field, str) or not field:
        raise ValueError(f"a field of `where` is a text, not {field!r}")
    if op == "in":
        items = value if isinstance(value, tuple) else (value,)
        for item in items:
            _scalar(field, item)
        return field, op, tuple(sorted({_order(item): item for item in items}.values(), key=_order))
    if op == "==":
        return field, op, _scalar(field, value)
    return _limit(field, op, value)


def _limit(field: str, op: Any, value: Any) -> Condition:
    if op not in _RANGE:
        raise ValueError(f"`{field}` has the unknown operator {op!r}: a range takes {_or(_RANGE)}")
    if isinstance(value, bool) or not isinstance(value, str | int | float) or value != value:
        raise ValueError(f"the limit of `{field}` {op} is a number or a text, not {value!r}")
    return field, op, value


def _scalar(field: str, value: Any) -> Any:
    if not isinstance(value, str | int | float | bool) or (isinstance(value, float) and not math.isfinite(value)):
        raise ValueError(f"`{field}` is compared with texts, numbers, true and false, not with {value!r}")
    return value


def _or(names: Mapping[str, Any]) -> str:
    *most, last = (f"`{name}`" for name in names)
    return f"{', '.join(most)} and {last}"


def _order(value: Any) -> tuple[Any, ...]:
    """An order among values of all kinds, in which equal values (1 and 1.0, but not true) are equal."""
    if isinstance(value, tuple):
        return tuple(_order(item) for item in value)
    return (_kind(value), value)


def _kind(value: object) -> str:
    return "bool" if isinstance(value, bool) else "text" if isinstance(value, str) else "number"


def holds(condition: Condition, value: Scalar) -> bool:
    """Does a passage with this value of the field meet the condition?"""
    _, op, wanted = condition
    if op == "in":
        return any(_kind(one) == _kind(value) and one == value for one in wanted)
    if _kind(wanted) != _kind(value):
        return False
    return bool(wanted == value) if op == "==" else _RANGE[op](value, wanted)


def stop_literal(stop: Bounded | Budget) -> tuple[Any, ...]:
    """The stop as a literal of the IR: `("bounded", eps)` or `("budget", lists, seconds)`."""
    return ("bounded", stop.eps) if isinstance(stop, Bounded) else ("budget", stop.lists, stop.seconds)


def as_stop(value: object) -> Bounded | Budget | None:
    """The stop that a value or a literal says. Raises `ValueError` for all else, and for numbers that cannot be."""
    stop: Any = value
    match stop:
        case None:
            return None
        case ("bounded", eps):
            stop = Bounded(eps)
        case ("budget", lists, seconds):
            stop = Budget(lists, seconds)
    match stop:
        case Bounded(eps):
            if isinstance(eps, bool) or not isinstance(eps, int | float) or not 0 < eps < 1:
                raise ValueError(f"the eps of `Bounded` must lie between 0 and 1, found {eps!r}")
            return stop
        case Budget(lists, seconds):
            if lists is None and seconds is None:
                raise ValueError("a `Budget` needs a number of lists or of seconds")
            if lists is not None and (not isinstance(lists, int) or isinstance(lists, bool) or lists < 1):
                raise ValueError(f"the lists of a `Budget` must be an integer from 1, found {lists!r}")
            if seconds is not None and (not isinstance(seconds, int | float) or not seconds > 0):
                raise ValueError(f"the seconds of a `Budget` must be above 0, found {seconds!r}")
            return stop
    raise ValueError(f"stop must be `Bounded`, `Budget` or None, found {value!r}")

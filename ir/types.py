"""Types of IR values. A type says what a value is and, through `is_immutable`, who may change it meanwhile.

`list<T>` is a *value* type here: the frontend gives it only to lists that nobody else holds, so that nothing can change
them while a parallel operation reads them. A built-in list or tuple that others may hold is a `sequence<T>` (iterating
does not use it up); any other Python object is `any`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Type:
    """A type name with its arguments: `list<text>` is `Type("list", (TEXT,))`."""

    name: str
    args: tuple[Type, ...] = ()

    def __str__(self) -> str:
        return f"{self.name}<{', '.join(map(str, self.args))}>" if self.args else self.name


TEXT, INT, FLOAT, BOOL, NONE, BYTES = (Type(n) for n in ("text", "int", "float", "bool", "none", "bytes"))
DOC, DOCS, VECTOR, RANGE, ANY = (Type(n) for n in ("doc", "docs", "vector", "range", "any"))
SCAN, KV, AHEAD = (Type(n) for n in ("scan", "kv", "ahead"))  # stage level: work under way
NEVER = Type("never")  # of a value that is never read: the variable is unbound on this path

SCALARS = frozenset({TEXT, INT, FLOAT, BOOL, NONE, BYTES})
ATOMS = {t.name: t for t in (*SCALARS, DOC, DOCS, VECTOR, RANGE, ANY, SCAN, KV, AHEAD, NEVER)}
ARITY = {"list": 1, "sequence": 1, "tuple": None}  # None: any number

_PYTHON: dict[type, Type] = {
    str: TEXT,
    int: INT,
    float: FLOAT,
    bool: BOOL,
    type(None): NONE,
    bytes: BYTES,
    range: RANGE,
}


def list_of(item: Type) -> Type:
    return Type("list", (item,))


def sequence_of(item: Type) -> Type:
    return Type("sequence", (item,))


def tuple_of(*items: Type) -> Type:
    return Type("tuple", items)


def is_immutable(t: Type) -> bool:
    """Can nobody change a value of this type while another operation reads it?"""
    if t.name in ("list", "tuple"):
        return all(map(is_immutable, t.args))
    return t not in (ANY, VECTOR) and t.name != "sequence"


def is_scalar(t: Type) -> bool:
    """A built-in immutable without parts: its methods and operators are known and run no user code."""
    return t in SCALARS


def item_type(t: Type) -> Type:
    """The type of what iterating over a value of type `t` gives."""
    if t.name in ("list", "sequence"):
        return t.args[0]
    if t.name == "tuple":
        return join(*t.args) if t.args else ANY
    return {"text": TEXT, "docs": DOC, "range": INT, "bytes": INT}.get(t.name, ANY)


def join(*types: Type) -> Type:
    """The smallest type that holds values of all the given ones."""
    kinds = [t for t in dict.fromkeys(types) if t != NEVER]
    if not kinds:
        return NEVER
    first, *rest = kinds
    if not rest:
        return first
    if first.name in ARITY and all(t.name == first.name and len(t.args) == len(first.args) for t in rest):
        return Type(first.name, tuple(join(*parts) for parts in zip(*(t.args for t in kinds), strict=True)))
    return ANY


def accepts(expected: Type, actual: Type) -> bool:
    """May a value of static type `actual` stand where `expected` is wanted? `any` is checked at run time instead."""
    if ANY in (expected, actual) or actual == NEVER or expected == actual:
        return True
    if expected == FLOAT:
        return actual in (INT, BOOL)
    if expected == INT:
        return actual == BOOL
    if expected.name == "sequence" and actual.name == "list":
        return accepts(expected.args[0], actual.args[0])
    if expected.name == actual.name and len(expected.args) == len(actual.args):
        return all(map(accepts, expected.args, actual.args))
    return False


def type_of(value: object) -> Type:
    """The type of a Python value, by its exact class; what is not a known immutable is `any`."""
    found = _PYTHON.get(type(value))
    if found is not None:
        return found
    if type(value) is tuple:
        return tuple_of(*map(type_of, value))
    if type(value) is list:
        kinds = {type(item) for item in value}
        return sequence_of(_PYTHON.get(kinds.pop(), ANY) if len(kinds) == 1 else ANY)
    return ATOMS["docs"] if type(value).__name__ == "Docs" else ATOMS["doc"] if type(value).__name__ == "Doc" else ANY


_TOKEN = re.compile(r"\s*([A-Za-z_]+|[<>,])")


def parse_type(text: str) -> Type:
    """The type that prints as `text`; ValueError if there is none."""
    tokens = [m[1] for m in _TOKEN.finditer(text)]
    if "".join(tokens) != re.sub(r"\s+", "", text) or not tokens:
        raise ValueError(f"malformed type {text!r}")
    stream = iter([*tokens, ""])

    def one(token: str, rest: Iterator[str]) -> tuple[Type, str]:
        nxt = next(rest)
        if nxt != "<":
            if token in ATOMS:
                return ATOMS[token], nxt
            if token == "tuple":
                return Type("tuple"), nxt
            raise ValueError(f"unknown type {token!r}")
        if token not in ARITY:
            raise ValueError(f"type {token!r} takes no arguments")
        args: list[Type] = []
        while nxt != ">":
            arg, nxt = one(next(rest), rest)
            args.append(arg)
            if nxt not in (",", ">"):
                raise ValueError(f"malformed type {text!r}")
        if ARITY[token] not in (None, len(args)):
            raise ValueError(f"type {token!r} takes {ARITY[token]} argument(s), not {len(args)}")
        return Type(token, tuple(args)), next(rest)

    found, end = one(next(stream), stream)
    if end:
        raise ValueError(f"malformed type {text!r}")
    return found

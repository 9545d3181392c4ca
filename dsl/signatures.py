"""The types that a signature promises and that arguments have."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Sequence
from typing import Any

from flowc.ir.types import (
    ANY,
    BOOL,
    BYTES,
    DOC,
    DOCS,
    FLOAT,
    INT,
    NONE,
    TEXT,
    Type,
    accepts,
    is_immutable,
    sequence_of,
    tuple_of,
    type_of,
)  # fmt: skip

_ANNOTATED: dict[Any, Type] = {
    str: TEXT,
    int: INT,
    float: FLOAT,
    bool: BOOL,
    bytes: BYTES,
    None: NONE,
    type(None): NONE,
}


def annotation_type(annotation: Any) -> Type:
    """The IR type of an annotation, as far as a call may rely on it: immutable scalars, documents, lists, tuples."""
    if annotation is inspect.Parameter.empty:
        return ANY
    try:
        if annotation in _ANNOTATED:
            return _ANNOTATED[annotation]
    except TypeError:
        return ANY
    name = getattr(annotation, "__name__", "")
    if name in ("Docs", "Doc") and getattr(annotation, "__module__", "") == "flowc.ir.values":
        return DOCS if name == "Docs" else DOC
    origin = typing.get_origin(annotation)
    args = typing.get_args(annotation)
    if origin is list or annotation is list:
        return sequence_of(annotation_type(args[0]) if args else ANY)
    if origin is tuple and len(args) == 2 and args[1] is Ellipsis:
        return sequence_of(annotation_type(args[0]))
    if origin is tuple and args:
        return tuple_of(*map(annotation_type, args))
    return ANY


def parameter_types(signature: inspect.Signature) -> tuple[Type, ...]:
    """The types that the annotations promise."""
    return tuple(annotation_type(p.annotation) for p in signature.parameters.values())


def argument_types(signature_types: Sequence[Type], args: Sequence[Any]) -> tuple[Type, ...]:
    """The types to compile for.

    What is annotated where the argument agrees, what the argument is where nothing is, else `any`.
    """
    found = []
    for declared, value in zip(signature_types, args, strict=True):
        actual = type_of(value)
        if declared == actual:
            found.append(declared)
        elif (
            (declared != ANY and accepts(declared, actual) and is_immutable(actual))
            or actual.name == "sequence"
            or is_immutable(actual)
        ):
            found.append(actual)
        else:
            found.append(ANY)
    return tuple(found)

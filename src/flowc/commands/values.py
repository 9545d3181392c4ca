"""Values between JSON and Python: what a line of inputs means to a workflow, and how its result is written."""

from __future__ import annotations

import base64
import dataclasses
import inspect
import json
import math
from collections.abc import Mapping
from typing import Any

from flowc.ir.errors import InputError
from flowc.ir.values import Docs

__all__ = ["bind_flags", "bind_json", "json_line", "to_json"]


def bind_flags(signature: inspect.Signature, flags: list[str]) -> inspect.BoundArguments:
    """The arguments that `--input k=v ...` gives. A parameter annotated `str`, or not at all, takes the text as it is;
    any other takes JSON."""
    given: dict[str, Any] = {}
    for flag in flags:
        name, equals, text = flag.partition("=")
        if not equals:
            raise InputError(f"--input {flag!r} has no `=`", hint="write --input name=value")
        if name in given:
            raise InputError(f"--input gives `{name}` twice")
        parameter = signature.parameters.get(name)
        annotation = parameter.annotation if parameter is not None else inspect.Parameter.empty
        if annotation in (str, "str", inspect.Parameter.empty, Any, "Any"):
            given[name] = text
            continue
        try:
            given[name] = json.loads(text)
        except ValueError as error:
            kind = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))
            raise InputError(
                f"--input {name} takes JSON (it is a {kind}): {error}", hint=f"as in --input {name}=3"
            ) from None
    return _bind(signature, (), given, "the flags --input")


def bind_json(signature: inspect.Signature, value: Any, where: str) -> inspect.BoundArguments:
    """The arguments that a JSON value means. An object gives them by name; a list in order, if the workflow takes more
    than one; anything else is the only one.

    An object is itself the only argument if the parameter is annotated as a mapping and no key of it is its name.
    """
    parameters = signature.parameters
    if isinstance(value, dict):
        only = next(iter(parameters.values())) if len(parameters) == 1 else None
        if only is None or only.name in value or not _takes_mapping(only):
            return _bind(signature, (), value, where)
    elif isinstance(value, list) and len(parameters) != 1:
        return _bind(signature, tuple(value), {}, where)
    return _bind(signature, (value,), {}, where)


def _takes_mapping(parameter: inspect.Parameter) -> bool:
    text = str(parameter.annotation).lower()
    return "dict" in text or "mapping" in text


def _bind(
    signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any], where: str
) -> inspect.BoundArguments:
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        shown = ", ".join(signature.parameters) or "none"
        raise InputError(f"{where}: {error}", hint=f"the workflow's parameters are: {shown}") from None
    bound.apply_defaults()
    return bound


def to_json(value: object) -> Any:
    """The value as JSON can hold it. Passages become objects; what JSON has no form for becomes `{"repr": ...}`."""
    return _encode(value, frozenset())


def _encode(value: object, above: frozenset[int]) -> Any:
    if value is None or (isinstance(value, bool | int | str) and type(value) in (bool, int, str)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"float": repr(float(value))}
    if id(value) in above:
        return {"repr": "..."}  # a list that holds itself
    inside = above | {id(value)}
    if isinstance(value, Docs):
        return [{f.name: getattr(doc, f.name) for f in dataclasses.fields(doc)} for doc in value]
    if isinstance(value, Mapping):
        if all(isinstance(key, str) for key in value):
            return {str(key): _encode(item, inside) for key, item in value.items()}
        return {"items": [[_encode(key, inside), _encode(item, inside)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return [_encode(item, inside) for item in value]
    if isinstance(value, set | frozenset):
        return sorted((_encode(item, inside) for item in value), key=lambda item: json.dumps(item, sort_keys=True))
    if isinstance(value, bytes | bytearray):
        return {"bytes": base64.b64encode(value).decode()}
    if isinstance(value, str | int):  # a subclass, an Enum among them
        return str(value) if isinstance(value, str) else int(value)
    dump = getattr(value, "model_dump", None)
    if callable(dump) and not isinstance(value, type):
        return _encode(dump(mode="json"), inside)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _encode(getattr(value, f.name), inside) for f in dataclasses.fields(value)}
    try:
        return {"repr": repr(value)}
    except Exception as error:  # a user's `__repr__`
        return {"repr": f"<{type(value).__name__}: {type(error).__name__} in its repr>"}


def json_line(data: object) -> bytes:
    """The data as one line of JSONL, newline included. Readable letters stay; half surrogate pairs are escaped."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False)
    try:
        return text.encode("utf-8") + b"\n"
    except UnicodeEncodeError:
        return json.dumps(data, ensure_ascii=True, allow_nan=False).encode("ascii") + b"\n"

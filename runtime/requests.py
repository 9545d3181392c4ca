"""What an operation on a resource asks of a backend, and what its answer means; operand types are checked here."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from flowc.ir.core import Op
from flowc.ir.errors import OperationTypeError, RunError
from flowc.ir.ops import OPS
from flowc.ir.options import as_stop, as_where
from flowc.ir.values import Doc, Docs

from .protocols import ChooseRequest, GenerateRequest, Generation, RerankRequest, SearchRequest, Ticket

LANE_OF = {name: spec.lane for name, spec in OPS.items() if spec.has_resource}
"""Kind of operation -> the lane its resource belongs to: llm, search, embed or rerank."""

_GENERATE_OPTIONS = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "stop", "seed")
OPTIONS: dict[str, tuple[str, ...]] = {
    "embed": (),
    "search": ("k", "nprobe", "where", "stop"),
    "rerank": ("k",),
    "generate": _GENERATE_OPTIONS,
    "choose": (),
    "parse": _GENERATE_OPTIONS,
}
"""What each kind takes besides its operands, as attributes or keyword operands; `timeout` goes for all."""

HINTS = ("ahead", "kv", "near")
"""Keyword operands that change when the answer is there and not what it is."""

ARITY = {"embed": 1, "search": 1, "rerank": 2, "generate": 1, "choose": 2, "parse": 1}


def _describe(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} ({text if len(text) <= 60 else text[:57] + '...'})"


def _wrong(what: str, expected: str, value: Any) -> OperationTypeError:
    return OperationTypeError(f"{what} must be {expected}, not {_describe(value)}")


def _text(what: str, value: Any) -> str:
    if not isinstance(value, str):
        raise _wrong(what, "a str", value)
    return value


def _count(what: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        index = getattr(type(value), "__index__", None)
        if index is None or isinstance(value, bool):
            raise _wrong(what, "an int", value)
        value = index(value)  # numpy's integers
    if value < 1:
        raise RunError(f"{what} must be at least 1, not {value}")
    return int(value)


def _number(what: str, value: Any) -> float:
    if isinstance(value, bool) or not hasattr(type(value), "__float__"):
        raise _wrong(what, "a number", value)
    return float(value)


def _ids(near: Any) -> tuple[int, ...]:
    return near.ids if isinstance(near, Docs) else ()


def timeout_of(value: Any) -> float | None:
    """Seconds, from the option `timeout` of an operation."""
    return None if value is None else _number("`timeout`", value)


def _generate(kind: str, operands: Sequence[Any], options: Mapping[str, Any], ticket: Ticket | None) -> GenerateRequest:
    prompt = operands[0]
    if type(prompt) is not str:
        _text(f"the prompt of `{kind}`", prompt)
    if not options:
        return GenerateRequest(prompt, ticket=ticket)
    fields: dict[str, Any] = {}
    for name, value in options.items():
        if value is None:
            continue
        what = f"`{name}` of `{kind}`"
        match name:
            case "max_tokens":
                fields[name] = _count(what, value)
            case "temperature" | "top_p" | "min_p":
                fields[name] = _number(what, value)
            case "top_k" | "seed":
                if isinstance(value, bool) or not isinstance(value, int):
                    raise _wrong(what, "an int", value)
                fields[name] = value
            case "stop":
                stops = (value,) if isinstance(value, str) else value
                if not isinstance(stops, list | tuple) or not all(isinstance(s, str) for s in stops):
                    raise _wrong(what, "a str or a list of str", value)
                fields[name] = tuple(stops)
            case "schema":
                fields[name] = value
            case "timeout":
                fields["timeout_s"] = timeout_of(value)
            case "drop":
                fields["drop"] = value
            case _:
                raise RunError(f"`{kind}` takes no option `{name}`")
    return GenerateRequest(prompt, ticket=ticket, **fields)


def make_request(kind: str, operands: Sequence[Any], options: Mapping[str, Any], ticket: Ticket | None = None) -> Any:
    """The backend's request for an operation, of its operands and options; OperationTypeError where a type is wrong."""
    match kind:
        case "generate" | "parse":
            return _generate(kind, operands, options, ticket)
        case "search":
            k, nprobe = options.get("k"), options.get("nprobe")
            query = _text("the query of `search`", operands[0])
            try:
                stop, where = as_stop(options.get("stop")), as_where(options.get("where"))
            except ValueError as error:
                raise RunError(f"`search` cannot be asked so: {error}") from None
            return SearchRequest(
                query,
                4 if k is None else _count("`k` of `search`", k),
                None if nprobe is None else _count("`nprobe` of `search`", nprobe),
                stop,
                where,
                ticket,
                _ids(options.get("near")),
            )
        case "embed":
            return _text("the text of `embed`", operands[0])
        case "rerank":
            query, docs = operands
            if not isinstance(docs, Docs):
                if not isinstance(docs, list | tuple) or not all(isinstance(d, Doc) for d in docs):
                    raise _wrong("the passages of `rerank`", "Docs", docs)
                docs = Docs(docs)
            k = options.get("k")
            return RerankRequest(
                _text("the query of `rerank`", query), docs, None if k is None else _count("`k` of `rerank`", k)
            )
        case "choose":
            prompt, choices = operands
            if (
                isinstance(choices, str)
                or not isinstance(choices, list | tuple)
                or not all(isinstance(c, str) for c in choices)
            ):
                raise _wrong("the options of `choose`", "a list of str", choices)
            if not choices:
                raise RunError("`choose` needs at least one option")
            drop = bool(options.get("drop"))
            return ChooseRequest(_text("the prompt of `choose`", prompt), tuple(choices), ticket, drop)
        case _:
            raise AssertionError(f"`{kind}` is no operation on a resource")


def read_answer(kind: str, request: Any, answer: Any, model: Any = None) -> Any:
    """The operation's value from the backend's answer: text for `generate`, an option for `choose`, and so on."""
    match kind:
        case "generate":
            if isinstance(answer, Generation):
                return answer.text
            raise RunError(f"the backend answered `generate` with {_describe(answer)}, not with a Generation")
        case "choose":
            if not isinstance(answer, int) or not 0 <= answer < len(request.options):
                raise RunError(
                    f"the backend answered `choose` with {_describe(answer)}, not with an index of its options"
                )
            return request.options[answer]
        case "parse":
            return parse_answer(model, request, answer)
        case "search" | "rerank":
            return answer if isinstance(answer, Docs) else Docs(answer)
        case _:
            return answer


@lru_cache(maxsize=256)
def schema_of(model: Any) -> str | None:
    """The JSON schema of the pydantic class of a `parse`, for its option `schema`; None where it has none."""
    try:
        return json.dumps(model.model_json_schema())
    except (
        Exception
    ):  # of a class that is unfinished, or that holds what JSON cannot: its own error comes when it parses
        return None


def parse_answer(model: Any, request: GenerateRequest, answer: Generation) -> Any:
    """The object in an answer. Raises pydantic's ValidationError, RunError where the answer was cut off."""
    try:
        return parse_object(model, answer.text)
    except ValueError as error:
        if answer.finish_reason != "length":
            raise
        raise RunError(
            f"the answer to `parse` was cut off after {answer.completion_tokens} tokens, its object incomplete",
            hint=f"raise max_tokens (it was {request.max_tokens}), or bound the texts and lists of "
            f"{getattr(model, '__name__', 'the model')} with max_length",
        ) from error


def parse_object(model: Any, text: str) -> Any:
    """An object of the pydantic model from the JSON in a text; what stands around the outermost `{...}` is let by."""
    first, last = text.find("{"), text.rfind("}")
    return model.model_validate_json(text[first : last + 1] if 0 <= first < last else text)


def label_of(op: Op) -> str:
    """How traces call an operation: `search @pydocs`, `tool lookup`, `call @inner`, `ivf.scan @pydocs`."""
    return _label(op, op.name)


def told_of(op: Op) -> str:
    """How messages call an operation: as the user wrote it, whatever it was split into."""
    return _label(op, _WRITTEN.get(op.name, op.name))


_WRITTEN = {**dict.fromkeys(("ivf.begin", "ivf.scan", "ivf.partial", "ivf.finish"), "search"), "llm.each": "generate"}


def _label(op: Op, shown: str) -> str:
    for name, sign in (("resource", "@"), ("callee", "@"), ("tool", "")):
        value = op.attrs.get(name)
        if isinstance(value, str):
            return f"{shown} {sign}{value}"
    return shown


def batch_key_of(kind: str, backend: Any, request: Any) -> tuple[Any, ...]:
    """Requests with equal keys may share a call: the op table's attributes, as requested, and the backend's own key."""
    names = OPS[kind].batch_key or ()
    own = tuple(getattr(request, n) for n in names if n != "resource")
    key = getattr(backend, "batch_key", None)
    if key is None or kind in ("choose", "embed", "rerank"):
        return ("generate" if kind == "parse" else kind, *own)
    return ("generate" if kind == "parse" else kind, *own, key(request))

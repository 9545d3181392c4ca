"""What the passes know of prompts: their parts, what is known of one early, how long it is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce

from flowc.ir.core import Attr, Attrs, Graph, Op, Value, walk
from flowc.ir.templates import join_template, split_template
from flowc.ir.types import NEVER, TEXT, is_immutable

from .cost import CostModel
from .facts import Facts, texts

MAX_PARTS = 64  # of one prompt: a transcript of a thousand turns is a template in a template, a thousand times


@dataclass(frozen=True, slots=True)
class Slot:
    """A part of a prompt that only the run knows, and how it is formatted."""

    value: Value
    form: str = ""

    @property
    def shows_safely(self) -> bool:
        """Can it be formatted at any time: without an effect, without an error, always to the same text?"""
        return self.form in ("", "!r", "!s", "!a") and is_immutable(self.value.type) and self.value.type != NEVER


Part = str | Slot


def parts_of(prompt: Value, facts: Facts, *, into_fused: bool = False) -> list[Part]:
    """The parts of a prompt in order: constants, and slots; a template in a template is its parts.

    A slot's value is visible wherever the prompt is; with `into_fused` it may also be one inside a fused run.
    """
    out: list[Part] = []
    stack: list[Part] = [Slot(prompt)]
    while stack:
        part = stack.pop()
        if isinstance(part, str):
            if part:
                out.append(part)
            continue
        op = facts.definer(part.value)
        while into_fused and op is not None and op.name == "fused":
            part = Slot(op.regions[0].yields[[v.name for v in op.results].index(part.value.name)], part.form)
            op = facts.definer(part.value)
        if op is None or op.name != "template" or part.form or len(out) + len(stack) + len(op.operands) > MAX_PARTS:
            literal = op.attrs["value"] if op is not None and op.name == "const" and not part.form else None
            out.append(literal if isinstance(literal, str) else part)
            continue
        segments = split_template(str(op.attrs["text"]))
        forms = texts(op.attrs.get("formats")) or ("",) * len(op.operands)
        for segment, slot, form in zip(reversed(segments[1:]), reversed(op.operands), reversed(forms), strict=True):
            stack += segment, Slot(slot, form)
        stack.append(segments[0])
    return out


def own_parts(template: Op) -> Iterator[Part]:
    """The parts of a template itself."""
    first, *segments = split_template(str(template.attrs["text"]))
    forms = texts(template.attrs.get("formats")) or ("",) * len(template.operands)
    if first:
        yield first
    for segment, slot, form in zip(segments, template.operands, forms, strict=True):
        yield Slot(slot, form)
        if segment:
            yield segment


def template_of(parts: Sequence[Part], result: Value, like: Op) -> Op:
    """A template with these parts, where `like` stands in the source."""
    segments, slots = [""], []
    for part in parts:
        if isinstance(part, str):
            segments[-1] += part
        else:
            slots.append(part)
            segments.append("")
    attrs: dict[str, Attr] = {"text": join_template(tuple(segments))}
    if any(s.form for s in slots):
        attrs["formats"] = tuple(s.form for s in slots)
    return Op("template", tuple(s.value for s in slots), (result,), Attrs(attrs), loc=like.loc)


def tokens_of(part: Part, costs: CostModel) -> float:
    """How many tokens a part is predicted to have."""
    if isinstance(part, str):
        return len(part) / costs["chars_per_token"]
    if part.value.type == TEXT:
        return costs["slot_tokens"]
    return costs["docs_tokens"] if part.value.type.name in ("docs", "list", "sequence") else 1.0


def common_beginning(a: str, b: str) -> str:
    """The longest text that both begin with."""
    if b.startswith(a):
        return a
    return a[: next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), len(b))]


class Beginnings:
    """The constant text that every value of a text begins with, carried values and the results of branches included."""

    MAX_DEPTH = 100  # of a text that begins with a text that begins with ...

    def __init__(self, graph: Graph, facts: Facts) -> None:
        self._facts = facts
        self._known: dict[str, str] = {}
        self._open: dict[str, str] = {}  # carried values under way: what they are assumed to begin with
        self._carried: dict[str, tuple[Value, Value]] = {}  # parameter or result of a loop -> first and next value
        self._joined: dict[str, list[Value]] = {}
        for op in walk(graph.body):
            match op.name:
                case "while" | "foreach":
                    skip = 1 if op.name == "foreach" else 0
                    following = op.regions[-1].yields[1 if op.name == "while" or op.attrs.get("breaks") else 0 :]
                    for region in op.regions:
                        self._carry(region.params[skip:], op.operands[skip:], following)
                    self._carry(op.results, op.operands[skip:], following)
                case "if":
                    for i, v in enumerate(op.results):
                        self._joined[v.name] = [region.yields[i] for region in op.regions]
                case _:
                    pass

    def _carry(self, names: Sequence[Value], first: Sequence[Value], following: Sequence[Value]) -> None:
        for v, a, b in zip(names, first, following, strict=False):
            self._carried[v.name] = (a, b)

    def of(self, value: Value, depth: int = 0) -> str:
        """What the value certainly begins with; empty where nothing is known."""
        found = self._open.get(value.name)
        if found is None:
            found = self._known.get(value.name)
        if found is None:
            if depth > self.MAX_DEPTH:
                return ""
            found = self._found(value, depth + 1)
            if not self._open:  # else it may rest on an assumption
                self._known[value.name] = found
        return found

    def _found(self, value: Value, depth: int) -> str:
        carried = self._carried.get(value.name)
        if carried is not None:
            return self._invariant(value.name, *carried, depth)
        if value.name in self._joined:
            return reduce(common_beginning, (self.of(v, depth) for v in self._joined[value.name]))
        op = self._facts.definer(value)
        if op is None:
            return ""
        if op.name == "fused":
            return self.of(op.regions[0].yields[[v.name for v in op.results].index(value.name)], depth)
        if op.name == "const":
            return literal if isinstance(literal := op.attrs["value"], str) else ""
        if op.name != "template":
            return ""
        parts = ""
        for part in own_parts(op):
            if isinstance(part, str):
                parts += part
            else:
                return parts + (self.of(part.value, depth) if not part.form and part.value.type == TEXT else "")
        return parts

    def _invariant(self, name: str, first: Value, following: Value, depth: int) -> str:
        """The longest beginning of the first value that a turn of the loop keeps."""
        assumed = self.of(first, depth)
        while assumed:
            self._open[name] = assumed
            kept = common_beginning(assumed, self.of(following, depth))
            del self._open[name]
            if kept == assumed:
                break
            assumed = kept
        return assumed

"""What the passes know of prompts: their parts, what is known of one early, how long it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flowc.ir.core import Attr, Attrs, Op, Value
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

"""The text of a `template` operation: constant segments with a `{}` for each slot; `{{` and `}}` are braces."""

from __future__ import annotations

import re
from functools import lru_cache

_BRACE = re.compile(r"\{\{|\}\}|\{\}|[{}]")


@lru_cache(maxsize=4096)
def split_template(text: str) -> tuple[str, ...]:
    """The constant segments, braces unescaped: one more than there are slots. ValueError for a lone brace.

    >>> split_template("Q: {} {{json}}")
    ('Q: ', ' {json}')
    """
    segments: list[str] = []
    current: list[str] = []
    end = 0
    for match in _BRACE.finditer(text):
        current.append(text[end : match.start()])
        end = match.end()
        if match[0] == "{}":
            segments.append("".join(current))
            current = []
        elif len(match[0]) == 2:
            current.append(match[0][0])
        else:
            raise ValueError(
                f"a lone `{match[0]}` at position {match.start()}; a brace is written twice, a slot is `{{}}`"
            )
    current.append(text[end:])
    return (*segments, "".join(current))


def join_template(segments: tuple[str, ...]) -> str:
    """The text that splits into these segments.

    >>> join_template(("Q: ", " {json}"))
    'Q: {} {{json}}'
    """
    return "{}".join(s.replace("{", "{{").replace("}", "}}") for s in segments)


__all__ = ["join_template", "split_template"]

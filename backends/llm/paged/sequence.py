"""One request inside the engine: its tokens, what of them is computed, the blocks that hold it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .prefix_tree import Node


@dataclass(slots=True, eq=False)
class Sequence:
    """Tokens to compute and to continue. `computed` of them have their keys and values in `blocks`.

    The first `len(nodes)` blocks belong to the prefix tree, the others to this sequence alone. A sequence to be scored has
    `scored` set: the position of the first token whose probability is asked; nothing is decoded then.
    """

    tokens: list[int]
    order: int  # of arrival
    priority: float = 0.0  # lower goes first
    limit: int = 0  # most tokens to decode
    scored: int | None = None
    owner: Any = None  # what takes the tokens: see Engine
    computed: int = 0
    blocks: list[int] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    log_probability: float = 0.0
    is_finished: bool = False
    prompt_tokens: int = 0  # what came with the request; the tokens after them were decoded

    def __post_init__(self) -> None:
        self.prompt_tokens = len(self.tokens)

    @property
    def pending(self) -> int:
        """How many tokens are still to be computed."""
        return len(self.tokens) - self.computed

    @property
    def reusable(self) -> int:
        """How many tokens may come from the cache: the logits of the others are needed."""
        return (self.scored if self.scored is not None else len(self.tokens)) - 1

    @property
    def rank(self) -> tuple[float, int]:
        return self.priority, self.order

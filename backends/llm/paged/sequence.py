"""One request inside the engine: its tokens, what of them is computed, the blocks that hold it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from .prefix_tree import Node


class Owner(Protocol):
    """Who asked for a sequence. Called from the engine's thread, between steps."""

    def accept(self, sequence: Sequence, token: int) -> bool:
        """Takes the next decoded token; does the sequence go on?"""
        ...

    def targets(self, sequence: Sequence) -> list[int]:
        """The tokens whose probabilities a scored sequence is for: the first is at position `sequence.scored`."""
        ...

    def is_wanted(self, sequence: Sequence) -> bool:
        """Does anybody still wait for it?"""
        ...

    def ended(self, sequence: Sequence, error: Exception | None) -> None:
        """The sequence is done, was no longer wanted, or failed."""
        ...


@dataclass(slots=True, eq=False)
class Sequence:
    """Tokens to compute and to continue. `computed` of them have their keys and values in `blocks`.

    The first `len(nodes)` blocks belong to the prefix tree, the others to this sequence alone. A sequence to be scored
    has `scored` set: the position of the first token whose probability is asked; nothing is decoded then.
    """

    tokens: list[int]
    owner: Owner
    order: int = 0  # of arrival
    priority: float = 0.0  # lower goes first
    limit: int = 0  # most tokens to decode
    scored: int | None = None
    computed: int = 0
    reached: int = 0  # the most that were ever computed: less than it again is work done twice
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

"""One request inside the engine: its tokens, what of them is computed, the blocks that hold it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch

from flowc.runtime.protocols import Ticket

from .prefix_tree import Node

Rank = tuple[bool, float, int]  # (runs in the background, its program's priority, arrival): lower goes first


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

    The first `len(nodes)` blocks belong to the prefix tree. The others are this sequence's; of a fork the last may be
    shared until somebody writes it. What is done:

    - by default all tokens are computed, then tokens decoded until the owner says stop;
    - with `until` set the first `until` tokens are computed and nothing is decoded;
    - with `scored` set, the position of the first token whose probability is asked, all are computed and scored.
    """

    tokens: list[int]
    owner: Owner
    order: int = 0  # of arrival
    ticket: Ticket | None = None  # its program's turn
    is_background: bool = False  # gives way to all that are not
    limit: int = 0  # most tokens to decode
    until: int | None = None
    scored: int | None = None
    drops: int = 0  # nobody continues its request, which has so many sequences: what only they used makes room first
    stays: bool = False  # keeps its blocks when it is done or paused, until they are needed: a session's
    choose: Callable[[torch.Tensor], int] | None = None  # its next token from its logits; None: the engine's `pick`
    computed: int = 0
    reached: int = 0  # the most that were ever computed: less than it again is work done twice
    blocks: list[int] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    log_probability: float = 0.0
    is_finished: bool = False
    prompt_tokens: int = 0  # what came with the request; the tokens after them were decoded
    rank: Rank = (False, 0.0, 0)  # as of this step, see `own_rank`
    waits_for: Sequence | None = None  # who is computing its next block

    def __post_init__(self) -> None:
        self.prompt_tokens = len(self.tokens)

    @property
    def pending(self) -> int:
        """How many tokens are still to be computed."""
        return (len(self.tokens) if self.until is None else self.until) - self.computed

    @property
    def reusable(self) -> int:
        """How many tokens may come from the cache: the logits of the others are needed."""
        if self.until is not None:
            return self.until
        return (self.scored if self.scored is not None else len(self.tokens)) - 1

    @property
    def own_rank(self) -> Rank:
        """Its turn as its program's ticket says now."""
        return self.is_background, self.ticket.priority if self.ticket is not None else 0.0, self.order

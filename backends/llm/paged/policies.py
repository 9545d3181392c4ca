"""Which cached block goes first. A policy gives every node a key; among those that may go, the smallest key goes.

The workflow-aware one follows Pan et al., "KVFlow: Efficient Prefix Caching for Accelerating LLM-Based Multi-Agent
Workflows", NeurIPS 2025: blocks that no program has announced (the varying suffixes) before those that some program
will read again, of these the one whose next reader is the most steps away. PGDSF is RAGCache's (Jin et al., 2024) and
orders what nothing is known of; LRU, LFU and SLRU are what other engines offer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from .prefix_tree import Node

Key = tuple[float, ...]
UNKNOWN = float("inf")  # steps to execution of what nobody has announced


def recompute_cost(node: Node) -> float:
    """What a block costs to compute again, in units of the first block: later ones attend to all before them."""
    return 1.0 + node.depth / 64


class Policy:
    """Keys from what the tree notes of a node: `last_use`, `uses`, `depth`, `steps`."""

    name: ClassVar[str]

    def used(self, node: Node) -> None:
        """The node was computed, or a request starts from it."""

    def evicted(self, node: Node) -> None:
        """The node lost its block."""

    def dropped(self, node: Node) -> None:
        """Who computed the node says that nobody reads it again, and nobody else has."""

    def key(self, node: Node) -> Key:
        raise NotImplementedError


class LRU(Policy):
    """The one used longest ago."""

    name = "lru"

    def key(self, node: Node) -> Key:
        return (node.last_use,)


class LFU(Policy):
    """The one used least often, of these the one used longest ago."""

    name = "lfu"

    def key(self, node: Node) -> Key:
        return (node.uses, node.last_use)


class SLRU(Policy):
    """What was used once before what was used again, each part by last use."""

    name = "slru"

    def key(self, node: Node) -> Key:
        return (node.uses > 1, node.last_use)


class PGDSF(Policy):
    """The least of clock + uses x cost. The clock is the greatest value that was evicted, so that old glory fades."""

    name = "pgdsf"

    def __init__(self) -> None:
        self.clock = 0.0

    def used(self, node: Node) -> None:
        node.score = self.clock + node.uses * recompute_cost(node)

    def evicted(self, node: Node) -> None:
        self.clock = max(self.clock, node.score)

    def dropped(self, node: Node) -> None:
        node.score = 0.0  # before all that may be read again

    def key(self, node: Node) -> Key:
        return (node.score, node.last_use)


class Workflow(PGDSF):
    """What nobody announced, by PGDSF; then the farthest from its next use.

    Of equal steps what was announced last is the farthest, for the other programs have gone on since; of what was
    announced together the cheapest to compute again goes first.
    """

    name = "workflow"

    def evicted(self, node: Node) -> None:
        if node.steps == UNKNOWN:
            super().evicted(node)

    def key(self, node: Node) -> Key:
        if node.steps == UNKNOWN:
            return (0.0, node.score, node.last_use)
        return (1.0, -node.steps, -node.said_at, recompute_cost(node), node.last_use)


POLICIES: dict[str, Callable[[], Policy]] = {p.name: p for p in (Workflow, LRU, LFU, SLRU, PGDSF)}

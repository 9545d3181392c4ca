"""Which token blocks are cached: a radix tree over exact tokens, a node per full block.

A child is found by its tokens themselves, so there are no hash collisions. Requests hold the nodes that they use; what
nobody holds may be evicted, leaves first, the one that was used longest ago before the others.

Zheng et al., "SGLang: Efficient Execution of Structured Language Model Programs", 2024, section 3.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence

from .pool import KVPool

Tokens = tuple[int, ...]


class Node:
    """One cached block after the blocks of its ancestors. `holders` counts the requests that use it now."""

    __slots__ = ("block", "children", "holders", "last_use", "parent", "tokens")

    def __init__(self, tokens: Tokens, block: int, parent: Node | None) -> None:
        self.tokens = tokens
        self.block = block
        self.parent = parent
        self.children: dict[Tokens, Node] = {}
        self.holders = 0
        self.last_use = 0


class PrefixTree:
    """The cached prefixes over one pool. The tree owns one reference of every block that it holds."""

    def __init__(self, pool: KVPool) -> None:
        self.pool = pool
        self.root = Node((), 0, None)
        self.size = 0  # nodes, the root aside
        self.evictable = 0  # nodes that nobody holds: whoever holds a node holds its ancestors, so all of these can go
        self._clock = 0
        self._leaves: list[tuple[int, int, Node]] = []  # (last use, tie, node): stale entries are skipped
        self._ties = 0

    def match(self, tokens: Sequence[int], limit: int) -> list[Node]:
        """The nodes that hold the longest cached prefix of `tokens`, at most `limit` tokens of it."""
        size = self.pool.block_size
        found: list[Node] = []
        node = self.root
        for at in range(0, min(limit, len(tokens)) // size * size, size):
            child = node.children.get(tuple(tokens[at : at + size]))
            if child is None:
                break
            found.append(child)
            node = child
        return found

    def hold(self, nodes: Sequence[Node]) -> None:
        """A request uses these nodes: they stay."""
        self._clock += 1
        for node in nodes:
            self.evictable -= not node.holders
            node.holders += 1
            node.last_use = self._clock

    def let_go(self, nodes: Sequence[Node]) -> None:
        """A request is done with these nodes."""
        self._clock += 1
        for node in nodes:
            node.holders -= 1
            self.evictable += not node.holders
            node.last_use = self._clock
            if not node.holders and not node.children:
                self._offer(node)

    def insert(self, parent: Node | None, tokens: Tokens, block: int) -> Node:
        """The node for a block that was just filled, held by its request.

        If another request filled the same block first, its node is given back and the caller's block is not kept: use
        `node.block` from then on, and release the own one.
        """
        above = parent or self.root
        node = above.children.get(tokens)
        if node is None:
            node = above.children[tokens] = Node(tokens, block, above)
            self.pool.share(block)
            self.size += 1
            self.evictable += 1
        self.hold([node])
        return node

    def evict(self, blocks: int) -> int:
        """Frees up to `blocks` blocks that nobody uses, the ones used longest ago first; how many it freed."""
        freed = 0
        while freed < blocks and self._leaves:
            last_use, _, node = heapq.heappop(self._leaves)
            is_stale = node.holders or node.children or node.last_use != last_use or node.parent is None
            if is_stale:
                continue
            parent = node.parent
            assert parent is not None
            del parent.children[node.tokens]
            node.parent = None
            self.pool.release([node.block])
            self.size -= 1
            self.evictable -= 1
            freed += 1
            if parent is not self.root and not parent.holders and not parent.children:
                self._offer(parent)
        return freed

    def nodes(self) -> Iterator[Node]:
        """All nodes, the root aside."""
        pending = list(self.root.children.values())
        while pending:
            node = pending.pop()
            yield node
            pending.extend(node.children.values())

    def _offer(self, node: Node) -> None:
        self._ties += 1
        heapq.heappush(self._leaves, (node.last_use, self._ties, node))

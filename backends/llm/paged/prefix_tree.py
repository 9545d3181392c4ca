"""Which token blocks are cached, and where: a radix tree over exact tokens, a node per full block, over two tiers.

A child is found by its tokens themselves, so there are no hash collisions. Requests hold the nodes that they use; what
nobody holds may leave the device, leaves first, in the order of a policy. Where there is a host pool, a block that will
be wanted again is copied there first and its node stays:

    DEVICE -> OFFLOADING -> HOST -> LOADING -> DEVICE

An offloading block can still be read, and stays if it is wanted again; a loading one cannot be read yet. A node that is
on the device has all its ancestors there. Programs announce what they will read with `hint`: steps to execution, the
least over programs, and on every node the least over its children.

Zheng et al., "SGLang: Efficient Execution of Structured Language Model Programs", 2024, section 3; Pan et al.,
"KVFlow: Efficient Prefix Caching for Accelerating LLM-Based Multi-Agent Workflows", NeurIPS 2025.
"""

from __future__ import annotations

import enum
import heapq
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass

from .copies import Copier, Copy, Costs
from .policies import UNKNOWN, Key, Policy, Workflow
from .pool import KVPool

Tokens = tuple[int, ...]
EVICT_AHEAD = 8  # blocks that are sent to the host together: the next request for room finds some done


class State(enum.Enum):
    DEVICE = "device"  # on the device; perhaps on the host too
    OFFLOADING = "offloading"  # on the device, on its way to the host
    HOST = "host"  # on the host alone
    LOADING = "loading"  # on the host, on its way to the device


@dataclass(slots=True)
class Hint:
    """A program will read the prefix `tokens` (whole blocks) in `steps` steps, it said at `said_at`."""

    tokens: Tokens
    steps: float
    said_at: int


class Node:
    """One cached block after the blocks of its ancestors. `holders` counts the requests and loads that use it now."""

    __slots__ = (
        "block",
        "children",
        "depth",
        "hints",
        "holders",
        "host",
        "keepers",
        "last_use",
        "on_device",
        "parent",
        "pinned_until",
        "said_at",
        "score",
        "state",
        "steps",
        "tokens",
        "uses",
    )

    def __init__(self, tokens: Tokens, parent: Node | None) -> None:
        self.tokens = tokens
        self.parent = parent
        self.children: dict[Tokens, Node] = {}
        self.depth: int = parent.depth + 1 if parent is not None else 0  # in blocks, itself included
        self.state = State.DEVICE
        self.block: int | None = None  # on the device
        self.host: int | None = None  # on the host
        self.on_device = 0  # children that have a block there and are not leaving
        self.holders = 0
        self.last_use = 0
        self.uses = 0
        self.score = 0.0  # of the policy
        self.steps = UNKNOWN  # to the next announced use, of itself or of what is below
        self.said_at = 0  # when that was announced, by the count of uses
        self.hints: dict[Hashable, Hint] = {}  # whose path ends here, as far as it is cached
        self.keepers = 0  # who asked that it stays
        self.pinned_until = 0.0

    @property
    def device_block(self) -> int:
        assert self.block is not None, "a node that is not on the device was read"
        return self.block


class _Candidates:
    """The nodes that may go, by key. Whoever changes what a key is made of has the node considered again."""

    def __init__(self, key: Callable[[Node], Key]) -> None:
        self._key = key
        self._heap: list[tuple[Key, int, Node]] = []
        self._offered: dict[Node, Key] = {}
        self._ties = 0

    def consider(self, node: Node, may_go: bool) -> None:
        """Takes a node in, or out."""
        if not may_go:
            self._offered.pop(node, None)
            return
        key = self._key(node)
        if self._offered.get(node) != key:
            self._offered[node] = key
            self._ties += 1
            heapq.heappush(self._heap, (key, self._ties, node))

    def first(self) -> Node | None:
        """The node that goes first; it stays in."""
        while self._heap:
            key, _, node = self._heap[0]
            if self._offered.get(node) == key:
                return node
            heapq.heappop(self._heap)
        return None

    def __contains__(self, node: Node) -> bool:
        return node in self._offered


class PrefixTree:
    """The cached prefixes. The tree owns one reference of every block, in either pool, that its nodes name."""

    def __init__(
        self,
        pool: KVPool,
        policy: Policy | None = None,
        host: KVPool | None = None,
        copier: Copier | None = None,
        costs: Costs | None = None,
    ) -> None:
        assert (host is None) == (copier is None)
        self.pool = pool
        self.policy = policy or Workflow()
        self.host = host
        self.costs = costs or Costs()
        self.root = Node((), None)
        self.size = 0  # nodes with a block on the device
        self.evictable = 0  # those of them that nobody holds: holders of a node hold its ancestors, so all can go
        self.now = 0.0  # the clock of pins, in seconds: see `advance`
        self.evicted_blocks = self.offloaded_blocks = self.loaded_blocks = 0
        self._uses = self._ties = 0
        self._pins: list[tuple[float, int, Node]] = []
        self._copier = copier
        self._device_leaves = _Candidates(self._key)
        self._host_leaves = _Candidates(self._key)
        self._backups: dict[Node, None] = {}  # on the device and on the host, in the order of their copies
        self._hinted: dict[Hashable, Node] = {}
        self._kept: dict[Hashable, list[Node]] = {}
        self._loads: dict[Copy, tuple[list[Node], list[Node]]] = {}  # (whole path, nodes to load)
        self._offloads: dict[Copy, list[tuple[Node, int | None]]] = {}  # None: the host has it already

    # -- use
    def match(self, tokens: Sequence[int], limit: int) -> list[Node]:
        """The nodes of the longest cached prefix of `tokens`, at most `limit` tokens of it, in either tier."""
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
        """A request uses these nodes: they stay on the device."""
        self._uses += 1
        for node in nodes:
            node.last_use = self._uses
            node.uses += 1
            self.policy.used(node)
        self._retain(nodes)

    def let_go(self, nodes: Sequence[Node]) -> None:
        """A request is done with these nodes."""
        self._uses += 1
        for node in nodes:
            node.last_use = self._uses
        self._release(nodes)

    def drop(self, nodes: Sequence[Node], uses: int) -> None:
        """A request says that nobody continues it: the nodes that only its `uses` sequences have used go first."""
        for node in nodes:
            if node.uses <= uses:
                self.policy.dropped(node)
                self._consider(node)

    def insert(self, parent: Node | None, tokens: Tokens, block: int) -> Node:
        """The node for a block that was just filled, held by its request.

        If another request filled the same block first, its node is given back and the caller's block is not kept: use
        the node's block from then on, and release the own one. A node that was not on the device takes the block.
        """
        above = parent or self.root
        node = above.children.get(tokens)
        if node is None:
            node = above.children[tokens] = Node(tokens, above)
            size = self.pool.block_size
            going_on = [
                (k, h) for k, h in above.hints.items() if h.tokens[above.depth * size : node.depth * size] == tokens
            ]
            for key, hint in going_on:
                del above.hints[key]
                node.hints[key] = hint
                self._hinted[key] = node
                node.steps, node.said_at = min(  # which those above count already
                    (node.steps, node.said_at), (hint.steps, hint.said_at)
                )
        if node.block is None:  # new, on the host, or loading: then what is loaded is dropped when it arrives
            self.pool.share(block)
            self._put_on_device(node, block)
        self.hold([node])
        return node

    # -- what is known of the future
    def hint(self, key: Hashable, tokens: Sequence[int], steps: float) -> None:
        """Announces that a prefix is read in `steps` steps; takes the place of what `key` announced before."""
        self.release(key)
        size = self.pool.block_size
        whole = tuple(tokens[: len(tokens) // size * size])
        path = self.match(whole, len(whole))
        node = path[-1] if path else self.root
        node.hints[key] = Hint(whole, steps, self._uses)
        self._hinted[key] = node
        self._refresh_steps(node)

    def keep(self, key: Hashable, tokens: Sequence[int]) -> None:
        """What is cached of a prefix goes after everything else, until `key` keeps another or lets go of it.

        A block that goes all the same, because there is nothing else, is not brought back for it.
        """
        path = self.match(tokens, len(tokens))
        for node in path:
            node.keepers += 1
        self.unkeep(key)
        self._kept[key] = path
        for node in path:
            self._consider(node)

    def unkeep(self, key: Hashable) -> None:
        """What `key` kept is as any other prefix again."""
        for node in self._kept.pop(key, ()):
            node.keepers -= 1
            self._consider(node)

    def release(self, key: Hashable) -> None:
        """Takes an announcement back, if there is one."""
        node = self._hinted.pop(key, None)
        if node is not None:
            del node.hints[key]
            self._refresh_steps(node)

    def pin(self, tokens: Sequence[int], until: float) -> None:
        """What is cached of a prefix goes after everything that is not pinned, until the clock passes `until`."""
        for node in self.match(tokens, len(tokens)):
            if until > node.pinned_until:
                node.pinned_until = until
                self._ties += 1
                heapq.heappush(self._pins, (until, self._ties, node))
                self._consider(node)

    def advance(self, now: float) -> None:
        """Moves the clock of pins on."""
        self.now = now
        while self._pins and self._pins[0][0] <= now:
            self._consider(heapq.heappop(self._pins)[2])

    # -- room
    def evict(self, blocks: int, farther_than: float = -1.0) -> int:
        """Frees up to `blocks` blocks that nobody uses; how many it freed at once.

        With a host tier it may start copies instead, or wait for those under way: see `is_offloading`. Nodes whose next
        use is at most `farther_than` steps away stay; from 0 steps on so do those that are kept or pinned.
        """
        if sum(map(len, self._offloads.values())) >= blocks:
            return 0
        freed = 0
        leaving: list[tuple[Node, int | None]] = []
        while freed < blocks and len(leaving) < EVICT_AHEAD:
            node = self._device_leaves.first()
            if node is None or node.steps <= farther_than or (farther_than >= 0 and self._is_kept(node)):
                break
            is_last = all(c.block is None for c in node.children.values())  # else those below are leaving still
            if node.host is not None and is_last:
                self._leave_device(node)
                freed += 1
                continue
            target = None
            if node.host is None:
                target = self._host_room(node) if self._is_worth_keeping(node) else None
                if target is None and (leaving or not is_last):
                    break  # what is on its way will do
                if target is None:
                    self._forget(node)
                    freed += 1
                    continue
            self._set_leaving(node, True)
            leaving.append((node, target))
        if leaving:
            assert self.host is not None
            assert self._copier is not None
            pairs = [(node.device_block, target) for node, target in leaving if target is not None]
            job = Copy(self.pool, self.host, pairs)
            self._offloads[job] = leaving
            self._copier.submit(job)
        return freed

    @property
    def is_offloading(self) -> bool:
        """Are blocks on their way to the host? They will be free soon."""
        return bool(self._offloads)

    @property
    def is_loading(self) -> bool:
        return bool(self._loads)

    # -- from the host
    def load(self, path: Sequence[Node], farther_than: float = -1.0) -> Copy | None:
        """Starts to load the nodes of `path` that are on the host alone; None where there is no room for them.

        `path` goes from the root down. Its nodes are held until the load ends.
        """
        wanted = [n for n in path if n.state is State.HOST]
        if not wanted or self.host is None or self._copier is None:
            return None
        self._retain(path)
        pairs: list[tuple[int, int]] = []
        for node in wanted:
            block = self.pool.allocate()
            if block is None and self.evict(1, farther_than):
                block = self.pool.allocate()
            if block is None:
                break
            assert node.host is not None
            pairs.append((node.host, block))
        if not pairs:
            self._release(path)
            return None
        wanted = wanted[: len(pairs)]
        for node in wanted:
            node.state = State.LOADING
        job = Copy(self.host, self.pool, pairs)
        self._loads[job] = (list(path), wanted)
        self._copier.submit(job)
        return job

    def poll(self) -> None:
        """Takes note of the copies that ended."""
        if self._copier is None:
            return
        for job in self._copier.finished():
            if job in self._loads:
                self._loaded(job)
            else:
                self._offloaded(job)

    def _loaded(self, job: Copy) -> None:
        path, wanted = self._loads.pop(job)
        self.costs.note_load(job.copied, job.seconds)
        for i, (node, (_, block)) in enumerate(zip(wanted, job.pairs, strict=True)):
            is_there = i < job.copied and node.state is State.LOADING and node.parent is not None
            above = node.parent
            if is_there and above is not None and (above is self.root or above.block is not None):
                self._put_on_device(node, block)
                self.loaded_blocks += 1
                continue
            if node.state is State.LOADING:
                node.state = State.HOST
            self.pool.release([block])
        self._release(path)

    def _offloaded(self, job: Copy) -> None:
        assert self.host is not None
        for node, target in self._offloads.pop(job):
            if target is not None:
                self.offloaded_blocks += 1
                node.host = target
            self._backups[node] = None
            self._set_leaving(node, False)
            if not node.holders and all(c.block is None for c in node.children.values()):  # still wanted by nobody
                self._leave_device(node)

    # -- bookkeeping
    def _is_kept(self, node: Node) -> bool:
        return node.keepers > 0 or node.pinned_until > self.now

    def _key(self, node: Node) -> Key:
        return (float(self._is_kept(node)), *self.policy.key(node))

    def _consider(self, node: Node) -> None:
        free = not node.holders and node.parent is not None
        self._device_leaves.consider(node, free and node.state is State.DEVICE and not node.on_device)
        self._host_leaves.consider(node, free and node.state is State.HOST and not node.children)

    def _retain(self, nodes: Sequence[Node]) -> None:
        for node in nodes:
            if not node.holders and node.block is not None:
                self.evictable -= 1
            node.holders += 1
            self._consider(node)

    def _release(self, nodes: Sequence[Node]) -> None:
        for node in nodes:
            node.holders -= 1
            assert node.holders >= 0
            if not node.holders and node.block is not None:
                self.evictable += 1
            self._consider(node)

    def _put_on_device(self, node: Node, block: int) -> None:
        assert node.block is None
        assert node.parent is not None
        node.block = block
        node.state = State.DEVICE
        if node.host is not None:
            self._backups[node] = None
        self.size += 1
        self.evictable += not node.holders
        node.parent.on_device += 1
        self._consider(node)
        self._consider(node.parent)

    def _set_leaving(self, node: Node, is_leaving: bool) -> None:
        assert node.parent is not None
        node.state = State.OFFLOADING if is_leaving else State.DEVICE
        node.parent.on_device += -1 if is_leaving else 1
        if is_leaving:
            self._backups.pop(node, None)
        self._consider(node)
        self._consider(node.parent)

    def _leave_device(self, node: Node) -> None:
        assert node.block is not None
        assert node.parent is not None
        self.pool.release([node.block])
        node.block = None
        node.state = State.HOST
        self._backups.pop(node, None)
        self.size -= 1
        self.evictable -= not node.holders
        self.evicted_blocks += 1
        self.policy.evicted(node)
        node.parent.on_device -= 1
        self._consider(node)
        self._consider(node.parent)

    def _forget(self, node: Node) -> None:
        """Takes a node out of the tree, with what is below it on the host."""
        for child in list(node.children.values()):
            self._forget(child)
        if node.block is not None:
            self._leave_device(node)
        if node.host is not None:
            assert self.host is not None
            self.host.release([node.host])
            node.host = None
        parent = node.parent
        assert parent is not None
        del parent.children[node.tokens]
        node.parent = None
        self._consider(node)
        for key, hint in node.hints.items():
            parent.hints[key] = hint
            self._hinted[key] = parent
        node.hints = {}
        self._consider(parent)

    def _is_worth_keeping(self, node: Node) -> bool:
        """Should a block go to the host rather than nowhere? If it was or will be used again, or the host has room."""
        if self.host is None:
            return False
        return bool(node.children) or node.steps < UNKNOWN or node.uses > 1 or self.host.free > 0

    def _host_room(self, node: Node) -> int | None:
        """A block on the host; what goes for it is a copy of what the device has too, else what is worth less."""
        assert self.host is not None
        block = self.host.allocate()
        while block is None:
            if self._backups:
                twin = next(iter(self._backups))
                del self._backups[twin]
                assert twin.host is not None
                self.host.release([twin.host])
                twin.host = None
            else:
                least = self._host_leaves.first()
                if least is None or self._key(least) > self._key(node):
                    return None
                self._forget(least)
            block = self.host.allocate()
        return block

    def _refresh_steps(self, node: Node) -> None:
        """Brings `steps` up to date from a node to the root."""
        at: Node | None = node
        while at is not None:
            nearest = min(
                [(h.steps, h.said_at) for h in at.hints.values()]
                + [(c.steps, c.said_at) for c in at.children.values() if c.steps < UNKNOWN],
                default=(UNKNOWN, 0),
            )
            if nearest == (at.steps, at.said_at) and at is not node:
                break
            at.steps, at.said_at = nearest
            self._consider(at)
            at = at.parent

    # -- tests
    def nodes(self) -> Iterator[Node]:
        """All nodes, the root aside."""
        pending = list(self.root.children.values())
        while pending:
            node = pending.pop()
            yield node
            pending.extend(node.children.values())

    def check(self, device_owners: list[int]) -> None:
        """The invariants of the tree; adds its own references to `device_owners`."""
        nodes = list(self.nodes())
        host_owners = [0] * len(self.host.references if self.host is not None else [])
        for node in nodes:
            places = (node.block is not None, node.host is not None)
            allowed = {
                State.DEVICE: {(True, False), (True, True)},
                State.OFFLOADING: {(True, False), (True, True)},
                State.HOST: {(False, True)},
                State.LOADING: {(False, True)},
            }
            assert places in allowed[node.state], (node.state, places)
            staying = [c for c in node.children.values() if c.block is not None and c.state is State.DEVICE]
            assert node.on_device == len(staying)
            if node.block is not None:
                device_owners[node.block] += 1
                assert node.parent is self.root or (node.parent is not None and node.parent.block is not None)
            if node.host is not None:
                host_owners[node.host] += 1
            free = not node.holders
            assert (node in self._device_leaves) == (free and node.state is State.DEVICE and not node.on_device)
            assert (node in self._host_leaves) == (free and node.state is State.HOST and not node.children)
            assert node.steps == min(
                *(h.steps for h in node.hints.values()), *(c.steps for c in node.children.values()), UNKNOWN, UNKNOWN
            )
        for node in nodes:
            assert node.keepers == sum(kept.count(node) for kept in self._kept.values())
        on_device = [n for n in nodes if n.block is not None]
        assert (self.size, self.evictable) == (len(on_device), sum(not n.holders for n in on_device))
        for job in self._loads:
            for _, block in job.pairs:
                device_owners[block] += 1
        for job in self._offloads:
            for _, block in job.pairs:
                host_owners[block] += 1
        assert set(self._backups) == {n for n in on_device if n.host is not None and n.state is State.DEVICE}
        if self.host is not None:
            self.host.check()
            assert host_owners[1:] == self.host.references[1:], "references and owners differ on the host"

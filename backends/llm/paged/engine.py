"""The step loop: continuous batching with chunked prefill over a paged, shared KV cache.

Each step takes the next token of every decoding sequence and fills the rest of a token budget with chunks of prompts,
so that a long prompt never stops the others. A sequence starts from the longest cached prefix of its tokens; one whose
next block another sequence is just computing waits for that block instead of computing it again, so that a fan-out
prefills its common prefix once. When blocks run out, cached ones that nobody uses go first, to the host if there is a
host tier; then the sequence of the lowest rank gives its blocks back. Its full blocks stay cached as long as they can;
the rest is computed again later. A prefix on the host is loaded where that is sooner than computing it; who waits for a
load is skipped, and the others go on.

Yu et al., "Orca", OSDI 2022 (iteration-level scheduling); Agrawal et al., "Sarathi-Serve", OSDI 2024 (chunked prefill
beside decode); Zheng et al., "SGLang", 2024 (prefix tree).
"""

from __future__ import annotations

import enum
import threading
import time
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass

import torch

from flowc.ir.errors import ResourceError

from .attention import Layout, Span
from .copies import Copier, Copy, Costs, ThreadCopier
from .model import PagedModel
from .policies import POLICIES
from .prefix_tree import Node, PrefixTree, State
from .sequence import Sequence


def greedy(sequences: list[Sequence], logits: torch.Tensor) -> list[int]:
    """The likeliest token of every sequence."""
    tokens: list[int] = logits.argmax(-1).tolist()
    return tokens


BlockKey = tuple[Node | None, tuple[int, ...]]
Picker = Callable[[list[Sequence], torch.Tensor], list[int]]


@dataclass(slots=True)
class Stats:
    """What the engine computed and what it did not have to, in tokens and events."""

    steps: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    reused_tokens: int = 0
    recomputed_tokens: int = 0
    preemptions: int = 0
    evicted_blocks: int = 0
    offloaded_blocks: int = 0
    loaded_blocks: int = 0
    waits_for_load: int = 0
    waits_for_prefix: int = 0


class Start(enum.Enum):
    """May a waiting sequence start?"""

    NOW = enum.auto()
    LATER = enum.auto()  # what it needs is being computed or loaded
    NO_ROOM = enum.auto()


class Room(enum.Enum):
    """Is there room for a sequence's next tokens?"""

    MADE = enum.auto()
    SOON = enum.auto()  # blocks are on their way out
    NONE = enum.auto()


class Engine:
    """Runs sequences over one model. `submit`, `hint`, `release`, `pin` and `close` may be called from anywhere.

    `pick` chooses the next tokens of the sequences that decode, from logits of shape (sequences, vocab). `host_blocks`
    blocks of host memory take what must leave the device. `policy` is one of `policies.POLICIES`. An announced prefix
    that is at most `prefetch_steps` steps away is brought back from the host. `poison` fills free blocks with NaN.
    """

    def __init__(
        self,
        model: PagedModel,
        *,
        blocks: int,
        block_size: int = 16,
        max_step_tokens: int = 256,
        max_sequences: int = 64,
        host_blocks: int = 0,
        policy: str = "workflow",
        prefetch_steps: float = 1.0,
        pick: Picker = greedy,
        copier: Copier | None = None,
        costs: Costs | None = None,
        clock: Callable[[], float] = time.monotonic,
        poison: bool = False,
    ) -> None:
        self.model = model
        self._wake = threading.Condition()
        self.pool = model.new_pool(blocks, block_size, poison=poison)
        self.costs = costs or Costs()
        host = model.new_pool(host_blocks + 1, block_size, on_host=True, poison=poison) if host_blocks else None
        self._copier = (copier or ThreadCopier(self._notify)) if host is not None else None
        self.tree = PrefixTree(self.pool, POLICIES[policy](), host, self._copier, self.costs)
        self.block_size = block_size
        self.max_step_tokens = max_step_tokens
        self.max_sequences = max_sequences
        self.stats = Stats()
        self.running: list[Sequence] = []
        self.waiting: list[Sequence] = []
        self._pick = pick
        self._clock = clock
        self._prefetch_steps = prefetch_steps
        self._near: dict[Hashable, tuple[list[int], float]] = {}  # announced prefixes that should be on the device
        self._prefetches: dict[Hashable, Copy] = {}
        self._inbox: list[Sequence] = []
        self._commands: list[Callable[[], None]] = []
        self._arrivals = 0
        self._thread: threading.Thread | None = None
        self._is_closed = False

    # -- from any thread
    @property
    def capacity_tokens(self) -> int:
        """The longest sequence that the pool can hold."""
        return self.pool.usable * self.block_size

    def submit(self, sequences: Iterable[Sequence]) -> None:
        """Hands sequences over; their owners hear of every token and of the end."""
        with self._wake:
            if self._is_closed:
                raise ResourceError("the engine is closed", hint="open the backend again")
            for s in sequences:
                s.order = self._arrivals
                self._arrivals += 1
                self._inbox.append(s)
            if self._thread is None:
                self._thread = threading.Thread(target=self._loop, name=f"flowc-engine-{self.model.name}", daemon=True)
                self._thread.start()
            self._wake.notify()

    def hint(self, key: Hashable, tokens: Iterable[int], steps: float) -> None:
        """Announces that `key` (say, a program and its agent) reads a prefix in `steps` steps.

        It takes the place of what `key` announced before. Zero steps: now.
        """
        prefix = list(tokens)
        self._tell(lambda: self._hint(key, prefix, steps))

    def release(self, key: Hashable) -> None:
        """Takes an announcement back; what was being fetched for it is left where it is."""
        self._tell(lambda: self._unhint(key))

    def pin(self, tokens: Iterable[int], ttl_s: float) -> None:
        """What is cached of a prefix goes last for `ttl_s` seconds: a program will be back from a tool (Continuum)."""
        prefix = list(tokens)
        self._tell(lambda: self.tree.pin(prefix, self._clock() + ttl_s))

    def close(self) -> None:
        """Ends the threads; sequences that are not done end with an error."""
        with self._wake:
            self._is_closed = True
            self._wake.notify()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        if self._copier is not None:
            self._copier.close()

    def _tell(self, command: Callable[[], None]) -> None:
        with self._wake:
            self._commands.append(command)
            self._wake.notify()

    def _notify(self) -> None:
        with self._wake:
            self._wake.notify()

    # -- the engine's thread
    def _loop(self) -> None:
        with torch.inference_mode():
            while True:
                with self._wake:
                    while not (self._inbox or self.running or self.waiting or self._commands or self._is_closed):
                        self._wake.wait()
                    arrived, self._inbox = self._inbox, []
                    closed = self._is_closed
                self.waiting += arrived
                if closed:
                    self._end_all(ResourceError("the engine was closed", hint="open the backend again"))
                    return
                try:
                    if not self.step():
                        self._rest()
                except Exception as error:  # a step that fails fails its sequences, not the process
                    self._end_all(error)

    def _rest(self) -> None:
        """Waits for a copy to end: nothing could run."""
        with self._wake:
            if not (self._inbox or self._commands or self._is_closed):
                self._wake.wait(0.01)  # cancellations are polled

    def _end_all(self, error: Exception) -> None:
        for s in [*self.running, *self.waiting]:
            self._free(s)
            s.is_finished = True
            s.owner.ended(s, error)
        self.running, self.waiting = [], []

    def step(self) -> bool:
        """One forward pass over what the schedule chose, and what follows from it; False if nothing could run."""
        self._listen()
        for group in (self.running, self.waiting):
            for s in [s for s in group if not s.owner.is_wanted(s)]:
                self._finish(s, None)
        batch = self._schedule()
        if not batch:
            return False
        begin = time.perf_counter()
        logits = self._forward(batch)
        seconds = time.perf_counter() - begin
        total = sum(count for _, count in batch)
        prompts = sum(count for s, count in batch if count > 1)
        if 2 * prompts >= total:
            self.costs.note_prefill(total, seconds)
        self.stats.steps += 1
        decoding: list[tuple[Sequence, torch.Tensor]] = []
        for (s, count), table in zip(batch, logits, strict=True):
            self.stats.recomputed_tokens += max(0, min(s.reached, s.computed + count) - s.computed)
            if s.computed >= s.prompt_tokens:
                self.stats.decode_tokens += count
            else:
                self.stats.prefill_tokens += count
            self._computed(s, count)
            if table is None:
                continue
            if s.scored is not None:
                self._score(s, table, count)
                if not s.pending:
                    self._finish(s, None)
                continue
            decoding.append((s, table[-1]))
        if decoding:
            rows = torch.stack([row for _, row in decoding])
            for (s, _), token in zip(decoding, self._pick([s for s, _ in decoding], rows), strict=True):
                if s.owner.accept(s, token):
                    s.tokens.append(token)
                else:
                    self._finish(s, None)
        return True

    def _listen(self) -> None:
        """Takes note of what came from outside: announcements and copies that ended."""
        with self._wake:
            commands, self._commands = self._commands, []
        self.tree.advance(self._clock())
        for command in commands:
            command()
        self.tree.poll()
        self._prefetch()
        self.stats.evicted_blocks = self.tree.evicted_blocks
        self.stats.offloaded_blocks = self.tree.offloaded_blocks
        self.stats.loaded_blocks = self.tree.loaded_blocks

    def _hint(self, key: Hashable, tokens: list[int], steps: float) -> None:
        self.tree.hint(key, tokens, steps)
        if steps > self._prefetch_steps or self._copier is None:
            self._unfetch(key)
        else:
            self._near[key] = (tokens, steps)

    def _unhint(self, key: Hashable) -> None:
        self.tree.release(key)
        self._unfetch(key)

    def _unfetch(self, key: Hashable) -> None:
        self._near.pop(key, None)
        job = self._prefetches.pop(key, None)
        if job is not None:
            job.is_cancelled = True

    def _prefetch(self) -> None:
        """Loads near prefixes, the nearest first, one at a time, so that a cancelled one leaves nothing behind it."""
        if self._copier is None or self._copier.is_busy:
            return
        for key, (tokens, steps) in sorted(self._near.items(), key=lambda near: near[1][1]):
            path = self.tree.match(tokens, len(tokens))
            absent = sum(n.state is State.HOST for n in path)
            if absent and self.costs.loading_pays(absent, absent * self.block_size):
                job = self.tree.load(path, farther_than=steps)  # what is read sooner is not pushed out for it
                if job is not None:
                    self._prefetches[key] = job
                    return

    # -- choosing what to run
    def _schedule(self) -> list[tuple[Sequence, int]]:
        """(sequence, how many of its next tokens) for one step."""
        budget = self.max_step_tokens
        batch: list[tuple[Sequence, int]] = []
        self.running.sort(key=lambda s: (s.pending != 1, s.rank))  # who decodes goes first
        for s in list(self.running):
            if s not in self.running:  # it gave its blocks to one before it
                continue
            count = min(s.pending, budget)
            if count and self._make_room(s, count) is Room.MADE:
                batch.append((s, count))
                budget -= count
        self.waiting.sort(key=lambda s: s.rank)
        computing = {key for s in self.running if (key := self._next_block(s, len(s.nodes))) is not None}
        for s in list(self.waiting):
            if budget <= 0 or len(self.running) >= self.max_sequences:
                break
            may_start = self._admit(s, computing)
            if may_start is Start.LATER:
                continue
            if may_start is Start.NO_ROOM:
                break  # nobody overtakes it, or it might wait for ever
            count = min(s.pending, budget)
            room = self._make_room(s, count, may_preempt=False)
            if room is not Room.MADE:
                self._free(s)
                if self.running or batch or room is Room.SOON or self.tree.is_loading:
                    break
                self._finish(s, self._too_small(s))  # it has the whole pool to itself
                continue
            self.stats.reused_tokens += s.computed
            self.waiting.remove(s)
            self.running.append(s)
            batch.append((s, count))
            budget -= count
            following = self._next_block(s, len(s.nodes))
            if following is not None:
                computing.add(following)
        return [(s, n) for s, n in batch if s in self.running]

    def _next_block(self, s: Sequence, at: int, nodes: list[Node] | None = None) -> BlockKey | None:
        """What names the block after the first `at` of a sequence: the node above and its tokens; None if not full."""
        start = at * self.block_size
        tokens = tuple(s.tokens[start : start + self.block_size])
        above = s.nodes if nodes is None else nodes
        return (above[at - 1] if at else None, tokens) if len(tokens) == self.block_size else None

    def _admit(self, s: Sequence, computing: set[BlockKey]) -> Start:
        """Gives a waiting sequence its cached prefix, unless a block of it is being computed or loaded."""
        path = self.tree.match(s.tokens, s.reusable)
        resident = next((i for i, n in enumerate(path) if n.block is None), len(path))
        nodes, absent = path[:resident], path[resident:]
        at = len(nodes) * self.block_size
        following = self._next_block(s, len(nodes), nodes)
        if following in computing and at + self.block_size <= s.reusable:
            self.stats.waits_for_prefix += 1
            return Start.LATER
        need = -(-(len(s.tokens) + s.limit // 2) // self.block_size) - len(nodes)
        held = sum(1 for n in nodes if not n.holders)
        if self.running and self.pool.free + self.tree.evictable - held < need:
            return Start.NO_ROOM  # it would soon push somebody out
        if absent and self._is_coming(path, absent):
            self.stats.waits_for_load += 1
            return Start.LATER
        self.tree.hold(nodes)
        s.nodes = nodes
        s.blocks = [n.device_block for n in nodes]
        s.computed = at
        return Start.NOW

    def _is_coming(self, path: list[Node], absent: list[Node]) -> bool:
        """Are the next blocks of a sequence being loaded? Starts to load them where that is sooner than computing."""
        if absent[0].state is State.LOADING:
            return True
        there = next((i for i, n in enumerate(absent) if n.state is not State.HOST), len(absent))
        if not self.costs.loading_pays(there, there * self.block_size):
            return False
        return self.tree.load(path[: len(path) - len(absent) + there]) is not None or self.tree.is_offloading

    def _make_room(self, s: Sequence, count: int, *, may_preempt: bool = True) -> Room:
        """Blocks for the next `count` tokens of a sequence; evicts and preempts for them."""
        wanted = -(-(s.computed + count) // self.block_size)
        while len(s.blocks) < wanted:
            block = self.pool.allocate()
            if block is not None:
                s.blocks.append(block)
                continue
            if self.tree.evict(1):
                continue
            if self.tree.is_offloading:
                return Room.SOON
            if not may_preempt:
                return Room.NONE
            victim = max(self.running, key=lambda r: r.rank)
            if victim is s and len(self.running) == 1:
                if self.tree.is_loading:
                    return Room.SOON  # what is loaded for others can go when it has arrived
                self._finish(s, self._too_small(s))
                return Room.NONE
            self._preempt(victim)
            if victim is s:
                return Room.NONE
        return Room.MADE

    def _preempt(self, s: Sequence) -> None:
        """Takes a sequence's blocks; what is cached of it may still be there when it comes back."""
        self.stats.preemptions += 1
        self._free(s)
        self.running.remove(s)
        self.waiting.append(s)

    def _too_small(self, s: Sequence) -> ResourceError:
        return ResourceError(
            f"{len(s.tokens)} tokens do not fit into the KV cache, which holds {self.capacity_tokens}",
            code="F069",
            hint="give the backend more kv_blocks, or shorten the prompt",
        )

    # -- running it
    def _forward(self, batch: list[tuple[Sequence, int]]) -> list[torch.Tensor | None]:
        """For each sequence of the batch the logits that it needs, of shape (n, vocab); None for a chunk in between."""
        size = self.block_size
        tokens: list[int] = []
        positions: list[int] = []
        block: list[int] = []
        offset: list[int] = []
        rows: list[int] = []
        spans: list[Span] = []
        taken: list[int] = []
        device = self.model.device
        for s, count in batch:
            start, end = s.computed, s.computed + count
            first = len(tokens)
            tokens += s.tokens[start:end]
            positions += range(start, end)
            block += [s.blocks[p // size] for p in range(start, end)]
            offset += [p % size for p in range(start, end)]
            used = s.blocks[: -(-end // size)]
            spans.append(Span(slice(first, first + count), end, torch.tensor(used, device=device)))
            if s.scored is not None:
                wanted = [first + p - start for p in range(max(start, s.scored - 1), end)]
            else:
                wanted = [len(tokens) - 1] if end == len(s.tokens) else []
            rows += wanted
            taken.append(len(wanted))
        layout = Layout(self.pool, torch.tensor(block, device=device), torch.tensor(offset, device=device), spans)
        logits = self.model.forward(tokens, positions, layout, rows or [len(tokens) - 1])
        found: list[torch.Tensor | None] = []
        at = 0
        for n in taken:
            found.append(logits[at : at + n] if n else None)
            at += n
        return found

    def _computed(self, s: Sequence, count: int) -> None:
        """Takes note of computed tokens; every block that they filled becomes shareable.

        Of a scored sequence only its prompt does: nobody continues its options (Du et al., "PrefillOnly", 2025).
        """
        s.computed += count
        s.reached = max(s.reached, s.computed)
        size = self.block_size
        shared = s.computed if s.scored is None else min(s.computed, s.scored)
        while len(s.nodes) < shared // size:
            index = len(s.nodes)
            parent: Node | None = s.nodes[-1] if s.nodes else None
            own = s.blocks[index]
            node = self.tree.insert(parent, tuple(s.tokens[index * size : (index + 1) * size]), own)
            self.pool.release([own])  # the tree holds it now, or has another with the same content
            s.blocks[index] = node.device_block
            s.nodes.append(node)

    def _score(self, s: Sequence, logits: torch.Tensor, count: int) -> None:
        """Adds the log-probabilities of the asked tokens whose predictions these logits are."""
        assert s.scored is not None
        end = s.computed
        first = max(end - count, s.scored - 1)
        table = torch.log_softmax(logits.float(), dim=-1)
        targets = s.owner.targets(s)
        for row, position in enumerate(range(first, end)):
            s.log_probability += float(table[row, targets[position + 1 - s.scored]])

    # -- the end of a sequence
    def _finish(self, s: Sequence, error: Exception | None) -> None:
        self._free(s)
        for group in (self.running, self.waiting):
            if s in group:
                group.remove(s)
        s.is_finished = True
        s.owner.ended(s, error)

    def _free(self, s: Sequence) -> None:
        self.pool.release(s.blocks[len(s.nodes) :])
        self.tree.let_go(s.nodes)
        s.blocks, s.nodes, s.computed = [], [], 0

    def check(self) -> None:
        """The invariants of pool and tree, for tests: every reference has an owner."""
        self.pool.check()
        owners = [0] * len(self.pool.references)
        self.tree.check(owners)
        for s in self.running:
            for b in s.blocks[len(s.nodes) :]:
                owners[b] += 1
        assert owners[1:] == self.pool.references[1:], "references and owners differ"

"""The step loop: continuous batching with chunked prefill over a paged, shared KV cache.

Each step takes the next token of every decoding sequence and fills the rest of a token budget with chunks of prompts,
so that a long prompt never stops the others. A sequence starts from the longest cached prefix of its tokens; one whose
next block another sequence is just computing waits for that block instead of computing it again, so that a fan-out
prefills its common prefix once. When blocks run out, cached ones that nobody uses go first; then the sequence of the
lowest rank gives its blocks back and is computed again later.

Yu et al., "Orca", OSDI 2022 (iteration-level scheduling); Agrawal et al., "Sarathi-Serve", OSDI 2024 (chunked prefill
beside decode); Zheng et al., "SGLang", 2024 (prefix tree).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from flowc.ir.errors import ResourceError

from .attention import Layout, Span
from .model import PagedModel
from .prefix_tree import Node, PrefixTree
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
    waits_for_prefix: int = 0


class Engine:
    """Runs sequences over one model. `submit` may be called from anywhere, the rest happens on the engine's thread.

    `pick` chooses the next tokens of the sequences that decode, from logits of shape (sequences, vocab).
    """

    def __init__(
        self,
        model: PagedModel,
        *,
        blocks: int,
        block_size: int = 16,
        max_step_tokens: int = 256,
        max_sequences: int = 64,
        pick: Picker = greedy,
    ) -> None:
        self.model = model
        self.pool = model.new_pool(blocks, block_size)
        self.tree = PrefixTree(self.pool)
        self.block_size = block_size
        self.max_step_tokens = max_step_tokens
        self.max_sequences = max_sequences
        self.stats = Stats()
        self.running: list[Sequence] = []
        self.waiting: list[Sequence] = []
        self._pick = pick
        self._inbox: list[Sequence] = []
        self._wake = threading.Condition()
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

    def close(self) -> None:
        """Ends the thread; sequences that are not done end with an error."""
        with self._wake:
            self._is_closed = True
            self._wake.notify()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    # -- the engine's thread
    def _loop(self) -> None:
        with torch.inference_mode():
            while True:
                with self._wake:
                    while not (self._inbox or self.running or self.waiting or self._is_closed):
                        self._wake.wait()
                    arrived, self._inbox = self._inbox, []
                    closed = self._is_closed
                self.waiting += arrived
                if closed:
                    self._end_all(ResourceError("the engine was closed", hint="open the backend again"))
                    return
                try:
                    self.step()
                except Exception as error:  # a step that fails fails its sequences, not the process
                    self._end_all(error)

    def _end_all(self, error: Exception) -> None:
        for s in [*self.running, *self.waiting]:
            self._free(s)
            s.is_finished = True
            s.owner.ended(s, error)
        self.running, self.waiting = [], []

    def step(self) -> None:
        """One forward pass over what the schedule chose, and what follows from it."""
        for group in (self.running, self.waiting):
            for s in [s for s in group if not s.owner.is_wanted(s)]:
                self._finish(s, None)
        batch = self._schedule()
        if not batch:
            return
        logits = self._forward(batch)
        self.stats.steps += 1
        decoding: list[tuple[Sequence, torch.Tensor]] = []
        for (s, count), table in zip(batch, logits, strict=True):
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
            if count and self._make_room(s, count):
                batch.append((s, count))
                budget -= count
        self.waiting.sort(key=lambda s: s.rank)
        computing = {key for s in self.running if (key := self._next_block(s, len(s.nodes))) is not None}
        for s in list(self.waiting):
            if budget <= 0 or len(self.running) >= self.max_sequences:
                break
            if not self._admit(s, computing):
                continue
            count = min(s.pending, budget)
            if not self._make_room(s, count, may_preempt=False):
                self._free(s)
                if self.running or batch:
                    break
                self._finish(s, self._too_small(s))  # it has the whole pool to itself
                continue
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

    def _admit(self, s: Sequence, computing: set[BlockKey]) -> bool:
        """Gives a waiting sequence its cached prefix, unless it should wait for a block that is being computed."""
        nodes = self.tree.match(s.tokens, s.reusable)
        at = len(nodes) * self.block_size
        following = self._next_block(s, len(nodes), nodes)
        if following in computing and at + self.block_size <= s.reusable:
            self.stats.waits_for_prefix += 1
            return False
        need = -(-(len(s.tokens) + s.limit // 2) // self.block_size) - len(nodes)
        held = sum(1 for n in nodes if not n.holders)
        if self.running and self.pool.free + self.tree.evictable - held < need:
            return False  # it would soon push somebody out
        self.tree.hold(nodes)
        s.nodes = nodes
        s.blocks = [n.block for n in nodes]
        s.computed = at
        self.stats.reused_tokens += at
        return True

    def _make_room(self, s: Sequence, count: int, *, may_preempt: bool = True) -> bool:
        """Blocks for the next `count` tokens of a sequence; evicts and preempts for them."""
        wanted = -(-(s.computed + count) // self.block_size)
        while len(s.blocks) < wanted:
            block = self.pool.allocate()
            if block is not None:
                s.blocks.append(block)
                continue
            freed = self.tree.evict(1)
            if freed:
                self.stats.evicted_blocks += freed
                continue
            if not may_preempt:
                return False
            victim = max(self.running, key=lambda r: r.rank)
            if victim is s and len(self.running) == 1:
                self._finish(s, self._too_small(s))
                return False
            self._preempt(victim)
            if victim is s:
                return False
        return True

    def _preempt(self, s: Sequence) -> None:
        """Takes a sequence's blocks; what is cached of it may still be there when it comes back."""
        self.stats.preemptions += 1
        self.stats.recomputed_tokens += s.computed
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
        """Takes note of computed tokens; every block that they filled becomes shareable."""
        s.computed += count
        size = self.block_size
        while len(s.nodes) < s.computed // size:
            index = len(s.nodes)
            parent: Node | None = s.nodes[-1] if s.nodes else None
            own = s.blocks[index]
            node = self.tree.insert(parent, tuple(s.tokens[index * size : (index + 1) * size]), own)
            self.pool.release([own])  # the tree holds it now, or has another with the same content
            s.blocks[index] = node.block
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
        nodes = list(self.tree.nodes())
        for node in nodes:
            owners[node.block] += 1
        assert (self.tree.size, self.tree.evictable) == (len(nodes), sum(not n.holders for n in nodes))
        for s in self.running:
            for b in s.blocks[len(s.nodes) :]:
                owners[b] += 1
        assert owners[1:] == self.pool.references[1:], "references and owners differ"

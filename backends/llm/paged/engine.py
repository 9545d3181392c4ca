"""The step loop: continuous batching with chunked prefill over a paged, shared KV cache.

Each step takes the next token of every decoding sequence and fills the rest of a token budget with chunks of prompts,
so that a long prompt never stops the others. A sequence starts from the longest cached prefix of its tokens; one whose
next block another sequence is just computing waits for that block instead of computing it again, so that a fan-out
prefills its common prefix once. When blocks run out, cached ones that nobody uses go first, to the host if there is a
host tier; then the sequence of the last rank gives its blocks back. Its full blocks stay cached as long as they can;
the rest is computed again later. A prefix on the host is loaded where that is sooner than computing it; who waits for a
load is skipped, and the others go on.

Who goes first, at every choice, is who has the lower `Ticket.priority` at this step, then who came first. What was
asked for ahead of time (`prefill`) comes after all others, until one of them waits for it: then it has that one's turn
(Sha et al., "Priority Inheritance Protocols", 1990). A prefix is found by its exact tokens in whole blocks, so what was
prefilled from the beginning of a text serves any prompt as far as their tokens agree: the last few of the beginning may
be cut otherwise there, and are then computed.

Yu et al., "Orca", OSDI 2022 (iteration-level scheduling); Agrawal et al., "Sarathi-Serve", OSDI 2024 (chunked prefill
beside decode); Zheng et al., "SGLang", 2024 (prefix tree).
"""

from __future__ import annotations

import enum
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import dataclass
from operator import attrgetter
from typing import TypeVar

import torch

from flowc.ir.errors import ResourceError
from flowc.runtime.compute import processor
from flowc.runtime.protocols import Ticket

from .attention import Layout, Span
from .copies import Copier, Copy, Costs, ThreadCopier
from .model import PagedModel
from .policies import POLICIES
from .prefix_tree import Node, PrefixTree, State
from .sequence import Owner, Sequence

T = TypeVar("T")


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


class _Ahead:
    """Wants a prefix computed before anybody asks for its continuation; hears when it is."""

    def __init__(self, is_computed: Callable[[], None], is_dropped: Callable[[], None]) -> None:
        self.is_computed, self.is_dropped = is_computed, is_dropped
        self.is_released = False

    def accept(self, sequence: Sequence, token: int) -> bool:
        raise AssertionError("a prefix decodes nothing")

    def targets(self, sequence: Sequence) -> list[int]:
        raise AssertionError("a prefix is not scored")

    def is_wanted(self, sequence: Sequence) -> bool:
        return not self.is_released

    def ended(self, sequence: Sequence, error: Exception | None) -> None:
        if not self.is_released:
            (self.is_computed if error is None else self.is_dropped)()


class Engine:
    """Runs sequences over one model. What has no underscore may be called from anywhere, `step` and `check` aside.

    `pick` chooses the next tokens of the sequences that decode, from logits of shape (sequences, vocab). `host_blocks`
    blocks of host memory take what must leave the device. `policy` is one of `policies.POLICIES`. An announced prefix
    that is at most `prefetch_steps` steps away is brought back from the host; None: only who needs it has it loaded.
    `dedup` False computes again what another sequence is just computing. `poison` fills free blocks with NaN.

    `batch_invariant` gives a request the same logits, bit for bit, whoever else is in the step, whatever the budget of
    steps and whatever is cached: each sequence runs alone, its prompt in pieces of one block and its answer token by
    token, and only blocks computed in one piece are shared. That costs most of what batching gains.
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
        prefetch_steps: float | None = 1.0,
        dedup: bool = True,
        batch_invariant: bool = False,
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
        self.idle: list[Sequence] = []  # sessions at rest; they keep their blocks until others need them
        self.dedup = dedup
        self.batch_invariant = batch_invariant
        self._pick = pick
        self._clock = clock
        self._prefetch_steps = prefetch_steps
        self._near: dict[Hashable, tuple[list[int], float]] = {}  # announced prefixes that should be on the device
        self._prefetches: dict[Hashable, Copy] = {}
        self._ahead: dict[Hashable, tuple[Sequence, _Ahead]] = {}  # prefixes computed ahead of time, or being so
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
                s.order = self._next_order()
                self._inbox.append(s)
            self.start()
            self._wake.notify()

    def start(self) -> None:
        """Starts the engine's thread; `submit` does so too. Without it `step` is called by hand."""
        with self._wake:
            if self._thread is None and not self._is_closed:
                self._thread = threading.Thread(target=self._loop, name=f"flowc-engine-{self.model.name}", daemon=True)
                self._thread.start()

    def ask(self, question: Callable[[], T]) -> T:
        """What `question` gives back or raises, asked between two steps: it may look at sequences and change them.

        Waits for the step under way. Not to be called from within a step, say by an owner.
        """
        with self._wake:
            if self._is_closed:
                raise ResourceError("the engine is closed", hint="open the backend again")
            assert threading.current_thread() is not self._thread, "asked from within a step"
            if self._thread is None:
                return question()
            answer: Future[T] = Future()
            self._commands.append(lambda: _answer(answer, question))
            self._wake.notify()
        return answer.result()

    def prefill(self, key: Hashable, tokens: Iterable[int], ticket: Ticket | None = None) -> None:
        """Computes the whole blocks of a prefix once there is room, and keeps them cached until `release(key)`.

        It takes the place of what `key` had computed before, unless that begins with it. Comes after all sequences but
        those that wait for it; pushes nothing out that is kept or announced for now. What is kept goes before a running
        sequence has to, and is not computed again for this.
        """
        prefix = list(tokens)
        self._tell(lambda: self._prefill(key, prefix, ticket))

    def hint(self, key: Hashable, tokens: Iterable[int], steps: float) -> None:
        """Announces that `key` (say, a program and its agent) reads a prefix in `steps` steps.

        It takes the place of what `key` announced before. Zero steps: now.
        """
        prefix = list(tokens)
        self._tell(lambda: self._hint(key, prefix, steps))

    def release(self, key: Hashable) -> None:
        """Takes announcement and prefill back; what was being fetched or computed for it is left where it is."""
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

    def _next_order(self) -> int:
        self._arrivals += 1
        return self._arrivals

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
                    self._obey()
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
        for s in [*self.running, *self.waiting, *self.idle]:
            self._finish(s, error)

    def step(self) -> bool:
        """One forward pass over what the schedule chose, and what follows from it; False if nothing could run."""
        self._listen()
        for group in (self.running, self.waiting):
            for s in [s for s in group if not s.owner.is_wanted(s)]:
                self._finish(s, None)
        batch = self._schedule()
        if not batch:
            return False
        with processor.hold(torch.get_num_threads()) if self.model.device.type == "cpu" else nullcontext():
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
            if s.ticket is not None:
                s.ticket.charge(seconds)
            self.stats.recomputed_tokens += max(0, min(s.reached, s.computed + count) - s.computed)
            if s.computed >= s.prompt_tokens:
                self.stats.decode_tokens += count
            else:
                self.stats.prefill_tokens += count
            self._computed(s, count)
            if s.scored is not None and table is not None:
                self._score(s, table, count)
            elif table is not None:
                decoding.append((s, table[-1]))
            if (s.scored is not None or s.until is not None) and not s.pending:
                self._end_stage(s)
        for (s, _), token in zip(decoding, self._next_tokens(decoding), strict=True):
            s.tokens.append(token)
            if not s.owner.accept(s, token):
                self._end_stage(s)
        return True

    def _next_tokens(self, decoding: list[tuple[Sequence, torch.Tensor]]) -> list[int]:
        together = [(s, row) for s, row in decoding if s.choose is None]
        picked = iter(self._pick([s for s, _ in together], torch.stack([r for _, r in together])) if together else ())
        return [next(picked) if s.choose is None else s.choose(row) for s, row in decoding]

    def _listen(self) -> None:
        """Takes note of what came from outside: announcements and copies that ended."""
        self.tree.advance(self._clock())
        self._obey()
        self.tree.poll()
        self._prefetch()
        self.stats.evicted_blocks = self.tree.evicted_blocks
        self.stats.offloaded_blocks = self.tree.offloaded_blocks
        self.stats.loaded_blocks = self.tree.loaded_blocks

    def _obey(self) -> None:
        with self._wake:
            commands, self._commands = self._commands, []
        for command in commands:
            command()

    def _hint(self, key: Hashable, tokens: list[int], steps: float) -> None:
        self.tree.hint(key, tokens, steps)
        if self._copier is None or self._prefetch_steps is None or steps > self._prefetch_steps:
            self._unfetch(key)
        else:
            self._near[key] = (tokens, steps)

    def _unhint(self, key: Hashable) -> None:
        self.tree.release(key)
        self._unfetch(key)
        self._stop_prefill(key)
        self.tree.unkeep(key)

    def _prefill(self, key: Hashable, tokens: list[int], ticket: Ticket | None) -> None:
        whole = tokens[: min(len(tokens) // self.block_size, self.pool.usable) * self.block_size]
        known = self._ahead.get(key)
        if known is not None and known[0].tokens[: len(whole)] == whole:
            known[0].ticket = ticket
            return
        self._stop_prefill(key)  # what it kept stays until the other is there
        if whole:
            owner = _Ahead(lambda: self.tree.keep(key, whole), lambda: self._stop_prefill(key))
            order = self._next_order()
            s = Sequence(whole, owner, order, ticket, is_background=True, until=len(whole))
            self._ahead[key] = s, owner
            self.waiting.append(s)

    def _stop_prefill(self, key: Hashable) -> None:
        if key in self._ahead:
            self._ahead.pop(key)[1].is_released = True

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
        self._take_turns()
        computing: dict[BlockKey, Sequence] = {}
        decoding: list[Sequence] = []
        others = list(self.waiting)
        for s in self.running:
            self._note_computing(s, computing)
            (decoding if s.pending == 1 else others).append(s)
        by_rank = attrgetter("rank")
        arrived = set(self.waiting)
        is_full = False
        for s in [*sorted(decoding, key=by_rank), *sorted(others, key=by_rank)]:
            if budget <= 0:
                break
            is_new = s in arrived
            if not is_new and s not in self.running:  # it gave its blocks to one before it
                continue
            kept = s.computed  # by a session
            if is_new:
                if is_full:  # nobody overtakes who waits for room, or that might be for ever
                    continue
                may_start = self._admit(s, computing)
                is_full = may_start is Start.NO_ROOM
                if may_start is not Start.NOW:
                    continue
                if not s.pending:  # all that it wants is cached
                    self._end_stage(s)
                    continue
            count = self._chunk(s, budget)
            room = self._make_room(s, count, may_preempt=not is_new)
            if room is not Room.MADE:
                if is_new:
                    is_full = True
                    self._free(s)
                    if not (self.running or room is Room.SOON or self.tree.is_loading):
                        self._finish(s, self._too_small(s))  # it has the whole pool to itself
                        is_full = False
                continue
            if is_new:
                self.waiting.remove(s)
                self.running.append(s)
                self._note_computing(s, computing)
                if not s.is_background:
                    self.stats.reused_tokens += s.computed - kept
            batch.append((s, count))
            budget -= count
        return [(s, n) for s, n in batch if s in self.running]

    def _take_turns(self) -> None:
        """Reads everybody's turn anew; who computes what another waits for has at least that one's."""
        for group in (self.running, self.waiting):
            for s in group:
                s.rank = s.own_rank
        for s in self.waiting:
            if s.waits_for is not None:
                s.waits_for.rank = min(s.waits_for.rank, s.rank)

    def _chunk(self, s: Sequence, budget: int) -> int:
        """How many tokens a sequence computes in a step with so much left of its budget."""
        if not self.batch_invariant:
            return min(s.pending, budget)
        count = 0
        for piece in self._pieces(s, s.pending):
            if count >= budget:
                break
            count += piece  # pieces are never cut, so the last may go over
        return count

    def _pieces(self, s: Sequence, count: int) -> Iterator[int]:
        """How the next tokens of a sequence are cut in the batch-invariant mode, from what the request says alone."""
        at, end, size = s.computed, s.computed + count, self.block_size
        while at < end:
            piece = min((at // size + 1) * size, s.prompt_tokens, end) - at if at < s.prompt_tokens else 1
            yield piece
            at += piece

    def _note_computing(self, s: Sequence, computing: dict[BlockKey, Sequence]) -> None:
        """Takes note of the block that a sequence is about to compute, if it will be shared then."""
        at = len(s.nodes)
        if self.dedup and at == s.computed // self.block_size and (at + 1) * self.block_size <= self._shareable(s):
            following = self._next_block(s, at)
            if following is not None:
                computing.setdefault(following, s)

    def _shareable(self, s: Sequence) -> int:
        """How many tokens of a sequence others may share once they are computed.

        Of a scored one its prompt: nobody continues its options (Du et al., "PrefillOnly", 2025).
        """
        goal = len(s.tokens) if s.until is None else s.until
        if s.scored is not None:
            return s.scored
        return min(s.prompt_tokens, goal) if self.batch_invariant else goal

    def _next_block(self, s: Sequence, at: int, nodes: list[Node] | None = None) -> BlockKey | None:
        """What names the block after the first `at` of a sequence: the node above and its tokens; None if not full."""
        start = at * self.block_size
        tokens = tuple(s.tokens[start : start + self.block_size])
        above = s.nodes if nodes is None else nodes
        return (above[at - 1] if at else None, tokens) if len(tokens) == self.block_size else None

    def _admit(self, s: Sequence, computing: dict[BlockKey, Sequence]) -> Start:
        """Gives a waiting sequence its cached prefix, unless a block of it is being computed or loaded."""
        s.waits_for = None
        path: list[Node] = []
        absent: list[Node] = []
        if not s.blocks:  # else it is a session that kept its own
            path = self.tree.match(s.tokens, s.reusable)
            resident = next((i for i, n in enumerate(path) if n.block is None), len(path))
            path, absent = path[:resident], path[resident:]
            at = len(path) * self.block_size
            following = self._next_block(s, len(path), path)
            leader = computing.get(following) if following is not None else None
            if leader is not None and leader in self.running and at + self.block_size <= s.reusable:
                self.stats.waits_for_prefix += 1
                s.waits_for = leader
                return Start.LATER
        if not self._gets_place(s, path):
            return Start.NO_ROOM
        if absent and self._is_coming([*path, *absent], absent):
            self.stats.waits_for_load += 1
            return Start.LATER
        if not s.blocks:
            self.tree.hold(path)
            s.nodes = path
            s.blocks = [n.device_block for n in path]
            s.computed = len(path) * self.block_size
        s.log_probability = 0.0  # all of it is scored again
        return Start.NOW

    def _gets_place(self, s: Sequence, path: list[Node]) -> bool:
        """Is there a place for a sequence and likely room to its end? Whose program comes later gives way to it."""
        need = -(-(len(s.tokens) + s.limit // 2) // self.block_size) - max(len(path), len(s.blocks))
        while self.running:
            held = sum(1 for n in path if not n.holders)
            has_room = self.pool.free + self.tree.evictable - held >= need
            if has_room and len(self.running) < self.max_sequences:
                break
            if not has_room and self._drop_idle(s):
                continue
            last = max(self.running, key=attrgetter("rank"))
            if last.rank[:2] <= s.rank[:2]:
                return False
            self._preempt(last)
        return True

    def _is_coming(self, path: list[Node], absent: list[Node]) -> bool:
        """Are the next blocks of a sequence being loaded? Starts to load them where that is sooner than computing."""
        if absent[0].state is State.LOADING:
            return True
        there = next((i for i, n in enumerate(absent) if n.state is not State.HOST), len(absent))
        if not self.costs.loading_pays(there, there * self.block_size):
            return False
        return self.tree.load(path[: len(path) - len(absent) + there]) is not None or self.tree.is_offloading

    def _make_room(self, s: Sequence, count: int, *, may_preempt: bool = True) -> Room:
        """Blocks that a sequence may write its next `count` tokens to; evicts and preempts for them."""
        wanted = -(-(s.computed + count) // self.block_size)
        at = s.computed // self.block_size
        while True:
            is_shared = at < len(s.blocks) and self.pool.references[s.blocks[at]] > 1  # with a fork, or with the tree
            if len(s.blocks) >= wanted and not is_shared:
                return Room.MADE
            block = self.pool.allocate()
            if block is not None:
                if is_shared:
                    self.pool.copy(s.blocks[at], block)
                    self.pool.release([s.blocks[at]])
                    s.blocks[at] = block
                else:
                    s.blocks.append(block)
                continue
            if self.tree.evict(1, farther_than=0.0 if s.rank[0] else -1.0):
                continue
            if self.tree.is_offloading:
                return Room.SOON
            if self._drop_idle(s):
                continue
            if not may_preempt:
                return Room.NONE
            victim = max(self.running, key=attrgetter("rank"))
            if victim is s and len(self.running) == 1:
                if self.tree.is_loading:
                    return Room.SOON  # what is loaded for others can go when it has arrived
                self._finish(s, self._too_small(s))
                return Room.NONE
            self._preempt(victim)
            if victim is s:
                return Room.NONE

    def _drop_idle(self, but: Sequence) -> bool:
        """Takes the blocks of a session that rests or has not gone on yet; is there one? Of several the last."""
        holding = [s for s in (*self.idle, *self.waiting) if s.blocks and s is not but]
        if holding:
            self._free(max(holding, key=attrgetter("own_rank")))
        return bool(holding)

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
        if not self.batch_invariant:
            return self._pass([(s, s.computed, s.computed + count) for s, count in batch])
        found: list[torch.Tensor | None] = []
        for s, count in batch:
            at, tables = s.computed, []
            for piece in self._pieces(s, count):
                (table,) = self._pass([(s, at, at + piece)])
                at += piece
                if table is not None:
                    tables.append(table)
            found.append(torch.cat(tables) if tables else None)
        return found

    def _pass(self, parts: list[tuple[Sequence, int, int]]) -> list[torch.Tensor | None]:
        """Runs tokens (from, to) of some sequences through the model, packed; gives back what `_forward` does."""
        size = self.block_size
        tokens: list[int] = []
        positions: list[int] = []
        block: list[int] = []
        offset: list[int] = []
        rows: list[int] = []
        spans: list[Span] = []
        taken: list[int] = []
        device = self.model.device
        for s, start, end in parts:
            first = len(tokens)
            tokens += s.tokens[start:end]
            positions += range(start, end)
            block += [s.blocks[p // size] for p in range(start, end)]
            offset += [p % size for p in range(start, end)]
            used = s.blocks[: -(-end // size)]
            key = None if self.batch_invariant else s
            spans.append(Span(slice(first, len(tokens)), end, torch.tensor(used), key))
            if s.scored is not None:
                wanted = [first + p - start for p in range(max(start, s.scored - 1), end)]
            else:
                wanted = [len(tokens) - 1] if s.until is None and end == len(s.tokens) else []
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
        before = s.computed
        s.computed += count
        s.reached = max(s.reached, s.computed)
        size = self.block_size
        while len(s.nodes) < min(s.computed, self._shareable(s)) // size:
            index = len(s.nodes)
            if self.batch_invariant and before > index * size:
                break  # it was not computed in one piece, nor was what depends on it
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

    # -- the end of a sequence, or of a stage of it
    def _end_stage(self, s: Sequence) -> None:
        """A sequence has done what was asked."""
        if s.stays:
            self._set_aside(s)
            s.owner.ended(s, None)
        else:
            self._finish(s, None)

    def _set_aside(self, s: Sequence) -> None:
        self.model.forget(s)
        self._leave(s)
        self.idle.append(s)

    def _finish(self, s: Sequence, error: Exception | None) -> None:
        if s.drops:
            self.tree.drop(s.nodes, s.drops)
        self._free(s)
        self._leave(s)
        s.is_finished = True
        s.owner.ended(s, error)

    def _leave(self, s: Sequence) -> None:
        for group in (self.running, self.waiting, self.idle):
            if s in group:
                group.remove(s)

    def _free(self, s: Sequence) -> None:
        self._cut(s, 0)

    def _cut(self, s: Sequence, computed: int) -> None:
        """Gives back what a sequence has computed after the first `computed` tokens. Full blocks stay cached."""
        self.model.forget(s)
        full, used = computed // self.block_size, -(-computed // self.block_size)
        if full < used and full < len(s.nodes):
            self.pool.share(s.blocks[full])  # a part of a cached block: copied before it is written
        self.pool.release(s.blocks[max(used, len(s.nodes)) :])
        self.tree.let_go(s.nodes[full:])
        s.blocks, s.nodes, s.computed = s.blocks[:used], s.nodes[:full], computed

    # -- sessions: asked between two steps
    def _go_on(self, s: Sequence) -> None:
        """A session at rest has something to do."""
        self._leave(s)
        self.waiting.append(s)

    def _fork(self, s: Sequence, owner: Owner) -> Sequence:
        """A session at rest with the same tokens. It shares all blocks; who writes into the last copies it first."""
        twin = Sequence(list(s.tokens), owner, self._next_order(), s.ticket, stays=True, choose=s.choose)
        twin.until = len(twin.tokens) - 1
        twin.prompt_tokens = s.prompt_tokens
        twin.computed = twin.reached = s.computed
        twin.blocks = s.blocks[: -(-s.computed // self.block_size)]
        twin.nodes = list(s.nodes)
        self.tree.hold(twin.nodes)
        for block in twin.blocks[len(twin.nodes) :]:
            self.pool.share(block)
        self.idle.append(twin)
        return twin

    def _roll_back(self, s: Sequence, count: int) -> None:
        """Takes the last `count` tokens of a session away; it is at rest then."""
        assert 0 <= count < len(s.tokens)
        del s.tokens[len(s.tokens) - count :]
        s.prompt_tokens = min(s.prompt_tokens, len(s.tokens))
        s.until = len(s.tokens) - 1
        s.reached = min(s.reached, s.until)
        self._cut(s, min(s.computed, s.until))
        self._set_aside(s)

    def check(self) -> None:
        """The invariants of pool and tree, for tests: every reference has an owner."""
        self.pool.check()
        owners = [0] * len(self.pool.references)
        self.tree.check(owners)
        for s in (*self.running, *self.waiting, *self.idle):
            for b in s.blocks[len(s.nodes) :]:
                owners[b] += 1
        assert owners[1:] == self.pool.references[1:], "references and owners differ"


def _answer(answer: Future[T], question: Callable[[], T]) -> None:
    try:
        answer.set_result(question())
    except Exception as error:
        answer.set_exception(error)

"""A simulated language model: continuous batching, chunked prefill, a prefix cache and preemption by tickets, in
virtual time.

Steps are simulated one by one while prompts are computed, and in one jump while nothing but decoding happens: between
two events a batch does not change, so its steps take equally long. What takes part follows Kwon et al., "Efficient
Memory Management for Large Language Model Serving with PagedAttention", 2023 (continuous batching, preemption) and
Agrawal et al., "Taming Throughput-Latency Tradeoff in LLM Inference with Sarathi-Serve", 2024 (chunked prefill).
"""

from __future__ import annotations

import asyncio
import json
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from math import ceil
from operator import attrgetter
from typing import Any, Protocol
from zlib import crc32

from flowc.runtime.protocols import ChooseRequest, GenerateRequest, Generation, IsCancelled, OnText, Ticket

from .faults import Faults, SimulatedFailure
from .lanes import filler
from .profiles import LLMProfile

__all__ = ["SimulatedLLM", "Work", "work_of"]

TOKEN_CHARS = 4
PIECE_TOKENS = 64  # of a text, for the prefix cache
LOOK_STEPS = 16  # decode steps between two looks at who should run, while somebody waits

Chain = tuple[tuple[Hashable, int], ...]


@dataclass(slots=True)
class Work:
    """What a request means to the engine: its prompt as a chain of (key, tokens), equal chains being equal text."""

    prompt_tokens: int
    output_tokens: int
    chain: Chain = ()
    text: str = ""
    after: tuple[Hashable, int] | None = None  # what the prompt and the output are cached as together


class WorkOf(Protocol):
    def __call__(self, request: GenerateRequest, seed: int) -> Work: ...


def count_tokens(text: str) -> int:
    return max(1, len(text) // TOKEN_CHARS)


def chain_of(prompt: str) -> Chain:
    """A prompt's whole pieces, each keyed by all the text up to its end."""
    data = prompt.encode("utf-8", "surrogatepass")
    size = PIECE_TOKENS * TOKEN_CHARS
    key, out = 0, []
    for at in range(0, len(data) - size + 1, size):
        key = crc32(data[at : at + size], key)
        out.append(((at, key), PIECE_TOKENS))
    return tuple(out)


def work_of(request: GenerateRequest, seed: int) -> Work:
    """Of any prompt: four characters a token, an output of between 1 and `max_tokens` tokens, 0.6 of it on average.

    The draw is made of the prompt and the seed, so it is the same whatever the schedule.
    """
    draw = crc32(request.prompt.encode("utf-8", "surrogatepass"), seed & 0xFFFFFFFF)
    tokens = 1 + int((request.max_tokens - 1) * (draw / 2**32) ** (2 / 3))
    if request.schema is not None:
        text = json.dumps(example_of(json.loads(request.schema)))
    else:
        words = filler(draw, max(1, tokens * TOKEN_CHARS // 6)).split(" ")
        text = "\n".join(" ".join(words[at : at + 12]) for at in range(0, len(words), 12))
    return Work(count_tokens(request.prompt), tokens, chain_of(request.prompt), text)


def example_of(schema: dict[str, Any]) -> Any:
    """The simplest value that a JSON schema allows: first alternatives, required properties, shortest lists."""
    root = schema

    def of(node: dict[str, Any], depth: int) -> Any:
        if "$ref" in node:
            found: Any = root
            for part in node["$ref"].removeprefix("#/").split("/"):
                found = found[part]
            return of(found, depth + 1)
        if "const" in node:
            return node["const"]
        if "enum" in node:
            return node["enum"][0]
        for union in ("anyOf", "oneOf", "allOf"):
            if union in node:
                return of(node[union][-1 if depth > 8 else 0], depth + 1)
        match node.get("type"):
            case "object":
                wanted = node.get("required", ())
                return {k: of(v, depth + 1) for k, v in node.get("properties", {}).items() if k in wanted}
            case "array":
                return [of(node.get("items", {"type": "string"}), depth + 1)] * int(node.get("minItems", 0))
            case "integer" | "number":
                return node.get("minimum", 1)
            case "boolean":
                return True
            case "null":
                return None
            case _:
                return "text".ljust(int(node.get("minLength", 0)), "x")

    return of(root, 0)


class PrefixStore:
    """Prefixes in memory, least recently used out first. Pieces of one prompt leave from its end."""

    def __init__(self) -> None:
        self._pieces: OrderedDict[Hashable, int] = OrderedDict()
        self.tokens = 0

    def match(self, chain: Chain) -> int:
        """Tokens of the longest cached beginning; it counts as used."""
        n = hit = 0
        pieces = self._pieces
        for key, tokens in chain:
            if key not in pieces:
                break
            hit += tokens
            n += 1
        for key, _ in reversed(chain[:n]):
            pieces.move_to_end(key)
        return hit

    def put(self, chain: Chain) -> None:
        pieces = self._pieces
        for key, tokens in reversed(chain):
            if key in pieces:
                pieces.move_to_end(key)
            else:
                pieces[key] = tokens
                self.tokens += tokens

    def shrink(self, tokens: int) -> None:
        while self.tokens > tokens and self._pieces:
            self.tokens -= self._pieces.popitem(last=False)[1]

    def clear(self) -> None:
        self._pieces.clear()
        self.tokens = 0


class _Sequence:
    """One request in the engine."""

    __slots__ = (
        "admitted_s",
        "came_s",
        "chain",
        "end_step",
        "future",
        "held",
        "is_choice",
        "number",
        "since_s",
        "ticket",
        "todo",
        "work",
        "written",
    )  # fmt: skip

    def __init__(
        self, number: int, work: Work, ticket: Ticket | None, future: asyncio.Future[Any], now_s: float, is_choice: bool
    ) -> None:
        self.number = number
        self.work = work
        self.ticket = ticket
        self.future = future
        self.is_choice = is_choice
        self.came_s = now_s
        self.admitted_s = -1.0  # first admission
        self.since_s = now_s  # service up to here has been charged
        self.todo = 0  # tokens to prefill
        self.written = 0
        self.end_step = -1  # -1: does not decode
        self.held = work.prompt_tokens + work.output_tokens

    @property
    def rank(self) -> tuple[float, int]:
        return (self.ticket.priority if self.ticket is not None else 0.0, self.number)


_rank = attrgetter("rank")


class SimulatedLLM:
    """An `LLMBackend` with `async` methods for a `VirtualLoop`. `work` says what a request means, see `Work`."""

    kind = "simulated"
    max_batch = 1
    max_calls = 1 << 30  # it batches by itself

    def __init__(self, name: str, profile: LLMProfile, faults: Faults, seed: int = 0, work: WorkOf = work_of) -> None:
        self.name = name
        self.profile = profile
        self.faults = faults
        self.seed = seed
        self._work = work
        self._numbers = 0
        self._waiting: list[_Sequence] = []
        self._running: dict[_Sequence, None] = {}
        self._decoding: list[tuple[int, int, _Sequence]] = []  # by end step; those that left are skipped
        self._n_decoding = self._context = self._held = 0
        self._prefilling: list[tuple[_Sequence, int]] = []  # what the step at hand computes
        self._idle: list[_Sequence] = []  # whose prompts wait for a later step
        self._steps = 0  # decode steps so far
        self._chunk = 0  # decode steps until the next boundary
        self._chunk_from_s = self._step_s = 0.0
        self._boundary_at: asyncio.TimerHandle | None = None
        self._is_planned = False
        self._lost = 0
        self._watched = 0  # changes of faults that have a timer
        self.store = PrefixStore()
        self.prompt_tokens = self.hit_tokens = self.output_tokens = self.generations = self.preemptions = 0
        self.decode_s = self.busy_s = 0.0

    # -- the protocol
    def batch_key(self, request: GenerateRequest) -> Hashable:
        return self.name

    def count_tokens(self, text: str) -> int:
        return count_tokens(text)

    def close(self) -> None:
        """Nothing is held."""

    async def generate(
        self,
        requests: Sequence[GenerateRequest],
        on_text: OnText | None = None,
        is_cancelled: IsCancelled | None = None,
    ) -> list[Generation | Exception]:
        works = [self._work(request, self.seed) for request in requests]
        answers = await self._run([(w, r.ticket, False) for w, r in zip(works, requests, strict=True)])
        out: list[Generation | Exception] = []
        for i, (work, request, failure) in enumerate(zip(works, requests, answers, strict=True)):
            if failure is None:
                if on_text is not None:
                    on_text(i, work.text)
                reason = "length" if work.output_tokens >= request.max_tokens else "stop"
                out.append(Generation(work.text, work.prompt_tokens, work.output_tokens, reason))
            else:
                out.append(failure)
        return out

    async def choose(self, requests: Sequence[ChooseRequest]) -> list[int | Exception]:
        works = []
        for request in requests:
            tokens = sum(map(count_tokens, request.options))
            works.append(Work(count_tokens(request.prompt) + tokens, 1, chain_of(request.prompt)))
        answers = await self._run([(w, r.ticket, True) for w, r in zip(works, requests, strict=True)])
        picks = [crc32(r.prompt.encode("utf-8", "surrogatepass"), self.seed) % len(r.options) for r in requests]
        return [pick if failure is None else failure for pick, failure in zip(picks, answers, strict=True)]

    async def _run(self, works: list[tuple[Work, Ticket | None, bool]]) -> list[SimulatedFailure | None]:
        loop = asyncio.get_running_loop()
        self._watch(loop)
        sequences = []
        for work, ticket, is_choice in works:
            self._numbers += 1
            sequences.append(_Sequence(self._numbers, work, ticket, loop.create_future(), loop.time(), is_choice))
        self._waiting.extend(sequences)
        self._wake(loop)
        try:
            return [await sequence.future for sequence in sequences]
        except asyncio.CancelledError:
            for sequence in sequences:
                self._abort(sequence)
            raise

    def _abort(self, sequence: _Sequence) -> None:
        if sequence in self._running:
            self._leave(sequence)
        elif sequence in self._waiting:
            self._waiting.remove(sequence)
        self._wake(asyncio.get_running_loop())

    # -- steps
    def _wake(self, loop: asyncio.AbstractEventLoop) -> None:
        """Something changed: looks who may run at the next step's end, or at the end of this turn if nothing runs."""
        if self._is_planned:
            return
        if self._boundary_at is None:
            self._is_planned = True
            loop.call_soon(self._plan, loop)
        elif self._chunk > 1 and (self._has_room() or (self._waiting[-1:] and self._waiting[-1].ticket is not None)):
            steps = max(1, ceil((loop.time() - self._chunk_from_s) / self._step_s))
            if steps < self._chunk:
                self._boundary_at.cancel()
                self._chunk = steps
                self._boundary_at = loop.call_at(self._chunk_from_s + steps * self._step_s, self._boundary, loop)

    def _has_room(self) -> bool:
        return len(self._running) < self._most()

    def _most(self) -> int:
        workers = self.profile.workers
        return self.profile.max_sequences * max(0, workers - self._lost)

    def _plan(self, loop: asyncio.AbstractEventLoop) -> None:
        """At a boundary: who runs in the next step, and how many steps until that may change."""
        self._is_planned = False
        self._boundary_at = None
        now_s = loop.time()
        if self._waiting:
            if not self._most() and self._watched_all(now_s):
                self._give_up()
            self._admit(now_s)
        if not self._running:
            return
        profile = self.profile
        workers = max(1, profile.workers - self._lost)
        budget = (profile.max_step_tokens - self._n_decoding // workers) * workers
        self._prefilling, self._idle = [], []
        taken = 0
        if self._n_decoding < len(self._running):
            for sequence in sorted((s for s in self._running if s.end_step < 0), key=_rank):
                if taken < budget:
                    part = min(sequence.todo, budget - taken)
                    taken += part
                    self._prefilling.append((sequence, part))
                else:
                    self._idle.append(sequence)
        seconds = profile.step_s + (
            self._n_decoding * profile.sequence_s + self._context * profile.context_s + taken * profile.prompt_s
        ) / workers  # fmt: skip
        self._step_s = seconds * self.faults.factor(now_s)
        if taken or not self._decoding:
            self._chunk = 1
        else:
            while self._decoding[0][2].end_step != self._decoding[0][0]:
                heappop(self._decoding)  # it was preempted or aborted
            self._chunk = self._decoding[0][0] - self._steps
            if self._is_contended():
                self._chunk = min(self._chunk, LOOK_STEPS)
        self._chunk_from_s = now_s
        self._boundary_at = loop.call_at(now_s + self._chunk * self._step_s, self._boundary, loop)

    def _boundary(self, loop: asyncio.AbstractEventLoop) -> None:
        """The planned steps are over: prompts have come further, tokens were written, some are done."""
        now_s = loop.time()
        self.busy_s += self._chunk * self._step_s
        self._steps += self._chunk
        self._context += self._chunk * self._n_decoding
        for sequence, tokens in self._prefilling:
            if sequence in self._running:
                sequence.todo -= tokens
                if sequence.todo <= 0:
                    self._decode(sequence, now_s)
        self._prefilling = []
        for sequence in self._idle:
            sequence.since_s = now_s
        ending = self._decoding
        while ending and ending[0][0] <= self._steps:
            end_step, _, sequence = heappop(ending)
            if sequence.end_step == end_step:
                self._finish(sequence, now_s)
        if self._is_contended():
            for sequence in self._running:
                self._charge(sequence, now_s)
        self._plan(loop)

    def _is_contended(self) -> bool:
        """Does somebody with a ticket wait?"""
        return bool(self._waiting) and self._waiting[0].ticket is not None

    def _decode(self, sequence: _Sequence, now_s: float) -> None:
        """A prompt is computed, and with it the first token, or what had been written before a preemption."""
        work = sequence.work
        self.store.put(work.chain)
        sequence.written = max(sequence.written, 1)
        sequence.end_step = self._steps + work.output_tokens - sequence.written
        self._n_decoding += 1
        self._context += work.prompt_tokens + sequence.written
        if sequence.end_step <= self._steps:
            self._finish(sequence, now_s)
        else:
            heappush(self._decoding, (sequence.end_step, sequence.number, sequence))

    def _finish(self, sequence: _Sequence, now_s: float) -> None:
        work = sequence.work
        sequence.written = work.output_tokens
        self._charge(sequence, now_s)
        self._leave(sequence)
        self.store.put((*work.chain, work.after) if work.after is not None else work.chain)
        self.store.shrink(self.profile.kv_tokens - self._held)
        if not sequence.is_choice:
            self.generations += 1
            self.output_tokens += work.output_tokens
            self.decode_s += now_s - sequence.admitted_s
        if not sequence.future.done():
            sequence.future.set_result(self.faults.failure(now_s))

    def _leave(self, sequence: _Sequence) -> None:
        """Out of the running ones, for whatever reason."""
        del self._running[sequence]
        self._held -= sequence.held
        if sequence.end_step >= 0:
            self._n_decoding -= 1
            sequence.written = min(sequence.work.output_tokens, self._written(sequence))
            self._context -= sequence.work.prompt_tokens + sequence.written
            sequence.end_step = -1

    def _written(self, sequence: _Sequence) -> int:
        return sequence.work.output_tokens - max(0, sequence.end_step - self._steps)

    def _charge(self, sequence: _Sequence, now_s: float) -> None:
        if sequence.ticket is not None and now_s > sequence.since_s:
            sequence.ticket.charge(now_s - sequence.since_s)
            sequence.since_s = now_s

    # -- who runs
    def _admit(self, now_s: float) -> None:
        waiting = self._waiting
        has_tickets = any(sequence.ticket is not None for sequence in waiting)
        if has_tickets:
            waiting.sort(key=_rank)
        n = 0
        while n < len(waiting) and self._has_room() and self._fits(waiting[n]):
            self._begin(waiting[n], now_s)
            n += 1
        del waiting[:n]
        if not waiting or not has_tickets:
            return
        back: list[_Sequence] = []
        for victim in sorted(self._running, key=_rank, reverse=True):
            if not waiting or waiting[0].rank[0] >= victim.rank[0]:
                break
            self._preempt(victim, now_s)
            back.append(victim)
            while waiting and self._has_room() and self._fits(waiting[0]):
                self._begin(waiting.pop(0), now_s)
        waiting.extend(back)

    def _fits(self, sequence: _Sequence) -> bool:
        return self._held + sequence.held <= self.profile.kv_tokens or not self._running

    def _begin(self, sequence: _Sequence, now_s: float) -> None:
        """Admits a sequence: what of its prompt is cached, and of what it had written, is not computed again."""
        work = sequence.work
        cached = self.store.match(work.chain)
        known = work.prompt_tokens
        if sequence.written:
            own = ((("sequence", sequence.number), work.prompt_tokens + sequence.written),)
            known += sequence.written
            cached = max(cached, self.store.match(own))
        sequence.todo = max(1, known - cached)  # the last token is always computed
        if sequence.admitted_s < 0.0:
            sequence.admitted_s = now_s
            self.prompt_tokens += work.prompt_tokens
            self.hit_tokens += known - sequence.todo
        sequence.since_s = now_s
        self._running[sequence] = None
        self._held += sequence.held
        self.store.shrink(max(0, self.profile.kv_tokens - self._held))

    def _preempt(self, sequence: _Sequence, now_s: float) -> None:
        """Takes a sequence out; what it had stays in the cache for as long as there is room."""
        self.preemptions += 1
        self._charge(sequence, now_s)
        self._leave(sequence)
        if sequence.written:
            self.store.put(((("sequence", sequence.number), sequence.work.prompt_tokens + sequence.written),))

    # -- faults
    def _watch(self, loop: asyncio.AbstractEventLoop) -> None:
        """A timer for the next moment at which a worker is lost or comes back."""
        changes = self.faults.changes
        if self._watched == 0:
            self._lost = self.faults.lost(loop.time())
        while self._watched < len(changes):
            at_s = changes[self._watched]
            self._watched += 1
            if at_s > loop.time():
                loop.call_at(at_s, self._change, loop)

    def _watched_all(self, now_s: float) -> bool:
        """Is this how it stays?"""
        return not any(at_s > now_s for at_s in self.faults.changes)

    def _give_up(self) -> None:
        for sequence in self._waiting:
            if not sequence.future.done():
                sequence.future.set_result(SimulatedFailure(f"every worker of the model {self.name!r} is lost"))
        self._waiting.clear()

    def _change(self, loop: asyncio.AbstractEventLoop) -> None:
        lost = min(self.faults.lost(loop.time()), self.profile.workers)
        gone, self._lost = lost - self._lost, lost
        if gone > 0:  # what those workers ran, an even share, begins again; their caches are gone
            running = list(self._running)
            alive = self.profile.workers - (lost - gone)
            victims = running[:: max(1, alive // gone)] if alive > gone else running
            for sequence in victims:
                self._charge(sequence, loop.time())
                self._leave(sequence)
                sequence.written = 0
            self._waiting[:0] = victims
            self.store.clear()
        self._wake(loop)

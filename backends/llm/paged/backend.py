"""The paged engine behind `LLMBackend`: several calls may be in flight, and all of them share its steps."""

from __future__ import annotations

import inspect
import os
import threading
import warnings
import weakref
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import Any

import torch

from flowc.ir.errors import ResourceError
from flowc.runtime.protocols import BackendInfo, ChooseRequest, IsCancelled, Ticket

from ..hf import HFBackend
from ..local import Choice, LocalBackend, LocalModel
from ..rows import Row
from ..sampling import pick
from .engine import Engine
from .model import NotPagedError, PagedModel
from .packed import copies_fit
from .policies import POLICIES
from .sequence import Sequence as TokenSequence

__all__ = ["PagedBackend", "open_engine"]


class _Call:
    """One `generate` or `choose` call: counts down its sequences."""

    def __init__(self, count: int) -> None:
        self._left = count
        self._done = threading.Event()
        self._lock = threading.Lock()
        if not count:
            self._done.set()

    def one_ended(self) -> None:
        with self._lock:
            self._left -= 1
            if not self._left:
                self._done.set()

    def wait(self) -> None:
        self._done.wait()


class _Generating:
    """Takes the tokens of one generation."""

    def __init__(self, row: Row, ends: frozenset[int], is_cancelled: IsCancelled | None, call: _Call) -> None:
        self.row, self.ends, self.is_cancelled, self.call = row, ends, is_cancelled, call

    def accept(self, sequence: TokenSequence, token: int) -> bool:
        self.row.accept(token, self.ends)
        sequence.tokens += self.row.fast_forward(self.ends)  # the next step computes them together
        return self.is_wanted(sequence)

    def targets(self, sequence: TokenSequence) -> list[int]:
        raise AssertionError("a generation is not scored")

    def is_wanted(self, sequence: TokenSequence) -> bool:
        self.row.check(self.is_cancelled)
        return not self.row.is_done

    def ended(self, sequence: TokenSequence, error: Exception | None) -> None:
        if error is not None and not self.row.is_done:
            self.row.error = error
        self.call.one_ended()


class _Scoring:
    """Asks for the log-probability of one option."""

    def __init__(self, option: list[int], call: _Call) -> None:
        self.option, self.call = option, call
        self.error: Exception | None = None

    def accept(self, sequence: TokenSequence, token: int) -> bool:
        raise AssertionError("a scored sequence decodes nothing")

    def targets(self, sequence: TokenSequence) -> list[int]:
        return self.option

    def is_wanted(self, sequence: TokenSequence) -> bool:
        return True

    def ended(self, sequence: TokenSequence, error: Exception | None) -> None:
        self.error = error
        self.call.one_ended()


def _pick(sequences: list[TokenSequence], logits: torch.Tensor) -> list[int]:
    rows = [s.owner.row for s in sequences if isinstance(s.owner, _Generating)]
    return pick(rows, logits)


class PagedBackend(LocalBackend):
    """A causal language model on the paged engine.

    `model` names it, see `LocalModel` for this and for what can be wrong with it, or is a `LocalModel` (then `dtype`,
    `device`, `threads`, `revision`, `name` and `trust_remote_code` are its own). `kv_blocks` blocks of `block_size`
    tokens hold the cache; by default as many as `max_sequences` sequences of 1,024 tokens need. `max_step_tokens`
    bounds a step: smaller keeps tokens flowing while long prompts come in, larger gets prompts done sooner. `max_batch`
    bounds the requests of one call, `max_calls` the calls that may be in flight at once; their requests join the
    running batch. What must leave the cache goes in the order of `policy` (see `policies.POLICIES`), to `host_blocks`
    blocks of host memory. `pack` keeps a second copy of the linear weights in the order that the CPU reads fastest;
    None: where there is room.
    `batch_invariant` makes a request's logits independent, to the last bit, of everything else; see `Engine`.

    It is a `PrefixCache` too. Advice is given as text and works on tokens: the end of a prefix may be cut into other
    tokens than in the prompt that continues it, and is then computed again. What is reused is always exact.

    Greedy decoding in float32 gives the tokens of `model.generate(do_sample=False)` but for exact ties. Raises
    `NotPagedError`, a `ResourceError` F067, for an architecture that the engine would run wrongly. A single request
    fails with F068 where its prompt exceeds the model's context and with F069 where it exceeds the cache.
    """

    max_calls = 64

    def __init__(
        self,
        model: str | os.PathLike[str] | LocalModel,
        dtype: str = "float32",
        device: str | None = None,
        max_batch: int = 64,
        threads: int | None = None,
        *,
        kv_blocks: int | None = None,
        block_size: int = 16,
        max_step_tokens: int = 256,
        max_sequences: int = 32,
        host_blocks: int = 0,
        policy: str = "workflow",
        batch_invariant: bool = False,
        pack: bool | None = None,
        revision: str | None = None,
        name: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        if policy not in POLICIES:
            raise ResourceError(f"unknown policy {policy!r}", hint=f"use one of {', '.join(POLICIES)}")
        local = (
            model
            if isinstance(model, LocalModel)
            else LocalModel(model, dtype, device, threads, revision, name, trust_remote_code)
        )
        super().__init__(local)
        self.max_batch = max_batch
        self._lock = threading.Lock()
        context = min(local.context or 1024, 1024)
        paged = PagedModel(local.model, self.name)
        blocks = kv_blocks or max_sequences * -(-context // block_size) + 1
        is_packed = pack if pack is not None else copies_fit(local.model)
        self.packed_layers = paged.pack(blocks * block_size) if is_packed else 0
        self.engine = Engine(
            paged,
            blocks=blocks,
            block_size=block_size,
            max_step_tokens=max_step_tokens,
            max_sequences=max_sequences,
            host_blocks=host_blocks,
            policy=policy,
            batch_invariant=batch_invariant,
            pick=_pick,
        )
        # Also where nobody closes it: a thread that is in torch when the interpreter goes takes the process with it.
        self._end_engine = weakref.finalize(self, self.engine.close)

    def info(self) -> BackendInfo:
        """What `flowc doctor` and the trace say: the model, the cache's size, the tokens computed and reused so far."""
        stats = self.engine.stats
        cache: dict[str, Any] = {"kv_tokens": self.engine.capacity_tokens, "packed_layers": self.packed_layers}
        cache |= {n: getattr(stats, n) for n in stats.__slots__}
        return BackendInfo(self.name, self.kind, self._details() | cache)

    def _complete(self, rows: list[Row], is_cancelled: IsCancelled | None) -> None:
        """Calls from several threads share the engine's steps. What a schema forces is prefilled, not decoded."""
        call = _Call(len(rows))
        ends = self.local.end_tokens
        sequences: list[TokenSequence] = []
        for row in rows:
            owner = _Generating(row, ends, is_cancelled, call)
            tokens = row.ids + row.fast_forward(ends)
            if row.is_done:
                call.one_ended()
            else:
                request = row.request
                sequences.append(
                    TokenSequence(tokens, owner, ticket=request.ticket, limit=row.limit, drops=int(request.drop))
                )
        self._run(call, sequences)

    def _scores(
        self, asked: list[Choice], requests: Sequence[ChooseRequest]
    ) -> Iterator[tuple[int, list[float] | Exception]]:
        """Options are prefilled behind their prompt, which is computed once."""
        call = _Call(sum(len(options) for _, _, options in asked))
        scored: dict[int, list[tuple[_Scoring, TokenSequence]]] = {}
        for item, ids, options in asked:
            owners = [_Scoring(option, call) for option in options]
            ticket, drops = requests[item].ticket, len(options) if requests[item].drop else 0
            scored[item] = [
                (o, TokenSequence(ids + o.option[:-1], o, ticket=ticket, scored=len(ids), drops=drops)) for o in owners
            ]
        self._run(call, [sequence for pairs in scored.values() for _, sequence in pairs])
        for item, pairs in scored.items():
            failed = next((owner.error for owner, _ in pairs if owner.error is not None), None)
            yield item, failed or [sequence.log_probability for _, sequence in pairs]

    def prefill(self, key: Hashable, prefix: str | Sequence[int], ticket: Ticket | None = None) -> None:
        """Computes what a prompt begins with before the prompt is known; see `PrefixCache.prefill`.

        Runs behind all requests, until one of them waits for the same block: then it goes ahead with that one's turn.
        """
        if self._is_closed:
            return
        tokens = self._tokens(prefix)
        self.engine.prefill(key, tokens if self.local.context is None else tokens[: self.local.context], ticket)
        self.engine.start()

    def hint(self, key: Hashable, prefix: str | Sequence[int], steps: float) -> None:
        """Announces that `key` (say, a program and its agent) sends a prompt with this prefix in `steps` steps.

        It takes the place of what `key` announced before. Announced prefixes stay cached longer than others, near ones
        longest, and come back from the host when they are near.
        """
        self.engine.hint(key, self._tokens(prefix), steps)

    def release(self, key: Hashable) -> None:
        """Takes back what `hint` and `prefill` announced: the branch is not taken, or the program has ended."""
        self.engine.release(key)

    def pin(self, prefix: str | Sequence[int], ttl_s: float) -> None:
        """Keeps what is cached of a prefix before all others for `ttl_s` seconds, as over a call of a tool."""
        self.engine.pin(self._tokens(prefix), ttl_s)

    def _tokens(self, prefix: str | Sequence[int]) -> list[int]:
        return self.local.encode(prefix) if isinstance(prefix, str) else list(prefix)

    def close(self) -> None:
        """Ends the engine's thread and frees the model and the cache. Calls in flight end with a `ResourceError`."""
        with self._lock:
            if not self._is_closed:
                self._is_closed = True
                self._end_engine()
                self.local.free()

    def _run(self, call: _Call, sequences: Iterable[TokenSequence]) -> None:
        self.engine.submit(sequences)
        call.wait()

    def _too_large(self, tokens: int) -> ResourceError | None:
        if tokens < self.engine.capacity_tokens:
            return None
        return ResourceError(
            f"{tokens} tokens do not fit into the KV cache of {self.name}, which holds {self.engine.capacity_tokens}",
            code="F069",
            hint="give the backend more kv_blocks, or shorten the prompt",
        )


_LOADING = tuple(inspect.signature(LocalModel).parameters)[1:]  # options of `PagedBackend` that are the model's


def open_engine(model: str | os.PathLike[str], **options: Any) -> PagedBackend | HFBackend:
    """The model on the paged engine; one that the engine refuses on `HFBackend`, with a warning that says why.

    Takes what `PagedBackend` takes.
    """
    local = LocalModel(model, **{name: options.pop(name) for name in _LOADING if name in options})
    try:
        return PagedBackend(local, **options)
    except NotPagedError as refusal:
        warnings.warn(f"{refusal.message}; it runs through plain generation instead", stacklevel=2)
        return HFBackend(local, max_batch=min(options.get("max_batch", 16), 16), why=refusal.message)


open_engine.__signature__ = inspect.signature(PagedBackend)  # type: ignore[attr-defined]

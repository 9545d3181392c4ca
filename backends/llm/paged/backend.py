"""The paged engine behind `LLMBackend`: several calls may be in flight, and all of them share its steps."""

from __future__ import annotations

import os
import threading
from collections.abc import Hashable, Sequence
from typing import Any

import torch

from flowc.ir.errors import ResourceError
from flowc.runtime.protocols import BackendInfo, ChooseRequest, GenerateRequest, Generation, IsCancelled, OnText

from ..common import check_choice
from ..hf import HFBackend, _Row
from .engine import Engine
from .model import PagedModel
from .sequence import Sequence as TokenSequence


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

    def __init__(self, backend: PagedBackend, row: _Row, is_cancelled: IsCancelled | None, call: _Call) -> None:
        self.backend, self.row, self.is_cancelled, self.call = backend, row, is_cancelled, call

    def next_token(self, sequence: TokenSequence, logits: torch.Tensor) -> int | None:
        row = self.row
        (token,) = self.backend._pick([row], logits.unsqueeze(0))
        row.accept(token, self.backend._end_tokens)
        row.check(self.is_cancelled)
        return None if row.is_done else token

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

    def targets(self, sequence: TokenSequence) -> list[int]:
        return self.option

    def next_token(self, sequence: TokenSequence, logits: torch.Tensor) -> int | None:
        raise AssertionError("a scored sequence decodes nothing")

    def is_wanted(self, sequence: TokenSequence) -> bool:
        return True

    def ended(self, sequence: TokenSequence, error: Exception | None) -> None:
        self.error = error
        self.call.one_ended()


class PagedBackend(HFBackend):
    """A local Hugging Face model on the paged engine. Loading, sampling, stops and errors are those of `HFBackend`.

    `kv_blocks` blocks of `block_size` tokens hold the cache; by default as many as `max_sequences` sequences of 1,024 tokens need.
    `max_step_tokens` bounds a step: smaller keeps tokens flowing while long prompts come in, larger gets prompts done sooner.
    Raises `ResourceError` F067 for an architecture that the engine would run wrongly (see `model.why_not_paged`).
    """

    max_calls = 64  # calls that may be in flight at once: they join the running batch

    def __init__(
        self,
        model: str | os.PathLike[str],
        dtype: str = "float32",
        device: str | None = None,
        max_batch: int = 64,
        threads: int | None = None,
        *,
        kv_blocks: int | None = None,
        block_size: int = 16,
        max_step_tokens: int = 256,
        max_sequences: int = 32,
        revision: str | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(model, dtype, device, max_batch, threads, revision=revision, name=name)
        self._paged = PagedModel(self._model, self.name)
        context = min(self._context or 1024, 1024)
        blocks = kv_blocks or max_sequences * -(-context // block_size) + 1
        self.engine = Engine(
            self._paged, blocks=blocks, block_size=block_size, max_step_tokens=max_step_tokens, max_sequences=max_sequences
        )  # fmt: skip

    def _probe(self) -> str:
        return ""  # nothing is padded here; PagedModel has a probe of its own

    def info(self) -> BackendInfo:
        """What `HFBackend` says, with the cache's size and the tokens that were computed and reused so far."""
        known = super().info()
        stats = self.engine.stats
        cache: dict[str, Any] = {
            "kv_tokens": self.engine.capacity_tokens,
            **{n: getattr(stats, n) for n in stats.__slots__},
        }
        return BackendInfo(known.name, known.kind, {**known.detail, **cache})

    def batch_key(self, request: GenerateRequest) -> Hashable:
        return self.name

    def generate(
        self,
        requests: Sequence[GenerateRequest],
        on_text: OnText | None = None,
        is_cancelled: IsCancelled | None = None,
    ) -> Sequence[Generation | Exception]:
        """Completes every request; see `HFBackend.generate`. Calls from several threads share the engine's steps."""
        self._open()
        results: dict[int, Generation | Exception] = {}
        rows: list[_Row] = []
        for item, request in enumerate(requests):
            row = self._row(item, request, on_text)
            if isinstance(row, Exception):
                results[item] = row
            elif row.limit == 0:
                results[item] = Generation("", len(row.ids), 0, "length")
            elif len(row.ids) >= self.engine.capacity_tokens:
                results[item] = self._does_not_fit(len(row.ids))
            else:
                rows.append(row)
        call = _Call(len(rows))
        self.engine.submit(
            TokenSequence(list(row.ids), 0, limit=row.limit, owner=_Generating(self, row, is_cancelled, call))
            for row in rows
        )
        call.wait()
        results.update((row.item, row.result()) for row in rows)
        return [results[item] for item in range(len(requests))]

    def _does_not_fit(self, tokens: int) -> ResourceError:
        return ResourceError(
            f"{tokens} tokens do not fit into the KV cache of {self.name}, which holds {self.engine.capacity_tokens}",
            code="F069",
            hint="give the backend more kv_blocks, or shorten the prompt",
        )

    def choose(self, requests: Sequence[ChooseRequest]) -> Sequence[int | Exception]:
        """As `HFBackend.choose`. Options are prefilled behind their shared prompt; nothing is decoded."""
        self._open()
        results: dict[int, int | Exception] = {}
        asked: list[tuple[int, list[TokenSequence]]] = []
        for item, request in enumerate(requests):
            error: Exception | None = check_choice(request)
            if error is not None:
                results[item] = error
                continue
            ids = self._encode(request.prompt)
            options = [self._encode(o, special=False) for o in request.options]
            longest = len(ids) + max(map(len, options))
            if self._context is not None and longest > self._context:
                results[item] = self._too_long(longest)
            elif longest >= self.engine.capacity_tokens:
                results[item] = self._does_not_fit(longest)
            else:
                asked.append(
                    (
                        item,
                        [TokenSequence(ids + o[:-1], 0, scored=len(ids), owner=_Scoring(o, _Call(0))) for o in options],
                    )
                )
        call = _Call(sum(len(s) for _, s in asked))
        for _, sequences in asked:
            for s in sequences:
                s.owner.call = call
        self.engine.submit(s for _, sequences in asked for s in sequences)
        call.wait()
        for item, sequences in asked:
            failed = next((s.owner.error for s in sequences if s.owner.error is not None), None)
            results[item] = failed or max(range(len(sequences)), key=lambda i: sequences[i].log_probability)
        return [results[item] for item in range(len(requests))]

    def close(self) -> None:
        """Ends the engine's thread and frees the model and the cache."""
        if not self._closed:
            self.engine.close()
        super().close()

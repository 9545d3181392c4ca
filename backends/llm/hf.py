"""A local Hugging Face model behind `LLMBackend`: padded batches, exact per-request streaming, stops and sampling.

Imports torch and transformers; import it where a model is wanted, not before.

A batch is left-padded and decoded by a loop of our own over `model.forward` with a KV cache: every row has its own
length limit, stop strings, seed and cancellation, rows that are done leave the batch and cost nothing more, and a
batch that does not fit into memory goes on in halves from where it stands. Architectures whose outputs would change
with padding or with their neighbours (recurrent state, ALiBi without positions, RoPE that depends on the longest row)
are recognised at load time, by their configuration and by a probe, and run row by row through `model.generate`.

Greedy decoding in float32 gives the tokens of `model.generate(do_sample=False)` but for exact ties. In bfloat16 a sum
depends on the shape of its batch, so a near-tie can fall either way. Of the model's `generation_config` only the end
and padding tokens are used: its sampling defaults and penalties are not what a request with `temperature=0` asks for.
"""

from __future__ import annotations

import copy
import inspect
import os
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import transformers
from transformers.cache_utils import DynamicCache

from flowc.ir.errors import ResourceError
from flowc.runtime.protocols import BackendInfo, ChooseRequest, IsCancelled

from .local import Choice, LocalBackend, LocalModel
from .rows import Row
from .sampling import pick

__all__ = ["HFBackend"]


class HFBackend(LocalBackend):
    """A causal language model run by transformers' own attention, in padded batches.

    `model` names it, see `LocalModel` for this and for what can be wrong with it, or is a `LocalModel` (then `dtype`,
    `device`, `threads`, `revision`, `name` and `trust_remote_code` are its own). `max_batch` rows share a forward pass.
    `why` is told by `info()`: the reason why this backend runs a model that was meant for another.

    A single request fails with `ResourceError` F068 where its prompt exceeds the model's context and with F069 where it
    does not fit into memory alone.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | LocalModel,
        dtype: str = "float32",
        device: str | None = None,
        max_batch: int = 16,
        threads: int | None = None,
        *,
        revision: str | None = None,
        name: str | None = None,
        trust_remote_code: bool = False,
        why: str | None = None,
    ) -> None:
        if max_batch < 1:
            raise ResourceError(
                f"max_batch must be at least 1, not {max_batch}", hint="give the number of rows in a batch"
            )
        local = (
            model
            if isinstance(model, LocalModel)
            else LocalModel(model, dtype, device, threads, revision, name, trust_remote_code)
        )
        super().__init__(local)
        self.max_batch = max_batch
        self.why = why
        self._lock = threading.RLock()
        self._forward_names = frozenset(inspect.signature(self.local.model.forward).parameters)
        self._one_by_one = (
            _why_not_batched(self.local.text_config, self.local.model, self._forward_names) or self._probe()
        )

    def info(self) -> BackendInfo:
        """What `flowc doctor` and the trace say: sizes, device, and why the model runs unbatched if it does."""
        own = {"max_batch": self.max_batch, "one_by_one": self._one_by_one or None}
        if self.why is not None:
            own["not_on_the_engine"] = self.why
        return BackendInfo(self.name, self.kind, self._details() | own)

    def close(self) -> None:
        """Frees the model's memory. Later calls raise `ResourceError`."""
        with self._lock:
            self._is_closed = True
            self.local.free()

    # Generation

    def _complete(self, rows: list[Row], is_cancelled: IsCancelled | None) -> None:
        rows = sorted(rows, key=lambda r: (len(r.ids), r.item))  # alike lengths share a batch: little padding
        with self._lock, torch.inference_mode():
            self._check_open()
            for at in range(0, len(rows), self.max_batch):
                self._run(rows[at : at + self.max_batch], is_cancelled)

    def _run(self, rows: list[Row], is_cancelled: IsCancelled | None) -> None:
        """Brings rows to their end, together if they fit into memory, else in halves."""
        for row in rows:
            row.check(is_cancelled)
        rows = [row for row in rows if not row.is_done]
        if not rows:
            return
        try:
            if self._one_by_one:
                for row in rows:
                    self._run_plain(row, is_cancelled)
            else:
                self._run_batch(rows, is_cancelled)
            return
        except Exception as e:
            if not _is_out_of_memory(e):
                raise
            if len(rows) == 1:
                rows[0].error = ResourceError(
                    f"{self.name} ran out of memory on {self.local.device} over a prompt of {len(rows[0].ids)} tokens",
                    code="F069",
                    hint="shorten the prompt, lower max_tokens, use dtype bfloat16 or a smaller model",
                )
                return
        # Out of the handler, so that the traceback no longer holds the tensors of the failed batch.
        if self.local.device.type == "cuda":
            torch.cuda.empty_cache()
        middle = len(rows) // 2
        self._run(rows[:middle], is_cancelled)
        self._run(rows[middle:], is_cancelled)

    def _run_batch(self, rows: list[Row], is_cancelled: IsCancelled | None) -> None:
        # What a row has said already is prefilled like its prompt: a batch can start anew at any step.
        logits, cache, mask = self._prefill([row.ids + row.tokens for row in rows])
        while True:
            tokens = pick(rows, logits)
            for row, token in zip(rows, tokens, strict=True):
                row.accept(token, self.local.end_tokens)
                row.check(is_cancelled)
            alive = [i for i, row in enumerate(rows) if not row.is_done]
            if not alive:
                return
            if len(alive) < len(rows):
                keep = torch.tensor(alive, device=self.local.device)
                cache.batch_select_indices(keep)
                mask = mask[keep]
                rows, tokens = [rows[i] for i in alive], [tokens[i] for i in alive]
            positions = mask.sum(-1, keepdim=True)
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=-1)
            step = torch.tensor(tokens, device=self.local.device).unsqueeze(1)
            logits = self._forward(step, mask, positions, cache)[:, -1]

    def _run_plain(self, row: Row, is_cancelled: IsCancelled | None) -> None:
        """One row through `model.generate`, with our sampling and stopping as its hooks: right for any architecture."""

        def force(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            forced = torch.full_like(scores, -torch.inf)
            forced[0, pick([row], scores)[0]] = 0.0
            return forced

        def stop(input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
            row.accept(int(input_ids[0, -1]), self.local.end_tokens)
            row.check(is_cancelled)
            return torch.tensor([row.is_done], device=input_ids.device)

        ids = torch.tensor([row.ids + row.tokens], device=self.local.device)
        self.local.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            generation_config=transformers.GenerationConfig(
                max_new_tokens=row.limit - len(row.tokens),
                do_sample=False,
                pad_token_id=self.local.pad,
                eos_token_id=sorted(self.local.end_tokens) or None,
            ),
            logits_processor=[force],
            stopping_criteria=[stop],
        )

    # Choice

    def _scores(
        self, asked: list[Choice], requests: Sequence[ChooseRequest]
    ) -> Iterator[tuple[int, list[float] | Exception]]:
        """One prefill a prompt, and one short forward for what options have beyond their first token."""
        asked = sorted(asked, key=lambda a: (len(a[1]), a[0]))
        with self._lock, torch.inference_mode():
            self._check_open()
            for at in range(0, len(asked), self.max_batch):
                chunk = asked[at : at + self.max_batch]
                yield from zip((item for item, _, _ in chunk), self._score(chunk), strict=True)

    def _score(self, asked: Sequence[Choice]) -> list[list[float] | Exception]:
        """The total log-probability of every option of every prompt; halves the batch where memory is short."""
        try:
            if self._one_by_one:
                return [[self._score_plain(ids, option) for option in options] for _, ids, options in asked]
            return list(self._score_batch(asked))
        except Exception as e:
            if not _is_out_of_memory(e):
                raise
            if len(asked) == 1:
                return [
                    ResourceError(
                        f"{self.name} ran out of memory on {self.local.device} "
                        f"over one choice of {len(asked[0][1])} tokens",
                        code="F069",
                        hint="shorten the prompt, use dtype bfloat16 or a smaller model",
                    )
                ]
        middle = len(asked) // 2
        return self._score(asked[:middle]) + self._score(asked[middle:])

    def _score_batch(self, asked: Sequence[Choice]) -> Iterator[list[float]]:
        logits, cache, mask = self._prefill([ids for _, ids, _ in asked])
        first = torch.log_softmax(logits.float(), dim=-1)
        scores = [[float(first[i, option[0]]) for option in options] for i, (_, _, options) in enumerate(asked)]
        longer = [
            (i, j, option)
            for i, (_, _, options) in enumerate(asked)
            for j, option in enumerate(options)
            if len(option) > 1
        ]
        # The prompts' cache rows are repeated for the options that need more than the prompt's own last logits.
        for at in range(0, len(longer), self.max_batch):
            part = longer[at : at + self.max_batch]
            rows = torch.tensor([i for i, _, _ in part], device=self.local.device)
            width = max(len(option) for _, _, option in part) - 1
            ids = torch.full((len(part), width), self.local.pad, device=self.local.device)
            seen = torch.zeros((len(part), width), dtype=mask.dtype, device=self.local.device)
            for n, (_, _, option) in enumerate(part):
                ids[n, : len(option) - 1] = torch.tensor(option[:-1], device=self.local.device)
                seen[n, : len(option) - 1] = 1
            positions = mask[rows].sum(-1, keepdim=True) + torch.arange(width, device=self.local.device)
            branch = _select(cache, rows)
            full = torch.cat([mask[rows], seen], dim=-1)
            following = torch.log_softmax(self._forward(ids, full, positions, branch, keep=width).float(), dim=-1)
            for n, (i, j, option) in enumerate(part):
                scores[i][j] += sum(float(following[n, k, token]) for k, token in enumerate(option[1:]))
        yield from scores

    def _score_plain(self, ids: list[int], option: list[int]) -> float:
        logits = self.local.model(input_ids=torch.tensor([ids + option], device=self.local.device)).logits[0]
        table = torch.log_softmax(logits[len(ids) - 1 : -1].float(), dim=-1)
        return sum(float(table[k, token]) for k, token in enumerate(option))

    # The model

    def _prefill(self, prompts: Sequence[list[int]]) -> tuple[torch.Tensor, DynamicCache, torch.Tensor]:
        """The last logits (rows, vocab), the cache and the mask (rows, longest) of left-padded prompts."""
        width = max(map(len, prompts))
        ids = torch.tensor([[self.local.pad] * (width - len(p)) + p for p in prompts], device=self.local.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=self.local.device)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        cache = DynamicCache(config=self.local.model.config.get_text_config(decoder=True))
        return self._forward(ids, mask, positions, cache)[:, -1], cache, mask

    def _forward(
        self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: DynamicCache, keep: int = 1
    ) -> torch.Tensor:
        """Logits of the last `keep` positions, of shape (rows, keep, vocab)."""
        extra = {"logits_to_keep": keep} if "logits_to_keep" in self._forward_names else {}
        out = self.local.model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True, **extra
        )
        logits: torch.Tensor = out.logits[:, -keep:]
        return logits

    @torch.inference_mode()
    def _probe(self) -> str:
        """Why batching would change this model's answers, found by trying: "" if it would not."""
        tokens = [
            t for t in range(min(self.local.vocab_size, 64)) if t not in self.local.end_tokens and t != self.local.pad
        ]
        if len(tokens) < 12:
            return ""
        short, long = tokens[:4], tokens[4:12]
        try:
            alone = (
                self.local.model(input_ids=torch.tensor([short + long[:1]], device=self.local.device))
                .logits[0, -1]
                .float()
            )
            _, cache, mask = self._prefill([long, short])
            positions = mask.sum(-1, keepdim=True)
            mask = torch.cat([mask, mask.new_ones(2, 1)], dim=-1)
            step = torch.tensor([[long[0]], [long[0]]], device=self.local.device)
            beside = self._forward(step, mask, positions, cache)[1, -1].float()
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as e:
            return f"it does not take padded batches ({type(e).__name__})"
        tolerance = 1e-3 if self.local.model.dtype == torch.float32 else 0.1
        off = float((alone - beside).norm() / alone.norm().clamp(min=1e-6))
        return "" if off <= tolerance else f"its answers change when a prompt is padded (by {off:.2g})"


def _select(cache: DynamicCache, rows: torch.Tensor) -> DynamicCache:
    """A new cache of the chosen rows (repetitions allowed); `cache` is left as it is."""
    branch = copy.copy(cache)
    branch.layers = [copy.copy(layer) for layer in cache.layers]
    branch.batch_select_indices(rows)
    return branch


def _is_out_of_memory(e: Exception) -> bool:
    return isinstance(e, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(e, RuntimeError) and "can't allocate memory" in str(e)
    )


def _why_not_batched(config: Any, model: Any, forward_names: frozenset[str]) -> str:
    """The reason in the configuration why rows of a padded batch would not be independent; "" if there is none."""
    if getattr(model, "_is_stateful", False):
        return "it keeps a recurrent state, which padding would change"
    missing = {"attention_mask", "position_ids", "past_key_values"} - forward_names
    if missing:
        return f"its forward takes no {', '.join(sorted(missing))}"
    other = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if other:
        return f"it has layers of type {', '.join(sorted(other))}"
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    for part in (rope, *(p for p in rope.values() if isinstance(p, dict))):
        if part.get("rope_type", part.get("type")) in ("dynamic", "longrope"):
            return "its rotary embedding depends on the longest row of the batch"
    return ""

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
import gc
import hashlib
import inspect
import os
import re
import secrets
import struct
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.cache_utils import DynamicCache

from flowc.ir.errors import FlowcError, NodeTimeoutError, ResourceError
from flowc.runtime.protocols import BackendInfo, ChooseRequest, GenerateRequest, Generation, IsCancelled, OnText

from .common import StopFilter, check_choice, check_request, plain_chat

__all__ = ["Detokenizer", "HFBackend", "sample_token", "uniform"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?")
_SURROGATES = re.compile("[\ud800-\udfff]")
_INCOMPLETE = "\ufffd"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def uniform(seed: int, position: int) -> float:
    """The number in [0, 1) that request `seed` draws for its token at `position`.

    Counter-based: it depends on nothing else, so batch mates, pauses and restarts cannot change what is sampled.
    """
    digest = hashlib.blake2b(struct.pack("<QQ", seed & (2**64 - 1), position), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / 2**53


def sample_token(logits: torch.Tensor, temperature: float, top_p: float, top_k: int, u: float) -> int:
    """The token that `u` picks from logits of shape (vocab,) by inverse transform, after temperature, top-k and top-p.

    Top-p keeps the smallest set of likeliest tokens whose probabilities reach `top_p` (Holtzman et al., "The Curious
    Case of Neural Text Degeneration", 2020, section 3.1). Tokens are taken likeliest first, the lower id first among
    equals.
    """
    values, order = torch.sort(logits.double().cpu() / temperature, descending=True, stable=True)
    if top_k:
        values, order = values[:top_k], order[:top_k]
    probabilities = torch.softmax(values, dim=-1)
    cumulative = probabilities.cumsum(-1)
    kept = int((cumulative - probabilities < top_p).sum())
    at = int(torch.searchsorted(cumulative[:kept], u * float(cumulative[kept - 1]), right=True))
    return int(order[min(at, kept - 1)])


class Detokenizer:
    """The text of a growing list of tokens, piece by piece, never with half a character.

    `push(token)` gives back the text that is certain by now, `flush()` the rest. Pieces concatenate to the decoded
    list. Decodes a short window that begins at the last certain boundary, so a token costs the same at any length.
    """

    __slots__ = ("_base", "_decode", "_ids", "_prefix", "_read", "_sent")

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._prefix = self._read = 0  # the window is ids[prefix:]; ids[prefix:read] only gives context
        self._base = self._sent = 0  # characters of the window: of the context, and shown since

    def push(self, token: int) -> str:
        self._ids.append(token)
        text = self._decode(self._ids[self._prefix :])
        certain = text
        for _ in range(3):  # the bytes of one unfinished character decode to at most three marks
            certain = certain.removesuffix(_INCOMPLETE)
        piece = certain[self._base + self._sent :]
        self._sent += len(piece)
        if piece and len(certain) == len(text):
            self._prefix, self._read = self._read, len(self._ids)
            self._base, self._sent = len(self._decode(self._ids[self._prefix : self._read])), 0
        return piece

    def flush(self) -> str:
        text = self._decode(self._ids[self._prefix :])[self._base + self._sent :]
        self._sent += len(text)
        return text


class _Row:
    """One request on its way through a batch."""

    __slots__ = (
        "_detokenizer",
        "_stops",
        "_tell",
        "deadline",
        "error",
        "finish",
        "ids",
        "item",
        "limit",
        "request",
        "said",
        "seed",
        "tokens",
    )

    def __init__(
        self,
        item: int,
        request: GenerateRequest,
        ids: list[int],
        limit: int,
        decode: Callable[[list[int]], str],
        on_text: OnText | None,
    ) -> None:
        self.item, self.request, self.ids, self.limit = item, request, ids, limit
        self.seed = request.seed if request.seed is not None else secrets.randbits(64)
        self.deadline = None if request.timeout_s is None else time.monotonic() + request.timeout_s
        self.tokens: list[int] = []
        self.said: list[str] = []
        self.finish: str | None = None
        self.error: Exception | None = None
        self._detokenizer = Detokenizer(decode)
        self._stops = StopFilter(request.stop)
        self._tell = on_text

    @property
    def is_done(self) -> bool:
        return self.finish is not None or self.error is not None

    def result(self) -> Generation | Exception:
        if self.error is not None:
            return self.error
        return Generation("".join(self.said), len(self.ids), len(self.tokens), self.finish or "cancelled")

    def accept(self, token: int, end_tokens: frozenset[int]) -> None:
        """Takes the next token, and finishes the row where it ends."""
        self.tokens.append(token)
        if token in end_tokens:
            self._end("stop")
            return
        self._say(self._stops.push(self._detokenizer.push(token)))
        if self._stops.matched is not None:
            self.finish = "stop"
        elif len(self.tokens) >= self.limit:
            self._end("length")

    def check(self, is_cancelled: IsCancelled | None) -> None:
        """Finishes the row if it was cancelled or ran out of time."""
        if self.is_done:
            return
        if is_cancelled is not None and is_cancelled(self.item):
            self.finish = "cancelled"
        elif self.deadline is not None and time.monotonic() > self.deadline:
            self.error = NodeTimeoutError(
                f"the generation took longer than {self.request.timeout_s:g} s "
                f"({len(self.tokens)} of at most {self.limit} tokens)",
                hint="raise the timeout, lower max_tokens or use a smaller model",
            )

    def _end(self, reason: str) -> None:
        self._say(self._stops.push(self._detokenizer.flush()))
        if self._stops.matched is None:
            self._say(self._stops.flush())
        else:
            reason = "stop"
        self.finish = reason

    def _say(self, piece: str) -> None:
        if not piece:
            return
        self.said.append(piece)
        if self._tell is not None and self.error is None:
            try:
                self._tell(self.item, piece)
            except Exception as e:  # a listener's failure is its own item's, not the batch's
                self.error = e


class HFBackend:
    """A causal language model from a local folder or the Hugging Face hub.

    `model` is a folder with `config.json`, `*.safetensors` and a tokenizer (never fetched, never trusted to run code),
    or a hub id such as `Qwen/Qwen3-0.6B`, which is downloaded unless it is cached. `dtype` is "float32", "bfloat16",
    "float16" or "auto" (the checkpoint's own). `device` None takes the GPU if there is one. `max_batch` rows share a
    forward pass. `threads` sets torch's threads for the whole process; on a busy machine one is often the fastest.

    Raises `ResourceError`: F064 no such folder or hub id, F065 damaged, incomplete or not safetensors, F066 no
    tokenizer, F067 not a causal language model. A single request fails with F068 where its prompt exceeds the model's
    context and with F069 where it does not fit into memory alone.
    """

    kind = "language-model"

    def __init__(
        self,
        model: str | os.PathLike[str],
        dtype: str = "float32",
        device: str | None = None,
        max_batch: int = 16,
        threads: int | None = None,
        *,
        revision: str | None = None,
        name: str | None = None,
    ) -> None:
        if dtype != "auto" and dtype not in _DTYPES:
            raise ResourceError(f"unknown dtype {dtype!r}", hint=f"use one of {', '.join(_DTYPES)}, auto")
        if max_batch < 1:
            raise ResourceError(
                f"max_batch must be at least 1, not {max_batch}", hint="give the number of rows in a batch"
            )
        source, local = _locate(model)
        self.name = name or Path(source).name
        self.max_batch = max_batch
        self._lock = threading.RLock()
        self._closed = False
        if threads is not None:
            torch.set_num_threads(threads)
        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        where: dict[str, Any] = {"local_files_only": local, "trust_remote_code": False, "revision": revision or "main"}
        config = _load_config(source, where)
        self._tokenizer: Any = _load_tokenizer(source, where)
        self._model: Any = _load_model(source, config, dtype if dtype == "auto" else _DTYPES[dtype], where).to(
            self._device
        )
        text_config = config.get_text_config(decoder=True)
        self._context: int | None = getattr(text_config, "max_position_embeddings", None)
        self._vocab: int = text_config.vocab_size
        generation = self._model.generation_config
        ends = generation.eos_token_id if generation.eos_token_id is not None else self._tokenizer.eos_token_id
        self._end_tokens = frozenset([ends] if isinstance(ends, int) else ends or [])
        self._pad = next(
            (
                t
                for t in (generation.pad_token_id, self._tokenizer.pad_token_id, *sorted(self._end_tokens))
                if isinstance(t, int)
            ),
            0,
        )
        self._forward_names = frozenset(inspect.signature(self._model.forward).parameters)
        self._one_by_one = _why_not_batched(text_config, self._model, self._forward_names) or self._probe()

    # What the backend is

    @property
    def context_tokens(self) -> int | None:
        """How many tokens prompt and answer may have together; None where the architecture sets no limit."""
        return self._context

    def info(self) -> BackendInfo:
        """What `flowc doctor` and the trace say: sizes, device, and why the model runs unbatched if it does."""
        self._open()
        detail = {
            "architecture": type(self._model).__name__,
            "parameters": sum(p.numel() for p in self._model.parameters()),
            "dtype": str(self._model.dtype).removeprefix("torch."),
            "device": str(self._device),
            "context_tokens": self._context,
            "max_batch": self.max_batch,
            "one_by_one": self._one_by_one or None,
        }
        return BackendInfo(self.name, self.kind, detail)

    def count_tokens(self, text: str) -> int:
        """The number of tokens of `text` as a prompt, special tokens that the tokenizer adds included."""
        self._open()
        return len(self._encode(text))

    def render_chat(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The prompt for a conversation, by the tokenizer's chat template (rendered in transformers' Jinja sandbox).

        Without a template the turns are written as plain text, see `plain_chat`.
        """
        self._open()
        if not self._tokenizer.chat_template:
            return plain_chat(messages)
        try:
            turns = [dict(m) for m in messages]
            return str(self._tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
        except Exception as e:  # a template is a program of the model's author: it may raise anything
            raise ResourceError(
                f"the chat template of {self.name} refused the messages: {e}",
                code="F066",
                hint="many templates want the roles user and assistant in turn, some no system message",
            ) from e

    def batch_key(self, request: GenerateRequest) -> Hashable:
        """The same for all requests: rows keep their own parameters, so any can share a batch."""
        return self.name

    def close(self) -> None:
        """Frees the model's memory. Later calls raise `ResourceError`."""
        with self._lock:
            self._closed = True
            self._model = None
            gc.collect()
            if self._device.type == "cuda":
                torch.cuda.empty_cache()

    # Generation

    def generate(
        self,
        requests: Sequence[GenerateRequest],
        on_text: OnText | None = None,
        is_cancelled: IsCancelled | None = None,
    ) -> Sequence[Generation | Exception]:
        """Completes every request; see `LLMBackend.generate`.

        The answer is cut at the end of the model's context if `max_tokens` reaches beyond it (finish reason "length").
        Lone surrogates in a prompt are read as U+FFFD. `completion_tokens` counts the end token or stop string too.
        """
        with self._lock:
            self._open()
            results: dict[int, Generation | Exception] = {}
            rows = []
            for item, request in enumerate(requests):
                row = self._row(item, request, on_text)
                if isinstance(row, Exception):
                    results[item] = row
                elif row.limit == 0:
                    results[item] = Generation("", len(row.ids), 0, "length")
                else:
                    rows.append(row)
            rows.sort(key=lambda r: (len(r.ids), r.item))  # alike lengths share a batch: little padding
            with torch.inference_mode():
                for at in range(0, len(rows), self.max_batch):
                    self._run(rows[at : at + self.max_batch], is_cancelled)
            results.update((row.item, row.result()) for row in rows)
            return [results[item] for item in range(len(requests))]

    def _row(self, item: int, request: GenerateRequest, on_text: OnText | None) -> _Row | Exception:
        error: FlowcError | None = check_request(request)
        if error is not None:
            return error
        ids = self._encode(request.prompt)
        limit = request.max_tokens
        if self._context is not None:
            if len(ids) >= self._context and limit:
                return self._too_long(len(ids))
            limit = min(limit, max(0, self._context - len(ids)))
        return _Row(item, request, ids, limit, self._decode, on_text)

    def _too_long(self, tokens: int) -> ResourceError:
        return ResourceError(
            f"the prompt has {tokens} tokens, but the context of {self.name} holds {self._context} with the answer",
            code="F068",
            hint="retrieve fewer or shorter passages (a smaller k), or use a model with a longer context",
        )

    def _run(self, rows: list[_Row], is_cancelled: IsCancelled | None) -> None:
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
                    f"{self.name} ran out of memory on {self._device} over one prompt of {len(rows[0].ids)} tokens",
                    code="F069",
                    hint="shorten the prompt, lower max_tokens, use dtype bfloat16 or a smaller model",
                )
                return
        # Out of the handler, so that the traceback no longer holds the tensors of the failed batch.
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        middle = len(rows) // 2
        self._run(rows[:middle], is_cancelled)
        self._run(rows[middle:], is_cancelled)

    def _run_batch(self, rows: list[_Row], is_cancelled: IsCancelled | None) -> None:
        # What a row has said already is prefilled like its prompt: a batch can start anew at any step.
        logits, cache, mask = self._prefill([row.ids + row.tokens for row in rows])
        while True:
            tokens = self._pick(rows, logits)
            for row, token in zip(rows, tokens, strict=True):
                row.accept(token, self._end_tokens)
                row.check(is_cancelled)
            alive = [i for i, row in enumerate(rows) if not row.is_done]
            if not alive:
                return
            if len(alive) < len(rows):
                keep = torch.tensor(alive, device=self._device)
                cache.batch_select_indices(keep)
                mask = mask[keep]
                rows, tokens = [rows[i] for i in alive], [tokens[i] for i in alive]
            positions = mask.sum(-1, keepdim=True)
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=-1)
            step = torch.tensor(tokens, device=self._device).unsqueeze(1)
            logits = self._forward(step, mask, positions, cache)[:, -1]

    def _run_plain(self, row: _Row, is_cancelled: IsCancelled | None) -> None:
        """One row through `model.generate`, with our sampling and stopping as its hooks: right for any architecture."""

        def force(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            forced = torch.full_like(scores, -torch.inf)
            forced[0, self._pick([row], scores)[0]] = 0.0
            return forced

        def stop(input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
            row.accept(int(input_ids[0, -1]), self._end_tokens)
            row.check(is_cancelled)
            return torch.tensor([row.is_done], device=input_ids.device)

        ids = torch.tensor([row.ids + row.tokens], device=self._device)
        self._model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            generation_config=transformers.GenerationConfig(
                max_new_tokens=row.limit - len(row.tokens),
                do_sample=False,
                pad_token_id=self._pad,
                eos_token_id=sorted(self._end_tokens) or None,
            ),
            logits_processor=[force],
            stopping_criteria=[stop],
        )

    def _pick(self, rows: Sequence[_Row], logits: torch.Tensor) -> list[int]:
        """The next token of every row from logits of shape (rows, vocab)."""
        tokens: list[int] = logits.argmax(-1).tolist()
        for i, row in enumerate(rows):
            r = row.request
            if r.temperature > 0:
                tokens[i] = sample_token(
                    logits[i].float(), r.temperature, r.top_p, r.top_k, uniform(row.seed, len(row.tokens))
                )
        return tokens

    # Choice

    def choose(self, requests: Sequence[ChooseRequest]) -> Sequence[int | Exception]:
        """The option with the highest total log-probability as a continuation of its prompt, ties to the first.

        The option's tokens are those of its text alone, put after the prompt's; nothing is inserted between, so a
        prompt that ends in "Answer:" wants options such as " yes". Log-probabilities are summed and not divided by
        length: of options that share a beginning the shorter scores at least as high, so let options differ in their
        first words. One prefill per prompt, and one short forward for what options have beyond their first token;
        nothing is decoded.
        """
        with self._lock, torch.inference_mode():
            self._open()
            results: dict[int, int | Exception] = {}
            asked: list[tuple[int, list[int], list[list[int]]]] = []
            for item, request in enumerate(requests):
                error: Exception | None = check_choice(request)
                if error is None:
                    ids = self._encode(request.prompt)
                    options = [self._encode(option, special=False) for option in request.options]
                    longest = len(ids) + max(map(len, options))
                    error = self._too_long(longest) if self._context is not None and longest > self._context else None
                    if error is None:
                        asked.append((item, ids, options))
                        continue
                results[item] = error
            asked.sort(key=lambda a: (len(a[1]), a[0]))
            for at in range(0, len(asked), self.max_batch):
                chunk = asked[at : at + self.max_batch]
                for (item, _, _), outcome in zip(chunk, self._score(chunk), strict=True):
                    results[item] = (
                        outcome if isinstance(outcome, Exception) else max(range(len(outcome)), key=outcome.__getitem__)
                    )
            return [results[item] for item in range(len(requests))]

    def _score(self, asked: Sequence[tuple[int, list[int], list[list[int]]]]) -> list[list[float] | Exception]:
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
                        f"{self.name} ran out of memory on {self._device} over one choice of {len(asked[0][1])} tokens",
                        code="F069",
                        hint="shorten the prompt, use dtype bfloat16 or a smaller model",
                    )
                ]
        middle = len(asked) // 2
        return self._score(asked[:middle]) + self._score(asked[middle:])

    def _score_batch(self, asked: Sequence[tuple[int, list[int], list[list[int]]]]) -> Iterator[list[float]]:
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
            rows = torch.tensor([i for i, _, _ in part], device=self._device)
            width = max(len(option) for _, _, option in part) - 1
            ids = torch.full((len(part), width), self._pad, device=self._device)
            seen = torch.zeros((len(part), width), dtype=mask.dtype, device=self._device)
            for n, (_, _, option) in enumerate(part):
                ids[n, : len(option) - 1] = torch.tensor(option[:-1], device=self._device)
                seen[n, : len(option) - 1] = 1
            positions = mask[rows].sum(-1, keepdim=True) + torch.arange(width, device=self._device)
            branch = _select(cache, rows)
            full = torch.cat([mask[rows], seen], dim=-1)
            following = torch.log_softmax(self._forward(ids, full, positions, branch, keep=width).float(), dim=-1)
            for n, (i, j, option) in enumerate(part):
                scores[i][j] += sum(float(following[n, k, token]) for k, token in enumerate(option[1:]))
        yield from scores

    def _score_plain(self, ids: list[int], option: list[int]) -> float:
        logits = self._model(input_ids=torch.tensor([ids + option], device=self._device)).logits[0]
        table = torch.log_softmax(logits[len(ids) - 1 : -1].float(), dim=-1)
        return sum(float(table[k, token]) for k, token in enumerate(option))

    # The model

    def _prefill(self, prompts: Sequence[list[int]]) -> tuple[torch.Tensor, DynamicCache, torch.Tensor]:
        """The last logits (rows, vocab), the cache and the mask (rows, longest) of left-padded prompts."""
        width = max(map(len, prompts))
        ids = torch.tensor([[self._pad] * (width - len(p)) + p for p in prompts], device=self._device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=self._device)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        cache = DynamicCache(config=self._model.config.get_text_config(decoder=True))
        return self._forward(ids, mask, positions, cache)[:, -1], cache, mask

    def _forward(
        self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: DynamicCache, keep: int = 1
    ) -> torch.Tensor:
        """Logits of the last `keep` positions, of shape (rows, keep, vocab)."""
        extra = {"logits_to_keep": keep} if "logits_to_keep" in self._forward_names else {}
        out = self._model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True, **extra
        )
        logits: torch.Tensor = out.logits[:, -keep:]
        return logits

    @torch.inference_mode()
    def _probe(self) -> str:
        """Why batching would change this model's answers, found by trying: "" if it would not."""
        tokens = [t for t in range(min(self._vocab, 64)) if t not in self._end_tokens and t != self._pad]
        if len(tokens) < 12:
            return ""
        short, long = tokens[:4], tokens[4:12]
        try:
            alone = self._model(input_ids=torch.tensor([short + long[:1]], device=self._device)).logits[0, -1].float()
            _, cache, mask = self._prefill([long, short])
            positions = mask.sum(-1, keepdim=True)
            mask = torch.cat([mask, mask.new_ones(2, 1)], dim=-1)
            step = torch.tensor([[long[0]], [long[0]]], device=self._device)
            beside = self._forward(step, mask, positions, cache)[1, -1].float()
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as e:
            return f"it does not take padded batches ({type(e).__name__})"
        tolerance = 1e-3 if self._model.dtype == torch.float32 else 0.1
        off = float((alone - beside).norm() / alone.norm().clamp(min=1e-6))
        return "" if off <= tolerance else f"its answers change when a prompt is padded (by {off:.2g})"

    def _encode(self, text: str, special: bool = True) -> list[int]:
        text = _SURROGATES.sub(_INCOMPLETE, text)
        bos = self._tokenizer.bos_token
        if special and bos and text.startswith(bos):
            special = False  # a chat template has already written it
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=special)
        if not ids:  # a model must see something
            start = self._tokenizer.bos_token_id
            ids = [start if start is not None else self._pad]
        return ids

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _open(self) -> None:
        if self._closed:
            raise ResourceError(f"the model {self.name} was closed", hint="open the backend again")


def _select(cache: DynamicCache, rows: torch.Tensor) -> DynamicCache:
    """A new cache of the chosen rows (repetitions allowed); `cache` is left as it is."""
    branch = copy.copy(cache)
    branch.layers = [copy.copy(layer) for layer in cache.layers]
    branch.batch_select_indices(rows)
    return branch


def _locate(model: str | os.PathLike[str]) -> tuple[str, bool]:
    """Where a model is: (folder, True) or (hub id, False)."""
    path = Path(model).expanduser()
    if path.is_dir():
        return str(path), True
    if path.exists():
        raise ResourceError(
            f"{path} is a file, not a model folder", code="F064", hint="name the folder that holds config.json"
        )
    text = os.fspath(model)
    if isinstance(model, str) and _HUB_ID.fullmatch(text) and not text.startswith("."):
        return text, False
    raise ResourceError(
        f"there is no model folder {path}",
        code="F064",
        hint="give a folder with config.json, *.safetensors and tokenizer.json, or a hub id such as Qwen/Qwen3-0.6B; "
        "`flowc model tiny DIR` writes one for tests",
    )


def _load_config(source: str, where: dict[str, Any]) -> Any:
    if where["local_files_only"] and not (Path(source) / "config.json").is_file():
        raise ResourceError(
            f"{source} holds no config.json",
            code="F065",
            hint="name the folder that save_pretrained wrote, or a snapshot of the hub",
        )
    try:
        config: Any = transformers.AutoConfig.from_pretrained(source, **where)
    except Exception as e:  # transformers and the hub raise many types for a bad configuration
        raise _unreadable(source, where, e) from e
    names = getattr(config, "architectures", None) or []
    causal = type(config) in transformers.AutoModelForCausalLM._model_mapping
    if (
        getattr(config, "is_encoder_decoder", False)
        or not causal
        or (names and not any("LM" in n or "ConditionalGeneration" in n for n in names))
    ):
        what = ", ".join(names) or type(config).__name__
        raise ResourceError(
            f"{source} is no causal language model: it holds {what}",
            code="F067",
            hint="use a model whose architecture ends in ForCausalLM",
        )
    if any("MaskedLM" in n for n in names):
        raise ResourceError(
            f"{source} is no causal language model: it holds {', '.join(names)}",
            code="F067",
            hint="use a model whose architecture ends in ForCausalLM",
        )
    return config


def _load_tokenizer(source: str, where: dict[str, Any]) -> Any:
    hint = "put the model's tokenizer.json and tokenizer_config.json into the folder"
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **where)
    except Exception as e:
        raise ResourceError(f"{source} has no usable tokenizer: {_first_line(e)}", code="F066", hint=hint) from e
    if not len(tokenizer):
        raise ResourceError(f"{source} has no usable tokenizer: it holds no vocabulary", code="F066", hint=hint)
    return tokenizer


def _load_model(source: str, config: Any, dtype: Any, where: dict[str, Any]) -> Any:
    load: Any = transformers.AutoModelForCausalLM.from_pretrained
    try:
        with _quiet():
            model, loading = load(
                source, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True, **where
            )
    except Exception as e:
        raise _unreadable(source, where, e) from e
    missing = sorted(loading["missing_keys"])
    if missing:  # transformers would go on with random numbers in their place
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ResourceError(
            f"the weights of {source} are incomplete: {missing[0]}{more} missing",
            code="F065",
            hint="fetch the model again",
        )
    return model.eval()


def _unreadable(source: str, where: dict[str, Any], e: Exception) -> ResourceError:
    if where["local_files_only"]:
        return ResourceError(
            f"the model in {source} cannot be read: {_first_line(e)}",
            code="F065",
            hint="it needs a valid config.json and weights in *.safetensors (convert others with save_pretrained)",
        )
    return ResourceError(
        f"{source} is neither a folder here nor a model that the hub gave out: {_first_line(e)}",
        code="F064",
        hint="check the spelling and the connection, or give the path of a model folder",
    )


def _first_line(e: Exception) -> str:
    return next(iter(str(e).strip().splitlines()), type(e).__name__)[:300]


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bar on stderr while weights load: the command line has its own."""
    logging = transformers.utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


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

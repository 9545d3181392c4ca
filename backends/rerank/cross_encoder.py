"""A cross-encoder from a local directory: query and passage in one sequence, one number for how well they fit.

Source: Nogueira and Cho, "Passage Re-ranking with BERT", 2019. The directory is one of `transformers`: config.json,
tokenizer.json, model.safetensors, of a model for sequence classification with one output, or with two (then the
difference of the second and the first counts).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from flowc.ir.errors import ConfigError, ResourceError
from flowc.ir.values import Docs
from flowc.runtime.protocols import RerankRequest

from .ranking import Pair, ScoreCache, ranked

__all__ = ["CrossEncoder"]


class CrossEncoder:
    """Ranks passages by a cross-encoder. Implements `flowc.runtime.protocols.Reranker`; safe to use from threads.

    A pair is scored by itself, so its score is the same bits in any company; equal pairs of a batch are scored once,
    and the last `cache_size` scores are kept by content. `batch` above 1 computes so many pairs of about one length
    together, which pays on a GPU and not on a CPU, and moves last bits. `max_tokens` bounds a pair: the passage is cut,
    never the query. `dtype` "bfloat16" is faster on machines that have it.
    """

    max_batch = 64

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        name: str | None = None,
        device: str = "cpu",
        dtype: Literal["float32", "bfloat16"] = "float32",
        batch: int = 1,
        max_tokens: int | None = None,
        cache_size: int = 65_536,
    ) -> None:
        self.folder = Path(path)
        self.name = name or self.folder.name
        if dtype not in ("float32", "bfloat16"):
            raise ConfigError(f"dtype must be float32 or bfloat16, found {dtype!r}")
        if batch < 1 or cache_size < 0 or (max_tokens is not None and max_tokens < 8):
            raise ConfigError("batch must be at least 1, cache_size at least 0 and max_tokens at least 8")
        self.device, self.dtype, self.batch = device, dtype, batch
        self._max_tokens = max_tokens
        self._cache = ScoreCache(cache_size)
        self._lock = threading.Lock()
        self._loaded: tuple[Any, Any, Any] | None = None

    def rerank(self, requests: Sequence[RerankRequest]) -> Sequence[Docs | Exception]:
        """The best k passages of every request (all without k), best first, equal scores as they came."""
        return ranked(requests, lambda pairs: self._cache.of(pairs, self.scores))

    def scores(self, pairs: Sequence[Pair]) -> list[float]:
        """The model's number for each (query, passage). Raises `ResourceError` for a model that cannot be loaded."""
        with self._lock:
            tokenizer, model, torch = self._load()
            clean = [tuple(text.encode("utf-8", "replace").decode() for text in pair) for pair in pairs]
            encoded = tokenizer.encode_batch(clean)
            order = sorted(range(len(pairs)), key=lambda n: len(encoded[n].ids))
            out = [0.0] * len(pairs)
            before = torch.get_num_threads()
            torch.set_num_threads(1)
            try:
                for start in range(0, len(order), self.batch):
                    group = order[start : start + self.batch]
                    for n, value in zip(group, self._logits(model, torch, [encoded[n] for n in group]), strict=True):
                        out[n] = value
            finally:
                torch.set_num_threads(before)
        return out

    def _logits(self, model: Any, torch: Any, group: Sequence[Any]) -> list[float]:
        longest = max(len(e.ids) for e in group)
        ids, kinds, mask = (torch.zeros(len(group), longest, dtype=torch.long) for _ in range(3))
        for row, e in enumerate(group):
            ids[row, : len(e.ids)] = torch.as_tensor(e.ids)
            kinds[row, : len(e.ids)] = torch.as_tensor(e.type_ids)
            mask[row, : len(e.ids)] = 1
        given = {"input_ids": ids, "attention_mask": mask}
        if getattr(model.config, "type_vocab_size", 0) > 1:
            given["token_type_ids"] = kinds
        with torch.inference_mode():
            logits = model(**{name: value.to(model.device) for name, value in given.items()}).logits.float().cpu()
        return [float(v) for v in (logits[:, 0] if logits.shape[1] == 1 else logits[:, 1] - logits[:, 0])]

    def _load(self) -> tuple[Any, Any, Any]:
        if self._loaded is not None:
            return self._loaded
        try:
            import torch
            from tokenizers import Tokenizer
            from transformers import AutoModelForSequenceClassification
        except ImportError as e:
            raise ResourceError(
                f"{self.folder} needs the package {e.name}", code="F060", hint="pip install 'flowc[local]'"
            ) from e
        try:
            model: Any = AutoModelForSequenceClassification.from_pretrained(
                str(self.folder), local_files_only=True, dtype=getattr(torch, self.dtype), use_safetensors=True
            )
        except Exception as e:  # safetensors has errors of its own, and transformers raises all kinds
            raise ResourceError(
                f"the model in {self.folder} cannot be loaded: {e}", code="F065", hint="copy it again"
            ) from e
        if int(model.config.num_labels) not in (1, 2):
            raise ResourceError(
                f"{self.folder} tells {model.config.num_labels} classes apart, it does not score pairs",
                code="F067",
                hint="a reranker has one output, or two",
            )
        file = self.folder / "tokenizer.json"
        try:
            tokenizer = Tokenizer.from_file(str(file))
        except Exception as e:  # the library raises bare Exception for a missing or malformed file
            raise ResourceError(f"{file} cannot be read: {e}", code="F066", hint="copy the whole model") from e
        limit = self._max_tokens or min(512, int(getattr(model.config, "max_position_embeddings", 512)))
        tokenizer.no_padding()
        tokenizer.enable_truncation(limit, strategy="only_second")
        self._loaded = tokenizer, model.eval().to(self.device), torch
        return self._loaded

    def close(self) -> None:
        """Forgets the weights; the next pair loads them again."""
        with self._lock:
            self._loaded = None

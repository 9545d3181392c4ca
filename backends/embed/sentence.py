"""Sentence encoders from a local directory: any BERT in numpy, anything else through `transformers`; never a download.

A directory in the layout of sentence-transformers is understood: config.json, tokenizer.json, model.safetensors, and,
where they are, 1_Pooling/config.json (mean or first token) and sentence_bert_config.json (longest input).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from flowc.ir.errors import ConfigError, ResourceError

from .bert import BertEncoder, can_encode, read_config

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["SentenceEmbedder"]

F32 = npt.NDArray[np.float32]
Progress = Callable[[int, int], None]  # (texts done, texts in all)

_BATCH_TOKENS = 1024  # enough for the matrix product to run at full speed, little enough to stay in the cache
_BATCH_SEQUENCES = 32


class _Encoder(Protocol):
    dim: int
    max_positions: int

    def encode(self, sequences: Sequence[Sequence[int]]) -> list[F32]: ...


class SentenceEmbedder:
    """Unit vectors of whole texts, by a sentence encoder on this machine's disk. Safe to use from several threads.

    `embed` computes every text by itself, so a vector is bitwise the same whatever else is in the batch, and keeps the
    last `cache_size` of them by content. `embed_many` is for building an index: sorted by length and packed, about 2e-7
    off the other. Nothing is loaded before the first text (or `dim`) is asked for.

    `engine`: "numpy" (BERT architectures), "torch", or "auto", which takes numpy where it can: it starts 3 s sooner and
    is no slower. `dtype` "bfloat16" needs torch: 1.7 times faster in bulk on CPUs that have it, cosine 0.9999.
    `threads` bounds the threads of one call in bulk; single texts take one.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        spec: str | None = None,
        engine: Literal["auto", "numpy", "torch"] = "auto",
        dtype: Literal["float32", "bfloat16"] = "float32",
        device: str = "cpu",
        threads: int | None = None,
        cache_size: int = 4096,
        max_tokens: int | None = None,
    ) -> None:
        self.folder = Path(path)
        self.spec = spec or str(path)
        self._config = read_config(self.folder)
        exact = can_encode(self._config) and (self.folder / "model.safetensors").exists()
        if engine == "auto":
            engine = "numpy" if exact and dtype == "float32" and device == "cpu" else "torch"
        if engine == "numpy" and not exact:
            kind = self._config.get("model_type")
            raise ConfigError(
                f"the numpy engine cannot run {self.folder} (model_type {kind!r})", hint='leave engine="auto"'
            )
        if engine == "numpy" and (dtype != "float32" or device != "cpu"):
            raise ConfigError("the numpy engine computes in float32 on the CPU", hint='use engine="torch"')
        if cache_size < 0:
            raise ConfigError(f"cache_size must not be negative, found {cache_size}")
        self.engine, self.dtype, self.device = engine, dtype, device
        self._pooling = self._read_pooling()
        self._max_tokens = max_tokens
        self._threads = threads or _cores()
        self._cache: OrderedDict[bytes, F32] = OrderedDict()
        self._cache_size = cache_size
        self._lock = threading.RLock()
        self._loaded: tuple[Tokenizer, _Encoder] | None = None
        self.cut_short = 0  # distinct texts of the last `embed_many` that were longer than `max_tokens`
        self._fingerprint: str | None = None

    # ------------------------------------------------------------------------------------------ what it is
    @property
    def fingerprint(self) -> str:
        """Architecture, SHA-256 of weights and tokenizer, pooling, longest input, precision. Reads the weights once."""
        with self._lock:
            if self._fingerprint is None:
                weights = sorted(self.folder.glob("*.safetensors"))
                if not weights:
                    raise ResourceError(
                        f"no weights in {self.folder}",
                        code="F065",
                        hint="the directory must hold model.safetensors (pickled weights are not read)",
                    )
                config = self._config
                shape = f"{config.get('num_hidden_layers', '?')}x{config.get('hidden_size', '?')}"
                digests = [_sha256(weights)[:16], _sha256([self.folder / "tokenizer.json"])[:8]]
                self._fingerprint = "/".join(
                    [f"{config.get('model_type')}-{shape}", *digests, self._pooling, str(self.max_tokens), self.dtype]
                )
            return self._fingerprint

    @property
    def dim(self) -> int:
        """The length of a vector."""
        size = self._config.get("hidden_size")
        return size if isinstance(size, int) else self._load()[1].dim

    @property
    def max_tokens(self) -> int:
        """The longest input in tokens; what is beyond it is not seen by the model."""
        if self._max_tokens is None:
            limit = int(self._config.get("max_position_embeddings", 512))
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                own = json.loads((self.folder / "sentence_bert_config.json").read_text("utf-8"))
                limit = min(limit, int(own["max_seq_length"]))
            self._max_tokens = limit
        return self._max_tokens

    # ------------------------------------------------------------------------------------------ vectors
    def embed(self, texts: Sequence[str]) -> F32:
        """Vectors of shape (len(texts), dim); each is a function of its text alone, bit for bit."""
        out = np.empty((len(texts), self.dim), dtype=np.float32)
        keys = [_key(text) for text in texts]
        with self._lock:
            for row, (key, text) in enumerate(zip(keys, texts, strict=True)):
                vector = self._cache.get(key)
                if vector is None:
                    tokenizer, encoder = self._load()
                    with _blas_threads(1):
                        vector = self._pool(encoder.encode(_tokens(tokenizer, [text])[0])[0])
                    self._cache[key] = vector
                    while len(self._cache) > self._cache_size:
                        self._cache.popitem(last=False)
                else:
                    self._cache.move_to_end(key)
                out[row] = vector
        return out

    def embed_many(self, texts: Sequence[str], progress: Progress | None = None) -> F32:
        """Vectors of shape (len(texts), dim) for an index: sorted by length, packed, equal texts computed once."""
        tokenizer, encoder = self._load()
        out = np.empty((len(texts), self.dim), dtype=np.float32)
        rows: dict[bytes, list[int]] = {}
        for row, text in enumerate(texts):
            rows.setdefault(_key(text), []).append(row)
        firsts = [members[0] for members in rows.values()]
        copies = {members[0]: members for members in rows.values()}
        done = cut_short = 0
        # A bounded window, so that tokens of a large collection are never all in memory; sorted inside the window.
        for start in range(0, len(firsts), 8192):
            window = firsts[start : start + 8192]
            tokens, cut = _tokens(tokenizer, [texts[row] for row in window])
            cut_short += cut
            order = sorted(range(len(window)), key=lambda i: len(tokens[i]))
            for group in _groups(order, tokens):
                with self._lock, _blas_threads(self._threads):
                    states = encoder.encode([tokens[i] for i in group])
                for i, state in zip(group, states, strict=True):
                    members = copies[window[i]]
                    out[members] = self._pool(state)
                    done += len(members)
                if progress is not None:
                    progress(done, len(texts))
        self.cut_short = cut_short
        return out

    def close(self) -> None:
        """Forgets the weights and the cache; the next text loads them again."""
        with self._lock:
            self._loaded = None
            self._cache.clear()

    # ------------------------------------------------------------------------------------------ inside
    def _pool(self, states: F32) -> F32:
        vector = states[0] if self._pooling == "cls" else states.mean(axis=0)
        norm = float(np.sqrt(np.dot(vector, vector)))
        return np.asarray(vector / np.float32(max(norm, 1e-12)), dtype=np.float32)

    def _read_pooling(self) -> str:
        again = "copy the model directory again"
        try:
            modules = json.loads((self.folder / "modules.json").read_text("utf-8"))
            kinds = [str(m["type"]).rsplit(".", 1)[-1] for m in modules]
            where = next((m["path"] for m in modules if str(m["type"]).endswith("Pooling")), "1_Pooling")
        except FileNotFoundError:
            kinds, where = [], "1_Pooling"
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise ResourceError(f"{self.folder / 'modules.json'} cannot be read: {e}", code="F065", hint=again) from e
        unknown = sorted(set(kinds) - {"Transformer", "Pooling", "Normalize"})
        if unknown:
            raise ResourceError(
                f"{self.folder} has a module that flowc does not compute: {', '.join(unknown)}",
                code="F067",
                hint="use an encoder made of Transformer, Pooling and Normalize only",
            )
        try:
            config = json.loads((self.folder / where / "config.json").read_text("utf-8"))
        except FileNotFoundError:
            return "mean"
        except (OSError, ValueError) as e:
            raise ResourceError(
                f"{self.folder / where / 'config.json'} cannot be read: {e}", code="F065", hint=again
            ) from e
        modes = [m for m in config if m.startswith("pooling_mode_") and config[m] is True]
        if modes == ["pooling_mode_mean_tokens"]:
            return "mean"
        if modes == ["pooling_mode_cls_token"]:
            return "cls"
        named = config.get("pooling_mode")  # newer releases write the mode as a word
        if not modes and named in ("mean", "cls"):
            return str(named)
        raise ResourceError(
            f"{self.folder} pools in a way that flowc does not compute: {', '.join(modes) or named}",
            code="F067",
            hint="use an encoder with mean or first-token pooling",
        )

    def _load(self) -> tuple[Tokenizer, _Encoder]:
        with self._lock:
            if self._loaded is None:
                try:
                    from tokenizers import Tokenizer
                except ImportError as e:
                    raise ResourceError(
                        "the package tokenizers is not installed", code="F060", hint="pip install 'flowc[local]'"
                    ) from e
                file = self.folder / "tokenizer.json"
                if not file.exists():
                    raise ResourceError(
                        f"{self.folder} has no tokenizer.json", code="F066", hint="copy the whole model"
                    )
                try:
                    tokenizer = Tokenizer.from_file(str(file))
                except Exception as e:  # the library raises bare Exception for a malformed file
                    raise ResourceError(f"{file} cannot be read: {e}", code="F066", hint="copy it again") from e
                tokenizer.no_padding()
                tokenizer.enable_truncation(self.max_tokens)
                encoder: _Encoder
                if self.engine == "numpy":
                    encoder = BertEncoder(self.folder, self._config)
                else:
                    from .torch_encoder import TorchEncoder

                    encoder = TorchEncoder(self.folder, self.dtype, self.device, self._threads)
                self._loaded = tokenizer, encoder
            return self._loaded


def _tokens(tokenizer: Tokenizer, texts: Sequence[str]) -> tuple[list[list[int]], int]:
    """Token ids of every text, and how many of the texts were cut at the longest input."""
    clean = [text.encode("utf-8", "replace").decode() for text in texts]  # a lone surrogate cannot be tokenised
    encodings = tokenizer.encode_batch(clean)
    return [encoding.ids for encoding in encodings], sum(bool(encoding.overflowing) for encoding in encodings)


def _groups(order: Sequence[int], tokens: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    group: list[int] = []
    size = 0
    for i in order:
        if group and (size + len(tokens[i]) > _BATCH_TOKENS or len(group) == _BATCH_SEQUENCES):
            yield group
            group, size = [], 0
        group.append(i)
        size += len(tokens[i])
    if group:
        yield group


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _key(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _sha256(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        try:
            with file.open("rb") as stream:
                while chunk := stream.read(1 << 20):
                    digest.update(chunk)
        except OSError as e:
            raise ResourceError(
                f"{file} cannot be read: {e.strerror or e}", code="F065", hint="copy the model again"
            ) from e
    return digest.hexdigest()


_blas_lock = threading.Lock()
_blas: Any = None


@contextlib.contextmanager
def _blas_threads(count: int) -> Iterator[None]:
    """Bounds numpy's own threads meanwhile: a product of 14 rows on two threads mostly waits for the second one.

    The bound belongs to the process, so one call at a time holds it and puts the old one back. Without threadpoolctl
    nothing is bounded.
    """
    global _blas
    with _blas_lock:
        if _blas is None:
            try:
                from threadpoolctl import ThreadpoolController

                _blas = ThreadpoolController().select(internal_api="openblas")
            except ImportError:
                _blas = False
        if _blas is False:
            yield
        else:
            with _blas.limit(limits=count):
                yield

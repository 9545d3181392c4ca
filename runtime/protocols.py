"""What a backend must offer. The runtime knows backends through these protocols and nothing else.

Every call takes a *batch* and answers with one result or one exception per item, in order: an item that fails never
takes its neighbours with it. Calls come from a lane's worker thread, one at a time per lane, and may block.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from flowc.ir.values import Docs

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One completion. `temperature=0` is greedy and deterministic; `seed` makes sampling repeatable."""

    prompt: str
    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0  # 0: no limit
    stop: tuple[str, ...] = ()
    seed: int | None = None
    timeout_s: float | None = None


@dataclass(frozen=True, slots=True)
class Generation:
    """The text without the prompt and without the stop string. `finish_reason`: "stop", "length" or "cancelled"."""

    text: str
    prompt_tokens: int = 0
    completion_tokens: int = 0
    finish_reason: str = "stop"


@dataclass(frozen=True, slots=True)
class ChooseRequest:
    """Which of `options` continues `prompt` best; answered by index into `options`."""

    prompt: str
    options: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SearchRequest:
    """The `k` passages nearest to `query`; `nprobe` None takes the index's own."""

    query: str
    k: int = 4
    nprobe: int | None = None


@dataclass(frozen=True, slots=True)
class RerankRequest:
    query: str
    docs: Docs
    k: int | None = None


OnText = Callable[[int, str], None]  # (item of the batch, the next piece of its text)
IsCancelled = Callable[[int], bool]  # has this item of the batch been cancelled meanwhile?


@runtime_checkable
class LLMBackend(Protocol):
    """A language model (or a stand-in that says so in `kind`)."""

    name: str
    kind: str  # "language-model", "extractive-reader", "replay", ...
    max_batch: int

    def batch_key(self, request: GenerateRequest) -> Hashable:
        """Requests with equal keys may share one `generate` call."""
        ...

    def generate(
        self,
        requests: Sequence[GenerateRequest],
        on_text: OnText | None = None,
        is_cancelled: IsCancelled | None = None,
    ) -> Sequence[Generation | Exception]:
        """Completes every request. The pieces given to `on_text` for an item concatenate to its `Generation.text`."""
        ...

    def choose(self, requests: Sequence[ChooseRequest]) -> Sequence[int | Exception]: ...

    def count_tokens(self, text: str) -> int: ...

    def close(self) -> None: ...


@runtime_checkable
class Embedder(Protocol):
    """Text to unit vectors. `fingerprint` changes whenever the vectors would."""

    @property
    def fingerprint(self) -> str: ...
    @property
    def dim(self) -> int: ...

    def embed(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Unit-norm float32 vectors of shape (len(texts), dim)."""
        ...


@runtime_checkable
class Retriever(Protocol):
    """An index that is searched by text."""

    name: str
    max_batch: int

    def batch_key(self, request: SearchRequest) -> Hashable: ...

    def search(self, requests: Sequence[SearchRequest]) -> Sequence[Docs | Exception]: ...

    def close(self) -> None: ...


@runtime_checkable
class Reranker(Protocol):
    name: str
    max_batch: int

    def rerank(self, requests: Sequence[RerankRequest]) -> Sequence[Docs | Exception]: ...


@dataclass(frozen=True, slots=True)
class BackendInfo:
    """What `flowc doctor` and the trace say of a backend."""

    name: str
    kind: str
    detail: dict[str, Any]

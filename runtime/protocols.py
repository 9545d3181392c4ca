"""What a backend must offer. The runtime knows backends through these protocols and nothing else.

Every call takes a *batch* and answers with one result or one exception per item, in order: an item that fails never
takes its neighbours with it. Calls come from a lane's worker thread, one at a time per lane, and may block. A backend
that has an attribute `max_calls` above 1 may be called so often at a time, from as many threads.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

from flowc.ir.options import Bounded as Bounded
from flowc.ir.options import Budget as Budget
from flowc.ir.options import Where
from flowc.ir.values import Docs

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


@dataclass(slots=True, eq=False)
class Ticket:
    """A request's turn: who waits with the lower `priority` goes first, of equals the one that came first.

    The program scheduler changes `priority` while requests wait and run; a lane or engine reads it whenever it chooses.
    A request without a ticket is first come, first served. A backend that batches by itself (`max_calls` above 1) says
    with `charge` how long a request has run: only it can tell that from how long the request waited inside.
    """

    program: int
    priority: float = 0.0

    def charge(self, seconds: float) -> None:
        """Tells the scheduler of seconds in which the backend worked for the request. From any thread."""


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One completion. `temperature=0` is greedy and deterministic; `seed` makes sampling repeatable.

    `schema` is a JSON schema that the text must satisfy; a backend that cannot hold a model to it (see
    `LLMBackend.batch_key` for what may share a call) leaves it to whoever parses the text.
    """

    prompt: str
    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0  # 0: no limit
    min_p: float = 0.0  # least share of the likeliest token's probability; 0: no limit
    stop: tuple[str, ...] = ()
    seed: int | None = None
    timeout_s: float | None = None
    schema: str | None = None
    logprobs: bool = False  # fill `Generation.logprobs`
    ticket: Ticket | None = field(default=None, compare=False, repr=False)
    drop: bool = field(default=False, compare=False, repr=False)  # nobody continues the prompt: its KV need not stay


@dataclass(frozen=True, slots=True)
class Generation:
    """The text without the prompt and without the stop string. `finish_reason`: "stop", "length" or "cancelled".

    `logprobs`, where they were asked for: the natural logarithm of each written token's probability, before
    temperature and cut-offs.
    """

    text: str
    prompt_tokens: int = 0
    completion_tokens: int = 0
    finish_reason: str = "stop"
    logprobs: tuple[float, ...] | None = None


@dataclass(frozen=True, slots=True)
class ChooseRequest:
    """Which of `options` continues `prompt` best; answered by index into `options`."""

    prompt: str
    options: tuple[str, ...]
    ticket: Ticket | None = field(default=None, compare=False, repr=False)
    drop: bool = field(default=False, compare=False, repr=False)  # as in `GenerateRequest`


@dataclass(frozen=True, slots=True)
class SearchRequest:
    """The `k` passages nearest to `query`; `nprobe` None takes the index's own.

    `stop` None is the exact search of the probed lists. `Bounded` and `Budget` may change the result. `where`, made by
    `flowc.ir.options.as_where`, are conditions that each passage of the result meets.
    """

    query: str
    k: int = 4
    nprobe: int | None = None
    stop: Bounded | Budget | None = None
    where: Where | None = None
    ticket: Ticket | None = field(default=None, compare=False, repr=False)
    near: tuple[int, ...] = field(default=(), compare=False, repr=False)  # passages whose clusters to look in first


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
class PrefixCache(Protocol):
    """A language model that keeps prompts' prefixes and takes advice on which. Advice never changes an answer.

    `LLMBackend`s may have it. Every call returns at once, from any thread; `key` is the caller's name for one
    announcement (a program and a call site). Source: KVFlow, section 4; Continuum, section 4.
    """

    def prefill(self, key: Hashable, prefix: str, ticket: Ticket | None = None) -> None:
        """Computes a prefix when there is room, and holds it until `release(key)`; a longer one takes its place."""
        ...

    def hint(self, key: Hashable, prefix: str, steps: float) -> None:
        """Announces that a prompt with this prefix comes in `steps` generations; takes the place of the last."""
        ...

    def release(self, key: Hashable) -> None:
        """Takes back what `prefill` and `hint` announced under the key; work on it that nobody else needs ends."""
        ...

    def pin(self, prefix: str, ttl_s: float) -> None:
        """Keeps what is cached of a prefix before all others for `ttl_s` seconds, as over a call of a tool."""
        ...


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


@dataclass(frozen=True, slots=True)
class ScanBudget:
    """How much one `scan` may do, for all of its searches together; what is None is no limit.

    `units` and `codes` (vectors or postings) count work, `seconds` is wall time, looked at between groups of units.
    """

    units: int | None = None
    codes: int | None = None
    seconds: float | None = None


class ElasticSearch(Protocol):
    """A search under way. It is the caller's: it may lie idle, move to another batch or be dropped at any time."""

    @property
    def units(self) -> int:
        """How many pieces the search has, numbered in the order in which they are best run. At least one."""
        ...

    @property
    def costs(self) -> Sequence[int] | npt.NDArray[np.int64]:
        """What each unit costs, in codes."""
        ...

    @property
    def done(self) -> bool:
        """Whether nothing is left to run: every unit was, or a stopping rule holds, or it was cancelled."""
        ...

    def remaining(self) -> Sequence[int] | npt.NDArray[np.int64]:
        """The units not run yet, in order; none once `done`."""
        ...

    def cancel(self) -> None:
        """Ends the search before its next unit. May be called from any thread."""
        ...


S = TypeVar("S", bound=ElasticSearch)


@runtime_checkable
class ElasticRetriever(Retriever, Protocol[S]):
    """An index whose searches run a bounded step at a time: plan, units, run and merge, stop.

    `search(requests)` gives what `begin`, then any sequence of `run` and `scan` that ends with every search done, then
    `finish` give, bit for bit, however units were split, ordered and mixed with those of other searches (only searches
    with a `stop` depend on the steps). An engine that cannot be interrupted has searches of one unit. Searches may
    run on several threads, each search on one at a time.
    """

    def begin(self, requests: Sequence[SearchRequest]) -> Sequence[S | Exception]:
        """A planned search, or the reason why there is none, for each request."""
        ...

    def run(self, work: Sequence[tuple[S, Sequence[int] | npt.NDArray[np.int64]]]) -> None:
        """Runs these units and merges what they find into their searches. Units that were run before are left out."""
        ...

    def scan(self, searches: Sequence[S], budget: ScanBudget | None = None) -> None:
        """Runs units in the best order until every search is done or the budget is spent."""
        ...

    def partial(self, search: S) -> Docs:
        """The exact result over the units run so far."""
        ...

    def finish(self, search: S) -> Docs:
        """The result; runs what is left. Raises `concurrent.futures.CancelledError` if the search was cancelled."""
        ...


@runtime_checkable
class ClusterCache(Protocol):
    """An index that keeps part of itself on a device and takes advice on which. Advice never changes a result.

    `Retriever`s may have it. Every call returns at once, from any thread, and raises nothing; `key` is the caller's
    name for one search to come (a program and a call site). Source: TeleRAG, section 3; predicting again: measured.
    """

    def predict(self, key: Hashable, text: str, window_s: float) -> None:
        """Announces a search for something like `text` in about `window_s` seconds; takes the place of the last."""
        ...

    def follow(self, key: Hashable, text_so_far: str) -> None:
        """Says what has been written since: all of it each time, as often as the caller likes.

        The cache decides when enough is new to predict again. A key that was not announced is ignored.
        """
        ...

    def release(self, key: Hashable) -> None:
        """Takes back what was announced under the key; transfers that nobody else needs end."""
        ...


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

"""Handles on models and indexes. A handle is a name; what it binds to is configuration (`flowc.toml`).

Inside a workflow a method call becomes an operation of the graph. Anywhere else it runs at once and blocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from flowc.ir.options import Bounded, Budget
from flowc.ir.values import Conversation, Docs

from .host import deliver, host

if TYPE_CHECKING:
    from pydantic import BaseModel

    M = TypeVar("M", bound=BaseModel)

Message = Mapping[str, str]


@dataclass(frozen=True)
class Resource:
    """A named resource. Two handles of one kind and name are the same resource."""

    name: str
    __flowc_resource__: ClassVar[bool] = True
    operations: ClassVar[Mapping[str, str]] = {}  # method -> operation of the graph

    def _request(self, op: str, operands: tuple[Any, ...], options: dict[str, Any]) -> Any:
        given = {k: v for k, v in options.items() if v is not None}
        return deliver(lambda: host().request(op, self.name, operands, given))


@dataclass(frozen=True)
class LLM(Resource):
    """A language model (or a stand-in): what `[llm.NAME]` in flowc.toml says; "default" else is the bundled reader."""

    name: str = "default"
    operations: ClassVar[Mapping[str, str]] = {
        "generate": "generate",
        "chat": "generate",
        "choose": "choose",
        "parse": "parse",
    }

    def generate(
        self,
        prompt: str,
        *,
        max_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        min_p: float | None = None,
        stop: str | Sequence[str] | None = None,
        seed: int | None = None,
        timeout: float | None = None,
    ) -> str:
        """What the model writes after `prompt`.

        At most `max_tokens` tokens (default 256), greedy unless `temperature` is above 0. Then `top_k` keeps the so
        many likeliest tokens, `top_p` the likeliest that reach this probability, `min_p` those at least so probable
        in proportion to the likeliest; an equal `seed` gives an equal text. `timeout` is in seconds; past it
        NodeTimeoutError is raised.
        """
        options = {
            "max_tokens": max_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k,
            "min_p": min_p,
            "stop": stop,
            "seed": seed,
            "timeout": timeout,
        }
        result: str = self._request("generate", (prompt,), options)
        return result

    def chat(
        self,
        messages: Sequence[Message],
        *,
        max_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        min_p: float | None = None,
        stop: str | Sequence[str] | None = None,
        seed: int | None = None,
        timeout: float | None = None,
    ) -> str:
        """The next message of a conversation of `{"role": ..., "content": ...}`: `generate` over its `chat_prompt`.

        A model with a chat template is given the messages in its own form.
        """
        return self.generate(
            chat_prompt(messages),
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            stop=stop,
            seed=seed,
            timeout=timeout,
        )

    def choose(self, prompt: str, options: Sequence[str], *, timeout: float | None = None) -> str:
        """The one of `options` that continues `prompt` best; ties go to the first."""
        result: str = self._request("choose", (prompt, options), {"timeout": timeout})
        return result

    def parse(
        self,
        prompt: str,
        model: type[M],
        *,
        max_tokens: int | None = None,
        temperature: float | None = None,
        seed: int | None = None,
        timeout: float | None = None,
    ) -> M:
        """An instance of the pydantic class `model`, from JSON that the model writes after `prompt`.

        A local model is held to the class's JSON schema token by token; any other is given the prompt as it is. Text
        that does not validate raises pydantic's ValidationError, and RunError where `max_tokens` cut it off.
        """
        options = {
            "max_tokens": max_tokens,
            "temperature": temperature,
            "seed": seed,
            "timeout": timeout,
            "model": model,
        }
        result: M = self._request("parse", (prompt,), options)
        return result


def chat_prompt(messages: Iterable[Message]) -> Conversation:
    """Messages as one prompt, a `role: content` block each, ending where the assistant speaks next."""
    messages = list(messages)
    blocks = [f"{m['role']}: {m['content']}" for m in messages]
    return Conversation("\n\n".join([*blocks, "assistant:"]), messages)


chat_prompt.__flowc_pure__ = True  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Index(Resource):
    """A retrieval index, built with `flowc index build`; `[index.NAME]` in flowc.toml says where it lies."""

    name: str = "default"
    operations: ClassVar[Mapping[str, str]] = {"search": "search"}

    def search(
        self,
        query: str,
        k: int | None = None,
        *,
        nprobe: int | None = None,
        where: Mapping[str, Any] | None = None,
        stop: Bounded | Budget | None = None,
        timeout: float | None = None,
    ) -> Docs:
        """The `k` passages (default 4) nearest to `query`, best first; ties by id.

        `where={"lang": "en", "kind": ["howto", "faq"], "year": {">=": 2020}}` looks among the passages whose metadata
        meet all conditions, and finds none if none does. `stop` is the one way to a search that may end before it is
        exact: `Bounded(0.05)` where the result changes for at most that share of queries, as measured on the index, or
        `Budget(lists=8)`.
        """
        options = {"k": k, "nprobe": nprobe, "where": where, "stop": stop, "timeout": timeout}
        result: Docs = self._request("search", (query,), options)
        return result


@dataclass(frozen=True)
class Embedder(Resource):
    """A text embedder; `[embedder.NAME]` in flowc.toml."""

    name: str = "default"
    operations: ClassVar[Mapping[str, str]] = {"embed": "embed"}

    def embed(self, text: str, *, timeout: float | None = None) -> Any:
        """The unit vector of a text: float32 of shape (dim,)."""
        return self._request("embed", (text,), {"timeout": timeout})


@dataclass(frozen=True)
class Reranker(Resource):
    """A reranker of retrieved passages; `[reranker.NAME]` in flowc.toml."""

    name: str = "default"
    operations: ClassVar[Mapping[str, str]] = {"rerank": "rerank"}

    def rerank(self, query: str, docs: Docs, k: int | None = None, *, timeout: float | None = None) -> Docs:
        """The `k` passages (default: all) that answer `query` best, best first."""
        result: Docs = self._request("rerank", (query, docs), {"k": k, "timeout": timeout})
        return result


__all__ = ["LLM", "Embedder", "Index", "Message", "Reranker", "Resource", "chat_prompt"]

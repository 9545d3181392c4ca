"""Reranking by a language model: is this passage an answer to the query? The model's own probability of "yes".

The passage stands before the query in the prompt, so the KV cache of a passage serves every query that meets it again,
and all that differs are a few tokens at the end. Pairs go to the model sorted by passage, which keeps equal beginnings
together for an engine with a prefix cache.

Source: An et al., "HyperRAG: Enhancing Quality-Efficiency Tradeoffs in Retrieval-Augmented Generation with Reranker
KV-Cache Reuse", 2025; the score after Zhuang et al., "Open-source Large Language Models are Strong Zero-shot Query
Likelihood Models for Document Ranking", 2023, section 2 (pointwise yes/no).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from flowc.ir.errors import RunError
from flowc.ir.values import Docs
from flowc.runtime.protocols import GenerateRequest, Generation, LLMBackend, RerankRequest

from .ranking import Pair, ScoreCache, ranked

__all__ = ["TEMPLATE", "LLMReranker"]

TEMPLATE = "Passage:\n{passage}\n\nQuery: {query}\nDoes the passage answer the query? Answer yes or no.\nAnswer:"


class LLMReranker:
    """Ranks passages by a language model. Implements `flowc.runtime.protocols.Reranker`.

    `llm` is a backend, or a function that gives one, called at the first passage. A score is the probability of the one
    token that the model writes, if that says yes; what is left of 1, if it says no; and 0 if it says neither. A backend
    that gives no probabilities says 1 or 0. Passages with equal scores stay in the order in which they came.
    """

    max_batch = 64

    def __init__(
        self,
        llm: LLMBackend | Callable[[], LLMBackend],
        *,
        name: str = "llm",
        template: str = TEMPLATE,
        cache_size: int = 65_536,
    ) -> None:
        for slot in ("{passage}", "{query}"):
            if template.count(slot) != 1:
                raise ValueError(f"the template holds {slot} once")
        if template.index("{passage}") > template.index("{query}"):
            raise ValueError("the passage stands before the query, so that its KV cache is used again")
        self.name = name
        self.template = template
        self._llm = llm
        self._cache = ScoreCache(cache_size)

    def rerank(self, requests: Sequence[RerankRequest]) -> Sequence[Docs | Exception]:
        """The best k passages of every request (all without k), best first, equal scores as they came."""
        return ranked(requests, lambda pairs: self._cache.of(pairs, self.scores))

    def scores(self, pairs: Sequence[Pair]) -> list[float]:
        """The probability of yes for each (query, passage). Raises the first error of the model."""
        llm = self._llm if isinstance(self._llm, LLMBackend) else self._llm()
        self._llm = llm
        order = sorted(range(len(pairs)), key=lambda n: (pairs[n][1], pairs[n][0]))
        out = [0.0] * len(pairs)
        for start in range(0, len(order), llm.max_batch):
            group = order[start : start + llm.max_batch]
            answers = llm.generate([self._request(pairs[n]) for n in group])
            for n, answer in zip(group, answers, strict=True):
                if isinstance(answer, Exception):
                    raise answer
                out[n] = _says_yes(answer)
        return out

    def _request(self, pair: Pair) -> GenerateRequest:
        head, tail = self.template.split("{passage}")
        query, passage = pair
        prompt = head + passage + tail.replace("{query}", query)  # neither text is looked into for slots
        return GenerateRequest(prompt, max_tokens=1, logprobs=True)


def _says_yes(answer: Generation) -> float:
    said = answer.text.strip().lower()
    if not said or not ("yes".startswith(said[:3]) or "no".startswith(said[:2])):
        return 0.0
    likely = 1.0
    if answer.logprobs is not None:
        if len(answer.logprobs) != 1:
            raise RunError(f"the model wrote {len(answer.logprobs)} tokens where one was asked for")
        likely = math.exp(answer.logprobs[0])
    return likely if "yes".startswith(said[:3]) else 1 - likely

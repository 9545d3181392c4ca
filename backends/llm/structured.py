"""Holds a model to a JSON schema, token by token, with llguidance (imported with this file).

After each token llguidance says which tokens may follow, and which must: a key that the schema gives away needs no
model (jump-forward decoding; Zheng et al., "SGLang", 2024, section 4). Only its numpy side is used. A text that
satisfies the schema is complete as soon as nothing may follow.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

__all__ = ["Guide", "Guides", "SchemaError"]


# Without free white space there is less to choose, and more is forced. A `\uXXXX` could be half a surrogate pair, which
# no parser takes; every character can be written as it is.
_OPTIONS: Any = {"whitespace_flexible": False, "json_allowed_escapes": 'nrbtf\\"'}


class SchemaError(Exception):
    """The schema or the tokenizer cannot be followed; the message says why."""


class Guide:
    """One text on its way. A guide that fails (a grammar grown too complex) lets everything pass from then on."""

    __slots__ = ("_mask", "_matcher", "_vocab")

    def __init__(self, matcher: LLMatcher, vocab: int) -> None:
        self._matcher, self._vocab = matcher, vocab
        self._mask = allocate_token_bitmask(1, vocab)

    def forced(self) -> list[int]:
        """The tokens that must come next; none where there is a choice."""
        return list(self._matcher.compute_ff_tokens()) if self._is_held else []

    def allowed(self) -> npt.NDArray[np.bool_] | None:
        """Which tokens may come next, of shape (vocab,), the end token where the text may end; None: any."""
        if not self._is_held:
            return None
        fill_next_token_bitmask(self._matcher, self._mask)
        bits = np.unpackbits(self._mask.view(np.uint8), bitorder="little")[: self._vocab].astype(np.bool_)
        return bits if self._is_held and bits.any() else None

    def accept(self, token: int) -> None:
        """Takes note of a token that was written."""
        if self._is_held:
            self._matcher.consume_token(token)

    @property
    def is_complete(self) -> bool:
        """Does the text satisfy the schema, with nothing that could follow?"""
        return self._is_held and self._matcher.is_stopped()

    @property
    def _is_held(self) -> bool:
        return not self._matcher.is_error()


class Guides:
    """Guides for one tokenizer, whose model gives logits for `vocab` tokens; a schema is compiled once."""

    def __init__(self, tokenizer: Any, vocab: int, end_tokens: Collection[int]) -> None:
        self._vocab = vocab
        try:
            self._tokenizer: LLTokenizer = from_tokenizer(
                tokenizer, n_vocab=vocab, eos_token=sorted(end_tokens) or None
            )
        except (ValueError, RuntimeError, TypeError) as e:
            raise SchemaError(f"its tokenizer cannot be followed ({e})") from e
        self._compiled = lru_cache(maxsize=256)(self._compile)

    def start(self, schema: str) -> Guide:
        """A guide for one text. Raises `SchemaError` for a schema that cannot be followed."""
        return Guide(self._compiled(schema).deep_copy(), self._vocab)

    def _compile(self, schema: str) -> LLMatcher:
        try:
            grammar = LLMatcher.grammar_from_json_schema(_closed(json.loads(schema)), overrides=_OPTIONS)
        except ValueError as e:
            raise SchemaError(f"the schema is not JSON ({e})") from e
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise SchemaError(f"the schema asks what cannot be followed ({matcher.get_error().splitlines()[0]})")
        return matcher


def _closed(schema: Any) -> Any:
    """The schema with objects of just the properties that it lists: pydantic ignores others, unless told to allow them,
    and a model that may add some need not come to an end.
    """
    if isinstance(schema, list):
        return [_closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {name: part if name in ("const", "default", "enum") else _closed(part) for name, part in schema.items()}
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object":
        closed.setdefault("additionalProperties", False)
    return closed

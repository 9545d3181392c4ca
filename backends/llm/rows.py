"""A request on its way through a local model: tokens become text that ends where it should. Standard library only."""

from __future__ import annotations

import secrets
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from flowc.ir.errors import NodeTimeoutError
from flowc.runtime.protocols import GenerateRequest, Generation, IsCancelled, OnText

from .common import StopFilter

if TYPE_CHECKING:
    from .structured import Guide

__all__ = ["Detokenizer", "Row"]

_INCOMPLETE = "\ufffd"


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


class Row:
    """One request on its way through a batch.

    `guide` holds it to a schema: then the tokens in `forced` come next, whatever the model thinks.
    """

    __slots__ = (
        "_detokenizer",
        "_stops",
        "_tell",
        "deadline",
        "error",
        "finish",
        "forced",
        "guide",
        "ids",
        "item",
        "limit",
        "logprobs",
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
        guide: Guide | None = None,
    ) -> None:
        self.item, self.request, self.ids, self.limit = item, request, ids, limit
        self.seed = request.seed if request.seed is not None else secrets.randbits(64)
        self.deadline = None if request.timeout_s is None else time.monotonic() + request.timeout_s
        self.tokens: list[int] = []
        self.logprobs: list[float] = []  # of `tokens`, where they are asked for
        self.guide = guide
        self.forced = deque(guide.forced() if guide is not None else ())
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
        logprobs = tuple(self.logprobs) if self.request.logprobs else None
        return Generation("".join(self.said), len(self.ids), len(self.tokens), self.finish or "cancelled", logprobs)

    def accept(self, token: int, end_tokens: frozenset[int]) -> None:
        """Takes the next token, and finishes the row where it ends."""
        self.tokens.append(token)
        if token in end_tokens:
            self._end("stop")
            return
        if self.guide is not None:
            self.guide.accept(token)
        self._say(self._stops.push(self._detokenizer.push(token)))
        if self._stops.matched is not None:
            self.finish = "stop"
        elif self.guide is not None and self.guide.is_complete:
            self._end("stop")
        elif len(self.tokens) >= self.limit:
            self._end("length")
        elif self.guide is not None and not self.forced:
            self.forced.extend(self.guide.forced())

    def fast_forward(self, end_tokens: frozenset[int]) -> list[int]:
        """Takes all tokens that are forced by now, and gives them back: their place in the model needs no decoding.

        None where log-probabilities are asked for: those need the logits of every position.
        """
        taken: list[int] = []
        while self.forced and not self.is_done and not self.request.logprobs:
            taken.append(self.forced.popleft())
            self.accept(taken[-1], end_tokens)
        return taken

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

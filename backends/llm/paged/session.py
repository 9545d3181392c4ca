"""A generation in stages that its owner steers: prefill, extend, decode; pause, fork, roll back.

What a compiler needs to start a prompt before all of it is known, to try a continuation and take it back, or to branch
from what is computed. Every stage is an ordinary sequence in the engine's steps. Between stages a session keeps its
blocks for as long as nobody needs them; what was taken is found in the prefix tree or computed again when it goes on.

Fork and rollback cost no computation: branches share all blocks, and the last one, if it is not full, is copied by who
writes into it first (Kwon et al., "PagedAttention", SOSP 2023, section 4.4). All but the last token of a stage's prompt
are computed by `extend`; that one is computed with the first decoded token, for which its logits are needed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable

import torch

from flowc.ir.errors import ResourceError
from flowc.runtime.protocols import Ticket

from .engine import Engine
from .sequence import Sequence

OnToken = Callable[[int], None]


class Session:
    """A growing sequence of tokens on an engine. Its calls come from one thread at a time, and not from `on_token`.

    `extend` and `decode` begin a stage and return at once, `wait` waits for its end. The other calls take effect
    between two steps and return then. `most_tokens` bounds prompt and answer together, by default to what the cache
    holds. `choose` gives the next token from logits of shape (vocab,), the likeliest where there is none.

    Greedy tokens are those of a plain request with the same tokens, whatever was forked, rolled back or paused before.
    In the batch-invariant mode stages are computed in pieces of their own, so that holds but for ties.
    """

    def __init__(
        self,
        engine: Engine,
        tokens: Iterable[int],
        ticket: Ticket | None = None,
        *,
        most_tokens: int | None = None,
        choose: Callable[[torch.Tensor], int] | None = None,
    ) -> None:
        prompt = list(tokens)
        if not prompt:
            raise ValueError("a session begins with at least one token")
        self._engine = engine
        self._most = engine.capacity_tokens if most_tokens is None else min(most_tokens, engine.capacity_tokens)
        self._check_length(len(prompt))
        self._begin(Sequence(prompt, self, ticket=ticket, until=len(prompt) - 1, stays=True, choose=choose))
        engine.ask(lambda: self._start(self._sequence))

    def _begin(self, sequence: Sequence) -> None:
        self._sequence = sequence
        self._decoded: list[int] = []
        self._left = 0  # tokens to decode in this stage
        self._ends: Collection[int] = ()
        self._on_token: OnToken | None = None
        self._error: Exception | None = None
        self._at_rest = threading.Event()

    def _start(self, s: Sequence) -> None:
        s.order = self._engine._next_order()
        self._engine._go_on(s)

    # -- stages
    @property
    def tokens(self) -> list[int]:
        """All tokens so far: what was given, and what was decoded."""
        return list(self._sequence.tokens)

    def extend(self, tokens: Iterable[int]) -> None:
        """Appends to the prompt; its keys and values are computed from now on. Not while a decode is under way."""
        more = list(tokens)
        self._check_length(len(self._sequence.tokens) + len(more))
        self._engine.ask(lambda: self._extend(more))

    def _extend(self, more: list[int]) -> None:
        s = self._alive()
        if s.until is None:
            raise RuntimeError("the session decodes: wait for its end, or roll it back")
        s.tokens += more
        s.until = len(s.tokens) - 1
        s.prompt_tokens = len(s.tokens)
        self._at_rest.clear()
        self._decoded = []
        self._engine._go_on(s)

    def decode(self, limit: int, ends: Collection[int] = (), on_token: OnToken | None = None) -> None:
        """Decodes up to `limit` tokens, or to the first of `ends`; what was asked before is computed first.

        `on_token` hears of each, on the engine's thread.
        """
        if limit < 1:
            raise ValueError("there must be at least one token to decode")
        self._check_length(len(self._sequence.tokens) + limit)
        self._engine.ask(lambda: self._decode(limit, ends, on_token))

    def _decode(self, limit: int, ends: Collection[int], on_token: OnToken | None) -> None:
        s = self._alive()
        if s.until is None:
            raise RuntimeError("the session decodes already: wait for its end, or roll it back")
        s.until, s.limit = None, limit
        self._decoded, self._left, self._ends, self._on_token = [], limit, ends, on_token
        self._at_rest.clear()
        self._engine._go_on(s)

    def wait(self, timeout_s: float | None = None) -> list[int]:
        """The tokens that the stage decoded, at its end; of an `extend` there are none.

        Raises what ended the session, if something did, and `TimeoutError`. A paused session is not at its end.
        """
        if not self._at_rest.wait(timeout_s):
            raise TimeoutError("the session's stage has not ended")
        if self._error is not None:
            raise self._error
        return list(self._decoded)

    # -- between steps
    def pause(self) -> list[int]:
        """Stops before the next step, in the middle of a stage too; the tokens that it has decoded by now."""
        return self._engine.ask(self._pause)

    def _pause(self) -> list[int]:
        self._engine._set_aside(self._alive())
        return list(self._decoded)

    def resume(self) -> None:
        """Goes on with the stage that was paused; nothing happens where none was."""
        self._engine.ask(lambda: None if self._at_rest.is_set() else self._engine._go_on(self._alive()))

    def fork(self) -> Session:
        """A session with the same tokens, at rest, that goes its own way from here. This one goes on undisturbed."""
        return self._engine.ask(self._fork)

    def _fork(self) -> Session:
        twin = Session.__new__(Session)
        twin._engine, twin._most = self._engine, self._most
        twin._begin(self._engine._fork(self._alive(), twin))
        twin._at_rest.set()
        return twin

    def rollback(self, count: int) -> None:
        """Takes the last `count` tokens away, and ends the stage under way; at least one token must remain."""
        self._engine.ask(lambda: self._roll_back(count))

    def _roll_back(self, count: int) -> None:
        s = self._alive()
        if not 0 <= count < len(s.tokens):
            raise ValueError(f"cannot take {count} of {len(s.tokens)} tokens away")
        self._engine._roll_back(s, count)
        self._decoded = self._decoded[: max(0, len(self._decoded) - count)]
        self._at_rest.set()

    def cancel(self) -> None:
        """Ends the session and frees its blocks; full ones stay cached. A session may be cancelled twice."""
        self._engine.ask(self._cancel)

    def _cancel(self) -> None:
        if not self._sequence.is_finished:
            self._engine._finish(self._sequence, _over("the session is cancelled"))

    def _alive(self) -> Sequence:
        if self._sequence.is_finished:
            raise self._error or _over("the session is over")
        return self._sequence

    def _check_length(self, tokens: int) -> None:
        if tokens > self._most:
            raise ResourceError(
                f"{tokens} tokens do not fit: the KV cache and the model's context hold {self._most}",
                code="F069",
                hint="give the backend more kv_blocks, or shorten the prompt",
            )

    # -- what the engine calls
    def accept(self, sequence: Sequence, token: int) -> bool:
        self._decoded.append(token)
        self._left -= 1
        if self._on_token is not None:
            self._on_token(token)
        return self._left > 0 and token not in self._ends

    def targets(self, sequence: Sequence) -> list[int]:
        raise AssertionError("a session is not scored")

    def is_wanted(self, sequence: Sequence) -> bool:
        return True

    def ended(self, sequence: Sequence, error: Exception | None) -> None:
        self._error = error
        sequence.until = len(sequence.tokens) - 1
        self._at_rest.set()


def _over(what: str) -> ResourceError:
    return ResourceError(what, hint="open another one")

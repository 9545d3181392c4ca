"""A backend whose answers are written in advance: for tests of workflows, flowc's own and its users'."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Hashable, Mapping, Sequence

from flowc.ir.errors import RunError
from flowc.runtime.protocols import BackendInfo, ChooseRequest, GenerateRequest, Generation, IsCancelled, OnText

from .common import check_choice, check_request, plain_chat, speak

__all__ = ["ScriptedBackend"]

Script = Callable[[str], str | Exception] | Mapping[str, str | Exception]


class ScriptedBackend:
    """Answers every prompt from `script`: a function of the prompt, or a mapping from prompts to answers.

    An exception, raised or given back, fails its item and no other. `choose` gives the chosen option for a prompt, as
    text; without it, the first option that the script's answer to the prompt equals or starts with, else the first
    option. Answers are spoken word by word, cut at stop strings and after `max_tokens` words and signs. `calls` holds
    every request in the order of arrival and `batches` the size of every batch.

    >>> llm = ScriptedBackend({"2+2=": "4"})
    >>> llm.generate([GenerateRequest("2+2=")])[0].text, llm.batches
    ('4', [1])
    """

    kind = "scripted"

    def __init__(
        self, script: Script, *, choose: Script | None = None, name: str = "scripted", max_batch: int = 16
    ) -> None:
        self._script = script
        self._choose = choose
        self.name = name
        self.max_batch = max_batch
        self.calls: list[GenerateRequest | ChooseRequest] = []
        self.batches: list[int] = []
        self.closed = False
        self._lock = threading.Lock()

    def batch_key(self, request: GenerateRequest) -> Hashable:
        return self.name

    def generate(
        self,
        requests: Sequence[GenerateRequest],
        on_text: OnText | None = None,
        is_cancelled: IsCancelled | None = None,
    ) -> Sequence[Generation | Exception]:
        self._count(requests)
        out: list[Generation | Exception] = []
        for item, request in enumerate(requests):
            try:
                error = check_request(request)
                if error is not None:
                    raise error
                text, reason = _first_tokens(_ask(self._script, request.prompt), request.max_tokens)
                said = speak(
                    item,
                    text,
                    request,
                    prompt_tokens=self.count_tokens(request.prompt),
                    count_tokens=self.count_tokens(text),
                    finish_reason=reason,
                    on_text=on_text,
                    is_cancelled=is_cancelled,
                )
                out.append(said)
            except Exception as e:  # scripted, or the listener's: this item's alone
                out.append(e)
        return out

    def choose(self, requests: Sequence[ChooseRequest]) -> Sequence[int | Exception]:
        self._count(requests)
        out: list[int | Exception] = []
        for request in requests:
            try:
                error = check_choice(request)
                if error is not None:
                    raise error
                out.append(self._pick(request))
            except Exception as e:
                out.append(e)
        return out

    def _pick(self, request: ChooseRequest) -> int:
        options = [option.strip() for option in request.options]
        if self._choose is not None:
            wanted = _ask(self._choose, request.prompt).strip()
            if wanted not in options:
                raise RunError(f"the script chose {wanted!r}, which is not one of {options}")
            return options.index(wanted)
        answer = _ask(self._script, request.prompt).strip()
        return next((i for i, option in enumerate(options) if answer.startswith(option)), 0)

    def count_tokens(self, text: str) -> int:
        """Words and signs."""
        return len(re.findall(r"\w+|[^\w\s]", text))

    def render_chat(self, messages: Sequence[Mapping[str, str]]) -> str:
        return plain_chat(messages)

    def info(self) -> BackendInfo:
        return BackendInfo(self.name, self.kind, {"calls": len(self.calls), "batches": len(self.batches)})

    def close(self) -> None:
        self.closed = True

    def _count(self, requests: Sequence[GenerateRequest] | Sequence[ChooseRequest]) -> None:
        with self._lock:
            self.calls.extend(requests)
            self.batches.append(len(requests))


def _ask(script: Script, prompt: str) -> str:
    if callable(script):
        answer = script(prompt)
    elif prompt in script:
        answer = script[prompt]
    else:
        raise RunError(
            f"the script has no answer to {prompt[:80]!r}", hint="add the prompt to the mapping, or give a function"
        )
    if isinstance(answer, Exception):
        raise answer
    return answer


def _first_tokens(text: str, limit: int) -> tuple[str, str]:
    """`text` cut after `limit` words and signs, and why it ends."""
    ends = [m.end() for m in re.finditer(r"\w+|[^\w\s]", text)]
    if len(ends) <= limit:
        return text, "stop"
    return text[: ends[limit - 1]] if limit else "", "length"

"""What every LLM backend shares: request checks, stop strings, word-wise streaming, plain chat. Standard library
only."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from flowc.ir.errors import InputError
from flowc.runtime.protocols import ChooseRequest, GenerateRequest, Generation, IsCancelled, OnText

__all__ = ["StopFilter", "check_choice", "check_request", "plain_chat", "speak", "word_pieces"]


class StopFilter:
    """The text up to the first stop string, piece by piece; nothing that may still become a stop string gets out.

    `push` and `flush` give back what may be shown by now. After a match `matched` is the stop string and the rest is
    swallowed. The pieces concatenate to the text before the stop string, or to the whole text where none occurs.
    """

    __slots__ = ("_held", "_stops", "matched")

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        if self.matched is not None:
            return ""
        if not self._stops:
            return text
        self._held += text
        found = min(((at, -len(s), s) for s in self._stops if (at := self._held.find(s)) >= 0), default=None)
        if found is not None:
            self.matched = found[2]
            out, self._held = self._held[: found[0]], ""
            return out
        longest = min(len(self._held), max(map(len, self._stops)) - 1)
        hold = next((n for n in range(longest, 0, -1) if any(s.startswith(self._held[-n:]) for s in self._stops)), 0)
        cut = len(self._held) - hold
        out, self._held = self._held[:cut], self._held[cut:]
        return out

    def flush(self) -> str:
        """What was held back in vain, at the end of the text."""
        out, self._held = self._held, ""
        return out


def check_request(request: GenerateRequest) -> InputError | None:
    """The first thing wrong with the parameters of a request, or None."""

    def bad(name: str, expected: str) -> InputError:
        found = getattr(request, name)
        return InputError(f"{name} must be {expected}, not {found!r}", hint=f"change {name} in the call of generate")

    if request.max_tokens < 0:
        return bad("max_tokens", "at least 0")
    if not 0 <= request.temperature < float("inf"):
        return bad("temperature", "a finite number, at least 0")
    if not 0 < request.top_p <= 1:
        return bad("top_p", "above 0 and at most 1")
    if not 0 <= request.min_p <= 1:
        return bad("min_p", "at least 0 and at most 1")
    if request.top_k < 0:
        return bad("top_k", "at least 0 (0 sets no limit)")
    if isinstance(request.stop, str) or not all(isinstance(s, str) and s for s in request.stop):
        return bad("stop", "a tuple of texts that are not empty")
    return None


def check_choice(request: ChooseRequest) -> InputError | None:
    """The first thing wrong with the options of a choice, or None."""
    if not request.options:
        return InputError("choose was given no options", hint="give at least one option")
    for number, option in enumerate(request.options, 1):
        if not option:
            return InputError(f"option {number} of {len(request.options)} is empty", hint="give every option a text")
    return None


def plain_chat(messages: Sequence[Mapping[str, str]]) -> str:
    """A conversation as plain text with an open turn of the assistant, for models without a chat template.

    >>> print(plain_chat([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]))
    Be brief.
    <BLANKLINE>
    User: Hi
    <BLANKLINE>
    Assistant:
    """
    turns = []
    for message in messages:
        role, content = message["role"], message["content"]
        turns.append(content if role == "system" else f"{role.capitalize()}: {content}")
    return "\n\n".join([*turns, "Assistant:"])


def word_pieces(text: str) -> Iterator[str]:
    """The words of `text`, each with the space before it; they concatenate to `text`.

    >>> list(word_pieces("two  words\\n"))
    ['two', '  words', '\\n']
    """
    return iter(re.findall(r"\s*\S+|\s+$", text))


def speak(
    item: int,
    text: str,
    request: GenerateRequest,
    *,
    prompt_tokens: int,
    count_tokens: int,
    finish_reason: str = "stop",
    on_text: OnText | None = None,
    is_cancelled: IsCancelled | None = None,
) -> Generation:
    """Says a finished text word by word, with the request's stop strings and cancellation honoured.

    For backends that know their whole answer at once. `count_tokens` is what the whole text costs; a text that is
    cut short is charged in proportion.
    """
    stops, said = StopFilter(request.stop), []

    def say(piece: str) -> None:
        if piece:
            said.append(piece)
            if on_text is not None:
                on_text(item, piece)

    for piece in word_pieces(text):
        if is_cancelled is not None and is_cancelled(item):
            finish_reason = "cancelled"
            break
        say(stops.push(piece))
        if stops.matched is not None:
            finish_reason = "stop"
            break
    else:
        say(stops.flush())
    out = "".join(said)
    spent = count_tokens if len(out) == len(text) else round(count_tokens * len(out) / max(1, len(text)))
    return Generation(out, prompt_tokens, spent, finish_reason)

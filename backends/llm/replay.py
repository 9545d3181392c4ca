"""Records LLM calls to a JSONL file and answers from it later: tests and demonstrations without the model.

One call a line, request and result:

    {"call": "generate", "request": {"max_tokens": 64, "prompt": "...", ...}, "result": {"text": "...", ...}}
    {"call": "choose", "request": {"options": ["yes", "no"], "prompt": "..."}, "result": 0}
    {"call": "generate", "request": {...}, "error": {"type": "RunError", "code": "F07F", "message": "...", ...}}

The text is pure ASCII: everything else, lone surrogates included, is escaped as JSON does. A request is looked up by
its canonical JSON (sorted keys), without `timeout_s`, which says nothing about the answer.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import threading
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from flowc.ir import errors
from flowc.ir.errors import FlowcError, InputError, ReplayMismatch, ResourceError, RunError
from flowc.runtime.protocols import (
    BackendInfo,
    ChooseRequest,
    GenerateRequest,
    Generation,
    IsCancelled,
    LLMBackend,
    OnText,
)

from .common import plain_chat, speak

__all__ = ["RecordingBackend", "ReplayBackend"]

_FIELDS = ("prompt", "max_tokens", "temperature", "top_p", "top_k", "stop", "seed")
_RARE = {"min_p": 0.0, "schema": None, "logprobs": False}  # written where they differ from this
_WORDS = re.compile(r"\w+|[^\w\s]")
_CANDIDATES = 16  # recorded prompts that are compared letter by letter with an unknown one
_COMPARED = 4000  # characters of a prompt that take part in that comparison


def _payload(request: GenerateRequest | ChooseRequest) -> dict[str, Any]:
    if isinstance(request, ChooseRequest):
        return {"prompt": request.prompt, "options": list(request.options)}
    payload = {name: list(v) if isinstance(v := getattr(request, name), tuple) else v for name in _FIELDS}
    return payload | {name: v for name, usual in _RARE.items() if (v := getattr(request, name)) != usual}


def _canonical(call: str, payload: Mapping[str, Any]) -> str:
    return json.dumps([call, payload], sort_keys=True, ensure_ascii=True, separators=(",", ":"))


class RecordingBackend:
    """`inner`, with every finished call appended to the JSONL file at `path`, flushed line by line.

    Errors are recorded too and raised again in replay. Cancelled generations are not: how far they came was chance.
    Opening raises `ResourceError` where the file cannot be written. A failed write does not lose the answer that it
    was to record: the first such failure is raised by `close`.
    """

    def __init__(self, inner: LLMBackend, path: str | os.PathLike[str]) -> None:
        self.inner = inner
        self.path = Path(path)
        self.name, self.kind, self.max_batch = inner.name, inner.kind, inner.max_batch
        self._lock = threading.Lock()
        self._failure: OSError | None = None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a+b", buffering=0)
            if self._file.seek(0, os.SEEK_END):
                self._file.seek(-1, os.SEEK_END)
                if self._file.read(1) != b"\n":  # a recorder died in the middle of a line: keep ours apart from it
                    self._file.write(b"\n")
        except OSError as e:
            raise ResourceError(
                f"calls cannot be recorded to {self.path}: {e.strerror or e}", hint="name a file in a writable folder"
            ) from e

    def batch_key(self, request: GenerateRequest) -> Hashable:
        return self.inner.batch_key(request)

    def generate(
        self,
        requests: Sequence[GenerateRequest],
        on_text: OnText | None = None,
        is_cancelled: IsCancelled | None = None,
    ) -> Sequence[Generation | Exception]:
        results = self.inner.generate(requests, on_text, is_cancelled)
        for request, result in zip(requests, results, strict=True):
            if isinstance(result, Exception) or result.finish_reason != "cancelled":
                self._write("generate", request, result)
        return results

    def choose(self, requests: Sequence[ChooseRequest]) -> Sequence[int | Exception]:
        results = self.inner.choose(requests)
        for request, result in zip(requests, results, strict=True):
            self._write("choose", request, result)
        return results

    def count_tokens(self, text: str) -> int:
        return self.inner.count_tokens(text)

    def render_chat(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The inner backend's chat prompt, or plain text if it renders none."""
        render = getattr(self.inner, "render_chat", plain_chat)
        return str(render(messages))

    def info(self) -> BackendInfo:
        return BackendInfo(self.name, self.kind, {"recorded_to": str(self.path)})

    def close(self) -> None:
        """Closes the file and the inner backend. Raises `ResourceError` if a call could not be recorded."""
        self._file.close()
        self.inner.close()
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise ResourceError(
                f"{self.path} is incomplete: {failure.strerror or failure}", hint="free some space and record again"
            ) from failure

    def _write(self, call: str, request: GenerateRequest | ChooseRequest, result: Generation | int | Exception) -> None:
        line: dict[str, Any] = {"call": call, "request": _payload(request)}
        if isinstance(result, FlowcError):
            line["error"] = {
                "type": type(result).__name__,
                "code": result.code,
                "message": result.message,
                "hint": result.hint,
            }
        elif isinstance(result, Exception):
            line["error"] = {"type": type(result).__name__, "message": str(result)}
        else:
            line["result"] = asdict(result) if isinstance(result, Generation) else int(result)
        data = json.dumps(line, ensure_ascii=True).encode("ascii") + b"\n"
        with self._lock:
            try:
                self._file.write(data)  # unbuffered: on disk, for other processes to read, when this returns
            except OSError as e:
                self._failure = self._failure or e


@dataclass(slots=True)
class _Answers:
    """What was recorded for one request, in order."""

    call: str
    payload: dict[str, Any]
    results: list[Generation | int | FlowcError] = field(default_factory=list)
    used: int = 0

    def take(self) -> Generation | int | FlowcError:
        result = self.results[min(self.used, len(self.results) - 1)]
        self.used += 1
        return result


class ReplayBackend:
    """Answers from a recording. A call that it does not hold fails with `ReplayMismatch`, naming the nearest one it
    does.

    Calls recorded several times for the same request are answered in the order of the file, then the last again and
    again; across threads that order is the order of asking. Needs no model. Opening raises `ResourceError` where the
    file is missing and `InputError` with the line number where a line is malformed.
    """

    kind = "replay"

    def __init__(self, path: str | os.PathLike[str], *, max_batch: int = 64, name: str | None = None) -> None:
        self.path = Path(path)
        self.name = name or self.path.stem
        self.max_batch = max_batch
        self._lock = threading.Lock()
        self._answers: dict[str, _Answers] = {}
        try:
            lines = self.path.read_bytes().split(b"\n")
        except OSError as e:
            raise ResourceError(
                f"there is no recording {self.path}: {e.strerror or e}", hint="record one with RecordingBackend first"
            ) from e
        for number, line in enumerate(lines, 1):
            if line.strip():
                self._read(number, line)

    def _read(self, number: int, line: bytes) -> None:
        try:
            row = json.loads(line)
            call, payload = row["call"], dict(row["request"])
            if call not in ("generate", "choose") or not isinstance(payload["prompt"], str):
                raise ValueError("it is no recorded call")
            result: Generation | int | FlowcError
            if "error" in row:
                result = _error(row["error"])
            elif call == "generate":
                result = Generation(**row["result"])
                if not isinstance(result.text, str):
                    raise ValueError("its text is no text")
                if result.logprobs is not None:
                    result = replace(result, logprobs=tuple(result.logprobs))
            else:
                result = int(row["result"])
                if not 0 <= result < len(payload["options"]):
                    raise ValueError("its result is none of the options")
        except (ValueError, KeyError, TypeError, AttributeError) as e:  # JSON and Unicode errors are ValueErrors
            why = f"{e} is missing" if isinstance(e, KeyError) else str(e)
            raise InputError(
                f"{self.path}, line {number}: malformed recording: {why}",
                hint="delete the line, or record again; a line that breaks off was cut by a crash",
            ) from e
        known = self._answers.setdefault(_canonical(call, payload), _Answers(call, payload))
        known.results.append(result)

    def batch_key(self, request: GenerateRequest) -> Hashable:
        return self.name

    def generate(
        self,
        requests: Sequence[GenerateRequest],
        on_text: OnText | None = None,
        is_cancelled: IsCancelled | None = None,
    ) -> Sequence[Generation | Exception]:
        """The recorded generations, spoken word by word."""
        out: list[Generation | Exception] = []
        for item, request in enumerate(requests):
            found = self._take("generate", _payload(request))
            if not isinstance(found, Generation):
                assert isinstance(found, Exception)
                out.append(found)
                continue
            try:
                said = speak(
                    item,
                    found.text,
                    GenerateRequest(request.prompt),  # the recorded text has been cut at the stop strings already
                    prompt_tokens=found.prompt_tokens,
                    count_tokens=found.completion_tokens,
                    finish_reason=found.finish_reason,
                    on_text=on_text,
                    is_cancelled=is_cancelled,
                )
                out.append(replace(said, logprobs=found.logprobs))
            except Exception as e:  # the listener's, and only this item's
                out.append(e)
        return out

    def choose(self, requests: Sequence[ChooseRequest]) -> Sequence[int | Exception]:
        out: list[int | Exception] = []
        for request in requests:
            found = self._take("choose", _payload(request))
            assert not isinstance(found, Generation)
            out.append(found)
        return out

    def count_tokens(self, text: str) -> int:
        """Words and signs: a recording does not hold the tokenizer."""
        return len(_WORDS.findall(text))

    def render_chat(self, messages: Sequence[Mapping[str, str]]) -> str:
        return plain_chat(messages)

    def info(self) -> BackendInfo:
        counts = Counter(a.call for a in self._answers.values() for _ in a.results)
        return BackendInfo(self.name, self.kind, {"path": str(self.path), **counts})

    def close(self) -> None:
        """Nothing is held open."""

    def _take(self, call: Literal["generate", "choose"], payload: dict[str, Any]) -> Generation | int | FlowcError:
        with self._lock:
            known = self._answers.get(_canonical(call, payload))
            return self._mismatch(call, payload) if known is None else known.take()

    def _mismatch(self, call: str, payload: dict[str, Any]) -> ReplayMismatch:
        prompt: str = payload["prompt"]
        same_kind = [a for a in self._answers.values() if a.call == call]
        hint = "record again, or look for what changed in the prompt: times, order and random numbers are usual"
        if not same_kind:
            return ReplayMismatch(f"{self.path} holds no {call} call at all; asked was {_shown(prompt)}", hint=hint)
        twin = next((a for a in same_kind if a.payload["prompt"] == prompt), None)
        if twin is not None:
            names = [n for n in sorted({*payload, *twin.payload}) if payload.get(n) != twin.payload.get(n)]
            changed = ", ".join(f"{n}={twin.payload.get(n)!r} recorded, {payload.get(n)!r} asked" for n in names)
            return ReplayMismatch(f"{self.path} holds this prompt with other parameters: {changed}", hint=hint)
        nearest: str = _nearest(prompt, [a.payload["prompt"] for a in same_kind])
        at = next(
            (i for i, (a, b) in enumerate(zip(prompt, nearest, strict=False)) if a != b), min(len(prompt), len(nearest))
        )
        line = prompt.count("\n", 0, at) + 1
        return ReplayMismatch(
            f"{self.path} does not hold this {call} call; the nearest recorded prompt differs from line {line} on\n"
            f"  recorded: {_shown(nearest, at)}\n"
            f"  asked:    {_shown(prompt, at)}",
            hint=hint,
        )


def _error(row: Mapping[str, Any]) -> FlowcError:
    """A recorded error: of the class it had if that is one of flowc's, else a `RunError` that names the class."""
    message, name = str(row["message"]), str(row["type"])
    kind = getattr(errors, name, None)
    if isinstance(kind, type) and issubclass(kind, FlowcError):
        return kind(message, code=row.get("code"), hint=row.get("hint"))
    return RunError(f"{name}: {message}", hint="the recorded call failed with this error")


def _nearest(prompt: str, recorded: Sequence[str]) -> str:
    """The recorded prompt most like `prompt`: by shared words first, then by difflib's ratio; ties to the first."""
    words = set(_WORDS.findall(prompt))

    def likeness(i: int) -> tuple[float, int]:
        other = set(_WORDS.findall(recorded[i]))
        return (-len(words & other) / max(1, len(words | other)), i)

    short = sorted(range(len(recorded)), key=likeness)[:_CANDIDATES]
    matcher = difflib.SequenceMatcher(autojunk=False)
    matcher.set_seq2(_WORDS.findall(prompt[:_COMPARED]))

    def ratio(i: int) -> float:
        matcher.set_seq1(_WORDS.findall(recorded[i][:_COMPARED]))
        return matcher.ratio()

    return recorded[max(short, key=ratio)]


def _shown(text: str, at: int = 0, width: int = 60) -> str:
    """A piece of `text` around `at`, in quotes, on one line."""
    start = max(0, at - width // 3)
    piece = text[start : start + width]
    return ("..." if start else "") + ascii(piece) + ("..." if start + width < len(text) else "")

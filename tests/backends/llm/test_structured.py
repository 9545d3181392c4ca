"""A model that speaks nonsense, held to a schema: it writes an object of that schema, or is cut off and said to be."""

from __future__ import annotations

import enum
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pytest
from pydantic import BaseModel, Field

pytest.importorskip("torch")
pytest.importorskip("llguidance")

from flowc.ir.errors import RunError
from flowc.runtime.protocols import GenerateRequest, Generation
from flowc.runtime.requests import read_answer, schema_of

if TYPE_CHECKING:
    from flowc.backends.llm.local import LocalBackend

pytestmark = pytest.mark.models


class Flat(BaseModel):
    count: int = Field(ge=0, le=999)
    sure: bool


class Colour(enum.Enum):
    RED = "red"
    DARK_BLUE = "dark blue"


class Painted(BaseModel):
    colour: Colour
    kind: Literal["a house", "a ship"]
    label: str = Field(max_length=8)


class Street(BaseModel):
    """Nested objects, lists of them, what may be absent or null, and one of two types."""

    houses: list[Painted] = Field(min_length=1, max_length=2)
    mayor: Flat | None
    numbers: list[int] = Field(default=[], max_length=2)
    either: Flat | Literal["none"] = "none"


class Constant(BaseModel):
    version: Literal[1]


class Endless(BaseModel):
    text: str


SCHEMAS: list[type[BaseModel]] = [Flat, Painted, Street, Constant]


def asked(model: type[BaseModel], **options: Any) -> GenerateRequest:
    return GenerateRequest(f"An object {model.__name__}: ", **{"schema": schema_of(model), "max_tokens": 400} | options)


def written(result: Generation | Exception) -> Generation:
    assert isinstance(result, Generation), result
    return result


@pytest.mark.parametrize("temperature", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("model", SCHEMAS)
def test_what_is_written_is_an_object(either: LocalBackend, model: type[BaseModel], temperature: float) -> None:
    requests = [asked(model, temperature=temperature, seed=n) for n in range(4 if temperature else 1)]
    texts = []
    for request, result in zip(requests, map(written, either.generate(requests)), strict=True):
        assert result.finish_reason == "stop"
        assert isinstance(read_answer("parse", request, result, model), model)
        assert json.loads(result.text) == json.loads(result.text.strip()), "nothing stands around it"
        texts.append(result.text)
    if temperature > 1 and model is not Constant:
        assert len(set(texts)) > 1


def test_objects_are_the_same_on_every_backend_and_in_any_company(either: LocalBackend) -> None:
    free = GenerateRequest("What is a generator?", max_tokens=12)
    mixed = [asked(Street, temperature=1.0, seed=3), free, asked(Painted), asked(Flat, temperature=1.0, seed=4)]
    together = [written(r).text for r in either.generate(mixed)]
    assert together == [written(either.generate([r])[0]).text for r in mixed]
    seen = _texts.setdefault("mixed", together)
    assert together == seen, "both backends write the same"


_texts: dict[str, list[str]] = {}


def test_what_the_schema_gives_away_is_not_decoded(folder: Path) -> None:
    from flowc.backends.llm.paged.backend import PagedBackend

    backend = PagedBackend(folder, device="cpu")
    result = written(backend.generate([asked(Painted)])[0])
    steps = backend.engine.stats.steps
    assert 0 < steps < result.completion_tokens / 2, (steps, result)
    assert written(backend.generate([asked(Constant)])[0]).text == '{"version":1}'
    assert backend.engine.stats.steps == steps, "all of it was known"
    backend.close()


def test_log_probabilities_come_for_every_token(either: LocalBackend) -> None:
    plain, told = (written(either.generate([asked(Painted, logprobs=wanted)])[0]) for wanted in (False, True))
    assert told.text == plain.text
    assert told.logprobs is not None
    assert len(told.logprobs) == told.completion_tokens == plain.completion_tokens
    assert all(p < 0 for p in told.logprobs)


def test_an_object_that_is_cut_off_is_said_to_be(either: LocalBackend) -> None:
    request = asked(Endless, max_tokens=20)
    result = written(either.generate([request])[0])
    assert result.finish_reason == "length"
    with pytest.raises(RunError, match="cut off after 20 tokens") as told:
        read_answer("parse", request, result, Endless)
    assert "max_length" in str(told.value.hint)


def test_a_schema_that_cannot_be_followed_is_told_once(either: LocalBackend) -> None:
    request = GenerateRequest("Hi", max_tokens=5, schema='{"type": "string", "pattern": "(?=x)y"}')
    with pytest.warns(UserWarning, match="not held to a schema"):
        first = either.generate([request])
    assert (
        list(either.generate([GenerateRequest("Hi", max_tokens=5)])) == list(first) == list(either.generate([request]))
    )


def test_without_the_library_the_model_writes_freely(either: LocalBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    monkeypatch.delitem(sys.modules, "flowc.backends.llm.structured", raising=False)
    with pytest.warns(UserWarning, match="llguidance.* is not installed"):
        free = either.generate([asked(Flat, max_tokens=6)])
    assert list(free) == list(either.generate([asked(Flat, max_tokens=6, schema=None)]))

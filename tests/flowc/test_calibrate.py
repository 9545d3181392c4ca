"""What `flowc calibrate` measures is what the backends take, on a clock that only they move."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from flowc import LLM, Index, calibrate, workflow
from flowc.config import load_config
from flowc.engine import Engine
from flowc.ir.errors import ConfigError, FlowcError
from flowc.ir.values import Docs
from flowc.passes.cost import CostModel, read_calibration
from flowc.passes.estimate import forecast
from flowc.runtime.protocols import GenerateRequest, Generation, SearchRequest

READ_S, WRITE_S, SEARCH_S = 2e-4, 3e-2, 7e-3


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def perf_counter_ns(self) -> int:
        return int(self.now * 1e9)


class Model:
    name, kind, max_batch = "timed", "language-model", 1

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.prompts: list[str] = []

    def generate(self, requests: Sequence[GenerateRequest], *_: Any) -> list[Generation]:
        answers = []
        for r in requests:
            self.prompts.append(r.prompt)
            tokens = len(r.prompt.split())
            self.clock.now += tokens * READ_S + r.max_tokens * WRITE_S
            answers.append(Generation("w " * r.max_tokens, tokens, r.max_tokens))
        return answers


class Shelf:
    name, max_batch = "shelf", 1

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def search(self, requests: Sequence[SearchRequest]) -> list[Docs]:
        self.clock.now += SEARCH_S * len(requests)
        return [Docs(()) for _ in requests]


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Engine:
    file = tmp_path / "flowc.toml"
    file.write_text('[llm.default]\nbackend = "reader"\n[index.shelf]\npath = "none"\n[index.gone]\npath = "gone"\n')
    clock = Clock()
    monkeypatch.setattr(calibrate, "time", clock)
    engine = Engine(load_config(file=file))
    engine.resources.bind("llm", "default", Model(clock))
    engine.resources.bind("index", "shelf", Shelf(clock))
    return engine


def test_rates_are_what_the_backends_take(engine: Engine) -> None:
    found = list(calibrate.calibrate(engine))
    rates = {(m.of, m.rate): m.seconds for m in found if isinstance(m, calibrate.Measured)}
    assert rates["llm.default", "llm_s_per_prompt_token"] == pytest.approx(READ_S)
    assert rates["llm.default", "llm_s_per_token"] == pytest.approx(WRITE_S)
    assert rates["search.shelf", "search_s"] == pytest.approx(SEARCH_S)
    errors = [e for e in found if isinstance(e, FlowcError)]
    assert ["gone" in str(e) for e in errors] == [True]  # and the others were measured nevertheless
    prompts = engine.resources.llm("default").prompts
    assert len({p.split()[0] for p in prompts}) > 1, "every prompt begins like the last: a cache would answer"
    engine.close()


def test_written_read_and_used(engine: Engine, tmp_path: Path) -> None:
    found = [m for m in calibrate.calibrate(engine) if isinstance(m, calibrate.Measured)]
    path = tmp_path / ".flowc" / "calibration.json"
    calibrate.save(path, found)
    engine.close()
    again = Engine(load_config(file=tmp_path / "flowc.toml"))
    assert again.is_calibrated
    assert dict(again.costs.resources) == dict(calibrate.cost_model(found).resources)
    llm, other, shelf = LLM("default"), LLM("other"), Index("shelf")

    @workflow
    def ask(q: str) -> str:
        docs = shelf.search(q)
        draft = llm.generate(f"{docs} {q}", max_tokens=10)
        return other.generate(draft, max_tokens=10)

    graph = ask.graph()
    uses = forecast(graph, again.costs).resources
    assert uses["search shelf"].seconds == pytest.approx(SEARCH_S)
    prompt, fill = again.costs["prompt_tokens"], again.costs["fill"]
    assert uses["llm default"].seconds == pytest.approx(prompt * READ_S + 10 * fill * WRITE_S)
    assert uses["llm other"].seconds == pytest.approx(forecast(graph, CostModel()).resources["llm other"].seconds)
    again.close()


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"format": 99}', '{"format": 1, "rates": {"x": 1}, "resources": {}}']
)
def test_a_damaged_file_says_what_to_do(tmp_path: Path, text: str) -> None:
    path = tmp_path / "calibration.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match="flowc calibrate") as caught:
        read_calibration(path)
    assert str(path) in str(caught.value)


def test_counts_of_a_forecast() -> None:
    llm, shelf = LLM("default"), Index("shelf")

    @workflow
    def loops(q: str) -> str:
        notes = [shelf.search(part) for part in ("a", "b", "c")]
        for _ in range(5):
            if llm.choose(f"{notes} {q}", ["yes", "no"]) == "yes":
                break
        return llm.generate(q, max_tokens=100)

    f = forecast(loops.graph(), CostModel({"branch": 0.5}))
    assert f.resources["search shelf"].calls == f.resources["search shelf"].most_calls == 3
    assert f.resources["llm default"].most_calls == 6
    assert f.resources["llm default"].written_tokens == pytest.approx(60)
    assert f.seconds <= f.sequential_s * 1.001
    assert f.many_s(10) == pytest.approx(10 * f.resources["llm default"].seconds)
    assert json.loads(json.dumps(f.to_json(10)))["programs"] == 10

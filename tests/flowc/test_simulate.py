"""Simulation: against queueing theory, against itself under other hash seeds, faults, and the command."""

from __future__ import annotations

import gc
import io
import json
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from flowc.backends.simulated.faults import Faults, parse_fault
from flowc.backends.simulated.llm import Work, example_of
from flowc.backends.simulated.profiles import LaneProfile, Machine, load_machine, machine_names
from flowc.cli import main
from flowc.ir.builder import Builder
from flowc.ir.core import Graph
from flowc.ir.errors import ConfigError
from flowc.ir.types import TEXT
from flowc.runtime.plan import build_plan
from flowc.simulate import Arrivals, Job, parse_arrivals, simulate

ROOT = Path(__file__).parents[2]


def searches() -> Graph:
    b = Builder("searches", [("q", TEXT)])
    return b.finish(b.search("docs", b.params[0], k=2))


def generations(tokens: int = 40) -> Graph:
    b = Builder("generations", [("q", TEXT)])
    return b.finish(b.generate("m", b.params[0], max_tokens=tokens))


def job(graph: Graph) -> Callable[[int], Job]:
    plan = build_plan(graph)
    return lambda n: Job(plan, (f"question {n}",))


def one_server(seconds: float) -> Machine:
    machine = load_machine("cpu-2core")
    return replace(machine, search=LaneProfile(0.0, seconds, max_batch=1))


@pytest.mark.parametrize("load", [0.5, 0.8])
def test_one_server_waits_as_pollaczek_and_khinchine_say(load: float) -> None:
    """M/D/1: the mean wait is rho / (2 (1 - rho)) service times."""
    report = simulate(
        job(searches()),
        programs=10_000,
        arrivals=Arrivals(rate=load),
        machine=one_server(1.0),
    )
    expected = 1.0 + load / (2 * (1 - load))
    assert abs(report.latency.mean / expected - 1) < 0.08
    assert abs(report.lanes["search @docs"]["busy"] - load) < 0.03
    assert abs(report.waiting_ratio.mean - (expected - 1)) < 0.1 * expected


def test_a_lone_generation_takes_what_the_profile_says() -> None:
    machine = load_machine("cpu-2core")
    p = machine.llm
    seen = []
    report = simulate(
        job(generations(1)),
        programs=1,
        arrivals="closed:1",
        machine=machine,
        on_program=lambda program, seconds: seen.append(seconds),
    )
    prompt_tokens = len("question 0") // 4
    assert seen == [pytest.approx(p.step_s + prompt_tokens * p.prompt_s)]
    assert report.time_per_output_token_s == pytest.approx(seen[0])


def test_a_batch_decodes_together_and_slots_are_bounded() -> None:
    """64 equal generations at once, 16 slots: four rounds of a full step a token, and a step for the prompts."""
    machine = load_machine("cpu-2core")
    p = replace(machine.llm, context_s=0.0)
    report = simulate(
        job(generations(2)),
        programs=64,
        arrivals="closed:64",
        machine=replace(machine, llm=p),
        work=lambda request, seed: Work(1, 50),
    )
    full = p.step_s + 16 * p.sequence_s
    first = p.step_s + 16 * p.prompt_s
    assert report.makespan_s == pytest.approx(4 * (49 * full + first), rel=1e-6)


def test_equal_seeds_give_equal_logs() -> None:
    def log(seed: int) -> str:
        out = io.StringIO()
        simulate(
            job(generations()),
            programs=80,
            arrivals="poisson:1",
            seed=seed,
            policy="atlas",
            faults=["fail:llm:0.1", "slow:llm:3:10-20"],
            log=out,
        )
        return out.getvalue()

    assert log(1) == log(1)
    assert log(1) != log(2)


TARGET = """
from flowc import LLM, Index, tool, workflow

llm, docs = LLM("m"), Index("d")

@tool
def lookup(q: str) -> list[str]:
    raise AssertionError("tools are not called")

@workflow
def qa(q: str) -> str:
    found, more = docs.search(q, k=4), lookup(q)
    draft = llm.generate(f"{found}{more}{q}", max_tokens=64)
    while llm.choose(f"good? {draft}", ["yes", "no"]) == "no":
        draft = llm.generate(f"{found} better than {draft}", max_tokens=64)
    return draft
"""


def test_the_command_repeats_itself_byte_for_byte(tmp_path: Path) -> None:
    (tmp_path / "qa.py").write_text(TARGET)
    outputs = []
    for hash_seed in ("1", "2"):
        command = [
            sys.executable, "-m", "flowc", "simulate", "qa.py:qa", "-n", "40", "--arrivals", "poisson:0.4",
            "--policy", "remaining", "--slo", "20", "--fault", "lost:llm:40-50", "--fault", "fail:search:0.1",
            "--log", f"log{hash_seed}", "--plot", f"plot{hash_seed}.html", "--json",
        ]  # fmt: skip
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(ROOT / "src")}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
        outputs.append(done.stdout)
    assert outputs[0] == outputs[1]
    assert (tmp_path / "log1").read_bytes() == (tmp_path / "log2").read_bytes()
    assert (tmp_path / "plot1.html").read_bytes() == (tmp_path / "plot2.html").read_bytes()
    report = json.loads(outputs[0])
    assert report["programs"] == 40
    assert set(report["failed"]) == {"SimulatedFailure"}
    assert 0 < report["slo_attained"] < 1


def test_faults_do_what_they_say() -> None:
    base = simulate(job(searches()), programs=200, arrivals="poisson:0.2", machine=one_server(1.0))
    slow = simulate(
        job(searches()),
        programs=200, arrivals="poisson:0.2", machine=one_server(1.0), faults=["slow:search:3"],
    )  # fmt: skip
    assert slow.latency.p50 > 3 * base.latency.p50 - 0.01
    failed = simulate(
        job(searches()),
        programs=400, arrivals="poisson:0.2", machine=one_server(1.0), faults=["fail:search:0.25"],
    )  # fmt: skip
    assert 60 < failed.failed["SimulatedFailure"] < 140
    lost = simulate(
        job(searches()),
        programs=200, arrivals="poisson:0.2", machine=one_server(1.0), faults=["lost:search:100-200"],
    )  # fmt: skip
    assert lost.failed == {}
    assert lost.latency.max > 80, "who came first while the worker was away waited for it"
    for lane, graph in (("search", searches()), ("llm", generations())):
        gone = simulate(job(graph), programs=20, arrivals="poisson:0.2", faults=[f"lost:{lane}:20"])
        assert gone.failed["SimulatedFailure"] > 5, "with no worker left everything ends with a named error"
        assert gone.programs == 20


def test_a_replica_that_is_lost_costs_its_work_and_no_answer() -> None:
    machine = load_machine("cpu-2core")
    two = replace(machine, llm=replace(machine.llm, workers=2))
    kept = simulate(job(generations()), programs=100, arrivals="closed:30", machine=two)
    lost = simulate(
        job(generations()),
        programs=100, arrivals="closed:30", machine=two, faults=["lost:llm:3-9"],
    )  # fmt: skip
    assert lost.failed == {}
    assert kept.makespan_s < lost.makespan_s < 2 * kept.makespan_s


@pytest.mark.parametrize("text", "slow:search slow:nowhere:2 fail:llm:2 lost:llm:9-3 burn:llm:1 slow:llm:x".split())
def test_what_is_no_fault(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_fault(text)


def test_what_is_no_arrival_or_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("poisson", "poisson:-1", "poisson:x", "closed:0", "trace:", "daily:3"):
        with pytest.raises(ConfigError):
            parse_arrivals(text)
    with pytest.raises(ConfigError, match="cpu-2core"):
        load_machine("cpu-3core")
    (tmp_path / "m.toml").write_text("[llm]\nstep = 1\n")
    with pytest.raises(ConfigError, match="unknown key `step`"):
        load_machine(tmp_path / "m.toml")
    assert main(["simulate", "nowhere.py:x"]) == 2
    capsys.readouterr()
    assert machine_names() == ["cpu-2core", "h200"]
    assert not load_machine("h200").is_measured


def test_traces_arrive_as_written(tmp_path: Path) -> None:
    (tmp_path / "t").write_text('2.5\n{"at": 1.0}\n\n')
    assert parse_arrivals(f"trace:{tmp_path / 't'}").times == (1.0, 2.5)
    report = simulate(job(searches()), programs=9, arrivals=f"trace:{tmp_path / 't'}", machine=one_server(1.0))
    assert (report.programs, report.makespan_s) == (2, 3.5)


def test_memory_does_not_grow_with_the_programs() -> None:
    made = job(searches())

    def peak(programs: int) -> int:
        gc.collect()
        tracemalloc.start()
        simulate(made, programs=programs, arrivals=Arrivals(rate=0.5), machine=one_server(1.0))
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(100)
    few, many = peak(300), peak(3000)
    assert many - few < 2700 * 120, "a few numbers a program, nothing else"


def test_examples_fit_their_schema() -> None:
    pydantic = pytest.importorskip("pydantic")

    class Inner(pydantic.BaseModel):  # type: ignore[misc, name-defined]
        kind: str
        score: float | None

    class Outer(pydantic.BaseModel):  # type: ignore[misc, name-defined]
        items: list[Inner]
        first: Inner
        ok: bool = True

    Outer.model_validate(example_of(Outer.model_json_schema()))


def test_a_fault_is_drawn_from_the_seed_alone() -> None:
    def draws(seed: int) -> list[bool]:
        faults = Faults([parse_fault("fail:llm:0.5")], "llm", seed)
        return [faults.failure(1.0) is not None for _ in range(50)]

    assert draws(1) == draws(1) != draws(2)

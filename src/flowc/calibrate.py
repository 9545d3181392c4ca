"""`flowc calibrate`: what this machine and its backends take, measured once, for the cost model.

Every rate is the median of a few calls. Prompts are made of this text's words, each with a beginning of its own so that
no cache answers. A run takes some seconds a resource.
"""

from __future__ import annotations

import datetime
import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from flowc.engine import Engine
from flowc.ir.builder import Builder
from flowc.ir.core import Graph
from flowc.ir.errors import FlowcError
from flowc.ir.types import ANY
from flowc.passes.cost import CostModel, write_calibration
from flowc.passes.manager import PassManager, parse_pipeline
from flowc.runtime.plan import build_plan
from flowc.runtime.protocols import GenerateRequest, SearchRequest

REPEATS = 5
SHORT, LONG, WRITTEN = 40, 240, 24  # words of the two prompts, tokens of the longer answer
_WORDS = (__doc__ or "").split()


@dataclass(frozen=True, slots=True)
class Measured:
    """One rate: of what, which, in seconds, or bytes where its name says so.

    `spread` is the distance between the quartiles over the median.
    """

    of: str
    rate: str
    seconds: float
    spread: float


def calibrate(engine: Engine, only: frozenset[str] = frozenset()) -> Iterator[Measured | FlowcError]:
    """Measures the scheduler, then every configured resource (or those in `only`, as `llm.default`), one at a time.

    A resource that cannot be opened gives its error and the others go on.
    """
    if not only:
        yield from _scheduler(engine)
    for kind, section, measure in (
        ("llm", engine.config.llm, _llm),
        ("index", engine.config.index, _index),
    ):
        for name in section or (("default",) if kind == "llm" else ()):
            if only and f"{kind}.{name}" not in only:
                continue
            try:
                yield from measure(engine, name)
            except FlowcError as error:
                yield error


def cost_model(found: list[Measured]) -> CostModel:
    """The model that holds these rates; what all resources share comes from the scheduler's own."""
    rates: dict[str, float] = {}
    resources: dict[str, dict[str, float]] = {}
    for m in found:
        (resources.setdefault(m.of, {}) if "." in m.of else rates)[m.rate] = m.seconds
    return CostModel(rates, resources)


def save(path: Path, found: list[Measured]) -> None:
    """Writes the measured rates, with the machine and the versions beside them."""
    from flowc import __version__

    about = {
        "flowc": __version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
    write_calibration(path, cost_model(found), about)


def _timed(call: Callable[[int], Any], repeats: int = REPEATS) -> tuple[float, float, list[Any]]:
    """Median seconds of `call(i)`, their spread, and what the calls gave; the first call only warms up."""
    call(0)
    seconds, values = [], []
    for i in range(1, repeats + 1):
        start = time.perf_counter()
        values.append(call(i))
        seconds.append(time.perf_counter() - start)
    seconds.sort()
    middle = median(seconds)
    return middle, (seconds[-1 - repeats // 4] - seconds[repeats // 4]) / middle if middle else 0.0, values


def _chain(length: int) -> Graph:
    """A workflow of that many additions, one after the other."""
    builder = Builder("calibration", [("x", ANY)], scope="flowc.calibrate:_chain")
    value = builder.params[0]
    for _ in range(length):
        (value,) = builder.py("x + 1", value, params=("x",))
    return builder.finish(value)


def _scheduler(engine: Engine) -> Iterator[Measured]:
    """A node's turn: a chain node by node against the same as one code object."""
    length = 400
    graph = _chain(length)
    seconds = {}
    for passes in ("fuse-py", ""):
        plan = build_plan(PassManager(parse_pipeline(passes)).run(graph).graph)
        seconds[passes], spread, _ = _timed(lambda i, p=plan: engine.runtime.run(p, (i,)), 20)  # type: ignore[misc]
    yield Measured("scheduler", "turn_s", max(1e-8, seconds[""] - seconds["fuse-py"]) / length, spread)


def _prompt(words: int, number: int) -> str:
    """A prompt of that many words that no other begins like."""
    source = (_WORDS * (words // len(_WORDS) + 1))[:words]
    return f"{number}-{time.perf_counter_ns()} " + " ".join(source)


def _llm(engine: Engine, name: str) -> Iterator[Measured]:
    """Seconds per prompt token (a long against a short prompt) and per written token (many against one)."""
    backend = engine.resources.llm(name)

    def ask(words: int, tokens: int) -> tuple[float, float, float, float]:
        def call(i: int) -> Any:
            answer = backend.generate([GenerateRequest(_prompt(words, i), max_tokens=tokens)])[0]
            if isinstance(answer, Exception):
                raise answer
            return answer

        seconds, spread, answers = _timed(call)
        count = len(answers)
        read = sum(a.prompt_tokens for a in answers) / count
        return seconds, spread, read, sum(a.completion_tokens for a in answers) / count

    short_s, _, short_read, _ = ask(SHORT, 1)
    long_s, long_spread, long_read, _ = ask(LONG, 1)
    written_s, written_spread, _, written = ask(SHORT, WRITTEN)
    of = f"llm.{name}"
    if long_read > short_read:
        per_token = max(0.0, long_s - short_s) / (long_read - short_read)
        yield Measured(of, "llm_s_per_prompt_token", per_token, long_spread)
    if written > 1:
        yield Measured(of, "llm_s_per_token", max(0.0, written_s - short_s) / (written - 1), written_spread)


def _index(engine: Engine, name: str) -> Iterator[Measured]:
    """Seconds of one search, its embedding included, by texts of its own and of others."""
    backend = engine.resources.index(name)

    def call(i: int) -> Any:
        answer = backend.search([SearchRequest(_prompt(12, i))])[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    seconds, spread, _ = _timed(call)
    yield Measured(f"search.{name}", "search_s", seconds, spread)
    rates = getattr(backend, "rates", None)  # of an index with a device
    for rate, value in ({} if rates is None else rates()).items():
        yield Measured(f"search.{name}", rate, value, 0.0)

"""Capture is linear in the length of a workflow, counted in function calls: a clock says little on a busy machine."""

import cProfile
import pstats

import pytest

from ..differential import HEAD, Loaded
from ..programs import Program

STRAIGHT = """    v{i} = llm.generate(f"{{q}} {i} {{a}}")
    w{i} = v{i}.upper() + "x"
    d{i} = docs.search(w{i}, k=2)
    l{i} = lookup(v{i})
    a = w{i}
"""
BRANCHING = """    if len(a) > {i}:
        a = llm.generate(a)
    xs.append(a)
    for x in xs:
        b = lookup(x)
        note(b)
"""


def calls_to_capture(part: str, count: int) -> int:
    body = "".join(part.format(i=i) for i in range(count))
    source = f"{HEAD}@workflow\ndef main(q: str):\n    a = 'x'\n    xs = []\n{body}    return a\n"
    loaded = Loaded(Program(source, (), False))
    profile = cProfile.Profile()
    try:
        profile.runcall(loaded.module.main.graph)
    finally:
        loaded.close()
    return int(pstats.Stats(profile).total_calls)  # type: ignore[attr-defined]


@pytest.mark.parametrize("part", [STRAIGHT, BRANCHING], ids=["straight", "branching"])
def test_capture_grows_with_the_length(part: str) -> None:
    calls_to_capture(part, 5)  # what is loaded once
    short, long = calls_to_capture(part, 50), calls_to_capture(part, 400)
    assert long < 8 * short * 1.4

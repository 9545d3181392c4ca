"""Every refusal of the frontend shows its code, the source line, the caret under the right words, and a hint that
helps.
"""

import asyncio
import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from flowc.ir.errors import CaptureError
from flowc.ir.verifier import verify
from flowc.runtime.reference import interpret

from ..differential import Loaded, direct_host
from ..program_world import Backends
from ..programs import Program

HERE = Path(__file__).parent
CODES = sorted(p.stem for p in HERE.glob("F01?.py"))


def page(code: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"errors_{code}", HERE / f"{code}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def failing_programs() -> list[Any]:
    found = []
    for code in CODES:
        p = page(code)
        for i, (source, at) in enumerate([(p.FAILING, p.AT), *getattr(p, "MORE", ())]):
            found.append(pytest.param(code, source, at, id=f"{code}-{i}"))
    return found


@pytest.mark.parametrize(("code", "source", "at"), failing_programs())
def test_failing_program_is_refused_at_its_place(code: str, source: str, at: str) -> None:
    loaded = Loaded(Program(source, (), False))
    try:
        with pytest.raises(CaptureError) as caught:
            loaded.module.main.graph()
    finally:
        loaded.close()
    error = caught.value
    shown = str(error).splitlines()
    assert error.code == code
    assert shown[0] == f"error[{code}]: {error.message}"
    assert error.hint
    assert shown[-1] == f"hint: {error.hint}"
    if not at:
        return
    number = next(i for i, line in enumerate(source.splitlines(), 1) if at in line)
    assert error.loc is not None
    assert error.loc.line == number
    assert shown[1].endswith(f".py:{number}:{error.loc.col + 1}")
    line, caret = shown[3], shown[4]
    begin = caret.index("^")
    assert line[begin:].startswith(at)
    assert caret.strip(" |") == "^" * len(at)


@pytest.mark.parametrize("code", CODES)
def test_repaired_program_runs_like_plain_python(code: str) -> None:
    p = page(code)
    loaded = Loaded(Program(p.REPAIRED, (), False))
    try:
        with direct_host():
            main = loaded.module.main
            expected = main.eager(*p.CALL)
            if asyncio.iscoroutine(expected):
                expected = asyncio.run(expected)
            graph = main.graph()
            verify(graph)
            assert interpret(graph, p.CALL, Backends()) == expected
    finally:
        loaded.close()

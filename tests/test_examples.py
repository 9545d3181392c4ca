"""Every example answers over the bundled documents, and its plan gives what plain Python gives."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import flowc
from flowc.backends.llm.factory import open_llm
from flowc.backends.vector.bundle import index_bundle
from flowc.dsl.workflow import Workflow

pytestmark = pytest.mark.models
ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
QUESTIONS = (
    "How do I sort a dictionary by its values?",
    "Why are Python strings immutable, and how do I change one?",
    "What does the global interpreter lock protect?",
)


@pytest.fixture(scope="module", autouse=True)
def bundled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The index of the bundled documents, from their shipped embeddings, and the bundled reader."""
    pytest.importorskip("faiss")
    out = tmp_path_factory.mktemp("examples") / "pydocs"
    index_bundle("pydocs", out, kind="ivf")
    flowc.bind(index={"pydocs": flowc.open_index(out, name="pydocs")}, llm={"default": open_llm("reader")})
    yield
    flowc.shutdown()


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def main_workflow(module: ModuleType) -> Workflow[..., Any]:
    """The last workflow that the file defines: the one it is about."""
    found = [v for v in vars(module).values() if isinstance(v, Workflow) and not v.__flowc_agent__]
    return found[-1]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_an_example_gives_what_plain_python_gives(path: Path) -> None:
    wf = main_workflow(load(path))
    expected = [wf.eager(q) for q in QUESTIONS]
    assert all(len(text.split()) > 3 for text in expected)
    for opt in (0, 1, 2, 3):
        plan = wf.compile(opt=opt)
        assert [plan(q) for q in QUESTIONS] == expected
        assert plan.map(QUESTIONS, progress=False) == expected
    assert "".join(wf.stream(QUESTIONS[0])) == expected[0]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_an_example_is_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 60

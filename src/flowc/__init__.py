"""flowc: an optimising compiler and runtime for RAG and multi-agent programs.

from flowc import LLM, Index, workflow

docs = Index("pydocs")
llm = LLM("default")

@workflow
def answer(question: str) -> str:
    return llm.generate(f"{docs.search(question)}\\n\\nQuestion: {question}\\nAnswer:")

answer("How do I sort a dictionary by value?")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flowc.dsl.agent import Agent
from flowc.dsl.host import Host, set_host_factory
from flowc.dsl.resources import LLM, Embedder, Index, Reranker
from flowc.dsl.tools import pure, tool
from flowc.dsl.workflow import Workflow, workflow
from flowc.ir.errors import (
    CaptureError,
    CompileError,
    ConfigError,
    FlowcError,
    InputError,
    LoopLimitError,
    NodeTimeoutError,
    ProgramTimeoutError,
    ResourceError,
    RunError,
)
from flowc.ir.options import Bounded, Budget
from flowc.ir.values import Doc, Docs

if TYPE_CHECKING:
    from flowc.backends.vector import build_index, open_index
    from flowc.engine import Engine, bind, load, shutdown

__version__ = "0.1.0"

_LAZY = {
    "Engine": "flowc.engine",
    "bind": "flowc.engine",
    "load": "flowc.engine",
    "shutdown": "flowc.engine",
    "open_index": "flowc.backends.vector",
    "build_index": "flowc.backends.vector",
}


def _make_host() -> Host:
    from flowc.engine import default_engine

    return default_engine()


set_host_factory(_make_host)


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from importlib import import_module

        value = getattr(import_module(_LAZY[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'flowc' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


__all__ = [
    "LLM",
    "Agent",
    "Bounded",
    "Budget",
    "CaptureError",
    "CompileError",
    "ConfigError",
    "Doc",
    "Docs",
    "Embedder",
    "Engine",
    "FlowcError",
    "Index",
    "InputError",
    "LoopLimitError",
    "NodeTimeoutError",
    "ProgramTimeoutError",
    "Reranker",
    "ResourceError",
    "RunError",
    "Workflow",
    "__version__",
    "bind",
    "build_index",
    "load",
    "open_index",
    "pure",
    "shutdown",
    "tool",
    "workflow",
]

"""Rewrites of workflows: one pass per file, the pass manager, the -O levels, the cost model.

compilation = PassManager(pipeline(2)).run(graph)
print(compilation.explain())
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .core import Estimate, Outcome, Pass, Remark, Verdict
    from .cost import CostModel
    from .manager import PASSES, PIPELINES, Compilation, PassManager, Stage, parse_pipeline, pipeline

_HOME = {
    "core": ("Estimate", "Outcome", "Pass", "Remark", "Verdict"),
    "cost": ("CostModel",),
    "manager": ("PASSES", "PIPELINES", "Compilation", "PassManager", "Stage", "parse_pipeline", "pipeline"),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}


def __getattr__(name: str) -> Any:
    module = _MODULE_OF.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{module}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)


__all__ = [
    "PASSES",
    "PIPELINES",
    "Compilation",
    "CostModel",
    "Estimate",
    "Outcome",
    "Pass",
    "PassManager",
    "Remark",
    "Stage",
    "Verdict",
    "parse_pipeline",
    "pipeline",
]

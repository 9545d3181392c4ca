"""What TARGET on the command line means: `file.py:workflow`, `module:workflow` or a saved `plan.flow`."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from flowc.config import Config

from .console import Failed, fail, note, show_error

__all__ = ["Target", "load_target"]


@dataclass(frozen=True, slots=True)
class Target:
    """A workflow, or a saved plan, which offers the same methods."""

    text: str
    workflow: Any
    is_plan: bool = False

    @property
    def name(self) -> str:
        return str(self.workflow.name)

    @property
    def signature(self) -> inspect.Signature:
        """The parameters. Those of a plan have no defaults: its text holds none."""
        found: inspect.Signature = self.workflow.signature
        return found

    def compiled(self, opt: int | None) -> Any:
        """What runs, at a level. A plan without a level is what it is: it was compiled when it was saved."""
        return self.workflow if self.is_plan and opt is None else self.workflow.compile(opt=opt)

    def level(self, opt: int | None, config: Config) -> int:
        """The level that holds: asked for, else the workflow's own, else the configuration's; of a plan 0."""
        if opt is not None:
            return opt
        own = getattr(self.workflow, "opt", None)
        return 0 if self.is_plan else own if isinstance(own, int) else config.run.opt


def load_target(text: str) -> Target:
    """The workflow or plan that TARGET names. UsageError if there is none; a file that fails to import says so and
    ends with 1.
    """
    if text.endswith(".flow"):
        if not Path(text).is_file():
            fail(f"there is no file {text}", hint=_near_file(text))
        from flowc.engine import load

        return Target(text, load(text), is_plan=True)
    where, _, name = text.rpartition(":")
    if not where or (len(where) == 1 and name[:1] in ("\\", "/")):  # no colon, or a drive letter's
        where, name = text, ""
    if where.endswith(".flow"):
        fail(f"{text} names a workflow inside a saved plan", hint=f"a plan is one workflow: write {where}")
    module = _file(where) if where.endswith(".py") or "/" in where or "\\" in where else _module(where)
    known = {key: value for key, value in vars(module).items() if is_workflow(value)}
    if not name:
        main = [w for w in known.values() if not w.__flowc_agent__] or list(known.values())
        if len(main) == 1:
            return Target(text, main[0])
        fail(f"{text} does not say which workflow", hint=_listing(where, known))
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part, None)
    if found is None:
        close = difflib.get_close_matches(name, known, n=1)
        fail(
            f"there is no workflow `{name}` in {where}",
            hint=f"did you mean {where}:{close[0]}?" if close else _listing(where, known),
        )
    if not is_workflow(found):
        hint = "put `@workflow` above it" if callable(found) else _listing(where, known)
        fail(f"`{name}` in {where} is no workflow but {_kind(found)}", hint=hint)
    return Target(text, found)


def is_workflow(value: object) -> bool:
    """Is it a decorated function?"""
    return bool(getattr(type(value), "__flowc_workflow__", False))


def _listing(where: str, known: dict[str, Any]) -> str:
    if not known:
        return f"{where} holds no workflow: put `@workflow` above a function"
    return f"workflows in {where}: {', '.join(known)}"


def _kind(value: object) -> str:
    return "a plain function" if inspect.isfunction(value) else f"a {type(value).__name__}"


def _file(path: str) -> ModuleType:
    file = Path(path)
    if not file.is_file():
        fail(f"there is no file {path}", hint=_near_file(path))
    from flowc.runtime.symbols import load_file

    folder = str(file.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)  # as `python file.py` has it, for the modules beside it
    try:
        return load_file(path)
    except Exception as error:
        _broken(path, error)


def _module(name: str) -> ModuleType:
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(error.name + ".")):
            hint = (
                f"did you mean {name}.py?"
                if Path(f"{name}.py").is_file()
                else "a TARGET is file.py:workflow, module:workflow or plan.flow"
            )
            fail(f"there is no module {name}", hint=hint)
        _broken(name, error)
    except Exception as error:
        _broken(name, error)


def _broken(what: str, error: Exception) -> NoReturn:
    """The user's file fails on import: its own traceback says where."""
    show_error(error)
    note(f"{what} could not be imported")
    raise Failed from error


def _near_file(path: str) -> str | None:
    folder = Path(path).parent
    try:
        names = [f.name for f in folder.iterdir() if f.suffix == Path(path).suffix]
    except OSError:
        return f"there is no folder {folder}"
    close = difflib.get_close_matches(Path(path).name, names, n=1)
    return f"did you mean {folder / close[0]}?" if close else None

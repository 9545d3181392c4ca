"""Opens an LLM backend by its name, the one in configuration: `reader`, `engine`, `hf`, `replay` or `record`."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from importlib import import_module
from typing import Any

from flowc.ir.errors import ConfigError, ResourceError
from flowc.runtime.protocols import LLMBackend

__all__ = ["BACKENDS", "open_llm"]

BACKENDS: dict[str, tuple[str, str]] = {  # name -> (class, what it is)
    "reader": ("reader:ReaderBackend", "the bundled extractive answerer; no model"),
    "engine": ("paged.backend:open_engine", "a Hugging Face model on the paged engine; needs flowc[local]"),
    "hf": ("hf:HFBackend", "the same model through transformers' own attention, in padded batches"),
    "replay": ("replay:ReplayBackend", "answers from a recording"),
    "record": ("replay:RecordingBackend", "another backend, with its calls written to a recording"),
}


def open_llm(backend: str = "reader", **options: Any) -> LLMBackend:
    """The backend of that name, opened with `options`; the caller closes it.

    `record` takes `path`, `inner` (the name of the backend to record: by default "engine" if a `model` is given, else
    "reader") and the options of `inner`. Raises `ConfigError` for an unknown name or option and for a library that is
    not installed, and what the backend raises for a bad value.
    """
    if backend not in BACKENDS:
        raise ConfigError(f"there is no LLM backend {backend!r}", hint=_suggest(backend, BACKENDS))
    make = _load(backend)
    if backend == "record":
        path = options.pop("path", None)
        if path is None:
            raise ConfigError("the LLM backend 'record' needs the option 'path'", hint="name the JSONL file to write")
        inner = options.pop("inner", "engine" if "model" in options else "reader")
        opened = open_llm(inner, **options)
        try:
            recording: LLMBackend = make(opened, path)
        except BaseException:
            opened.close()
            raise
        return recording
    parameters = inspect.signature(make).parameters
    for option in options:
        if option not in parameters:
            raise ConfigError(
                f"the LLM backend {backend!r} has no option {option!r}", hint=_suggest(option, parameters)
            )
    for name, parameter in parameters.items():
        if parameter.default is parameter.empty and name not in options:
            raise ConfigError(f"the LLM backend {backend!r} needs the option {name!r}", hint=f"give {name}=...")
    made: LLMBackend = make(**options)
    return made


def _load(backend: str) -> Callable[..., LLMBackend]:
    module, _, name = BACKENDS[backend][0].partition(":")
    try:
        loaded: Callable[..., LLMBackend] = getattr(import_module(f".{module}", __package__), name)
        return loaded
    except ModuleNotFoundError as e:
        if (e.name or "").startswith("flowc"):
            raise
        raise ConfigError(
            f"the LLM backend {backend!r} needs {e.name}, which is not installed",
            hint="pip install 'flowc[local]', or use the backend 'reader'",
        ) from e
    except (ImportError, OSError, RuntimeError) as e:  # a broken torch or a pair of versions that do not fit
        raise ResourceError(
            f"the LLM backend {backend!r} cannot be loaded: {e}", hint="reinstall with pip install -U 'flowc[local]'"
        ) from e


def _suggest(word: str, known: Any) -> str:
    near = difflib.get_close_matches(word, list(known), n=1)
    options = ", ".join(known)
    return f"did you mean {near[0]!r}? There are: {options}" if near else f"there are: {options}"

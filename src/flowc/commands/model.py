"""`flowc model` and `flowc demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flowc.ir.errors import ResourceError

from .console import Failed, emit, emit_json, fail

app = typer.Typer(help="Models for tests and benchmarks.", no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def _group() -> None:
    """A group of one command is still a group."""


@app.command("tiny")
def tiny(
    folder: Annotated[Path, typer.Argument(help="Where to write it.", metavar="DIR")],
    architecture: Annotated[str, typer.Option("--architecture", help="llama or qwen2.")] = "llama",
    layers: Annotated[int, typer.Option("--layers", min=1)] = 2,
    hidden: Annotated[int, typer.Option("--hidden", min=8)] = 64,
    vocab: Annotated[int, typer.Option("--vocab", min=260)] = 4096,
    seed: Annotated[int, typer.Option("--seed")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")] = False,
) -> None:
    """Write a small model with random weights and a working tokenizer. Its answers mean nothing."""
    if architecture not in ("llama", "qwen2"):
        fail(f"there is no architecture {architecture!r}", hint="llama or qwen2")
    try:
        from flowc.backends.llm.tiny import write_tiny_model
    except ModuleNotFoundError as error:
        raise ResourceError(f"the package {error.name} is not installed", hint="pip install 'flowc[local]'") from error
    path = write_tiny_model(
        folder,
        layers=layers,
        hidden=hidden,
        vocab=vocab,
        seed=seed,
        architecture="llama" if architecture == "llama" else "qwen2",
    )
    if as_json:
        emit_json(
            {
                "path": str(path),
                "architecture": architecture,
                "layers": layers,
                "hidden": hidden,
                "vocab": vocab,
                "seed": seed,
            }
        )
    else:
        emit(str(path))


def demo() -> None:
    """Answer questions over the bundled documents, with sources, and leave the plan as HTML."""
    from flowc.demo import main

    if code := main():
        raise Failed(code)

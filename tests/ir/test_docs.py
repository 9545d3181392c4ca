"""docs/ir.md is true: its texts are well formed, and its table is the table."""

import re
from pathlib import Path

import pytest

from flowc.ir.ops import OPS, OpSpec
from flowc.ir.parser import parse_graph
from flowc.ir.printer import print_graph
from flowc.ir.types import ARITY, ATOMS
from flowc.ir.verifier import verify

PAGE = Path(__file__).resolve().parent.parent.parent / "docs" / "ir.md"
BEGIN, END = "from the table in ir/ops.py -->\n", "<!-- end -->"
TEXTS = re.findall(r"```flow\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


def row(spec: OpSpec) -> str:
    attrs = ", ".join(f"`{name}`" + ("" if a.required else "?") for name, a in spec.attrs.items())
    lane = "" if spec.lane == "python" else spec.lane
    return f"| `{spec.name}` | {spec.doc} | {attrs} | {lane} |"


def table() -> str:
    head = ["| operation | what it gives | attributes (`?`: may be absent) | lane |", "|---|---|---|---|"]
    return "\n".join(["", *head, *map(row, OPS.values()), "", ""])


@pytest.mark.parametrize("text", TEXTS)
def test_texts(text: str) -> None:
    graph = parse_graph(text, str(PAGE))
    verify(graph)
    assert print_graph(graph) == text


def test_there_are_texts() -> None:
    assert len(TEXTS) == 3


def test_table() -> None:
    shown = PAGE.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0]
    assert shown == table(), "run: python -m tests.ir.test_docs"


def test_types() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for name in (*ATOMS, *ARITY):
        assert f"`{name}`" in page or f"`{name}<" in page


if __name__ == "__main__":
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(BEGIN)
    PAGE.write_text(before + BEGIN + table() + END + rest.split(END)[1], encoding="utf-8")

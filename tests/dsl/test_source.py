"""The source of a workflow is found wherever it was typed: files, notebook cells, `python -c`, the prompt."""

import linecache
import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flowc import workflow
from flowc.dsl.frontend.source import function_source
from flowc.ir.errors import CaptureError

ROOT = Path(__file__).resolve().parent.parent.parent
ENV = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "PYTHON_BASIC_REPL": "1", "TERM": "dumb"}

CELL = """%timeit pass
from flowc import LLM, workflow
llm = LLM()

@workflow
def answer(q: str) -> str:
    return llm.generate(f"{q}?")
"""


def remember(name: str, text: str) -> None:
    """What IPython does with a cell that it runs."""
    lines: list[str] = list(text.splitlines(keepends=True))
    linecache.cache[name] = (len(text), None, lines, name)


def test_a_notebook_cell_with_a_magic() -> None:
    name = "<ipython-input-7-abc>"
    remember(name, CELL)
    namespace: dict[str, object] = {"__name__": "__main__"}
    try:
        exec(compile("\n" + CELL.split("\n", 1)[1], name, "exec"), namespace)
        graph = namespace["answer"].graph()  # type: ignore[attr-defined]
    finally:
        del linecache.cache[name]
    assert [op.name for op in graph.body.ops] == ["template", "generate"]
    assert graph.body.ops[1].loc.line == 7


def test_a_cell_that_is_run_again_takes_its_newest_text() -> None:
    for number, word in enumerate(("old", "new")):
        name = f"<ipython-input-{number}-x>"
        text = f"from flowc import workflow\n@workflow\ndef f(x: str) -> str:\n    return x + '{word}'\n"
        remember(name, text)
        namespace: dict[str, object] = {"__name__": "__main__"}
        exec(compile(text, name, "exec"), namespace)
        graph = namespace["f"].graph()  # type: ignore[attr-defined]
        assert word in str(graph.body.ops[-1].attrs)
        del linecache.cache[name]


def test_python_dash_c() -> None:
    text = (
        "from flowc import workflow\n@workflow\ndef f(n: int):\n    return [i * n for i in range(3)]\n"
        "print(f.graph().name, f.eager(2))"
    )
    done = subprocess.run(
        [sys.executable, "-c", text], env=ENV, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout.strip() == "f [0, 2, 4]", done.stderr


def test_the_interactive_prompt() -> None:
    pid, fd = pty.fork()
    if pid == 0:
        os.execve(sys.executable, [sys.executable, "-i", "-q", "-c", "import readline"], ENV)
    shown = b""

    def until(word: bytes, seconds: float = 40.0) -> None:
        nonlocal shown
        end = time.monotonic() + seconds
        while word not in shown and time.monotonic() < end:
            if select.select([fd], [], [], 0.2)[0]:
                try:
                    shown += os.read(fd, 4096)
                except OSError:
                    return

    try:
        until(b">>> ")
        for line in (
            "from flowc import workflow",
            "@workflow",
            "def f(n: int):",
            "    k = n + 1",
            "    return [k, n]",
            "",
        ):
            os.write(fd, line.encode() + b"\n")
        os.write(fd, b"print('GRAPH', len(f.graph().body.ops), f.eager(2))\n")
        until(b"GRAPH 2 [3, 2]", 40.0)
        os.write(fd, b"exit()\n")
    finally:
        os.close(fd)
        os.waitpid(pid, 0)
    assert b"GRAPH 2 [3, 2]" in shown.replace(b"\r", b""), shown.decode(errors="replace")


def test_an_edited_file_is_no_source(tmp_path: Path) -> None:
    path = tmp_path / "edited.py"
    path.write_text("from flowc import workflow\n\n@workflow\ndef f(x: str):\n    return x\n")
    namespace: dict[str, object] = {"__name__": "edited"}
    exec(compile(path.read_text(), str(path), "exec"), namespace)
    path.write_text("import os\n")
    with pytest.raises(CaptureError, match="cannot be found"):
        namespace["f"].graph()  # type: ignore[attr-defined]


def test_a_function_below_other_decorators_and_in_a_class() -> None:
    class Desk:
        @workflow
        def answer(self: object, x: str) -> str:
            return x.upper()

    assert function_source(Desk.answer.fn).node.name == "answer"
    assert [op.name for op in Desk.answer.graph().body.ops] == ["py"]


def test_two_functions_of_one_name_on_different_lines() -> None:
    def make(which: int):  # type: ignore[no-untyped-def]
        if which:

            @workflow
            def same(x: str) -> str:
                return x + "a"
        else:

            @workflow
            def same(x: str) -> str:
                return x + "b"

        return same

    assert make(0).graph() != make(1).graph()

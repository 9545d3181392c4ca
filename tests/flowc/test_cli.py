"""The command line, in process through `main` and, where the process itself is the point, as a real one."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

import flowc
from flowc.cli import main
from flowc.commands import run as run_commands
from flowc.commands.results import ResultWriter
from flowc.ir.parser import parse_graph

SOURCE = '''
    import itertools
    import time
    from pathlib import Path
    from flowc import LLM, Index, tool, workflow

    llm = LLM("default")
    docs = Index("notes")
    ticks = itertools.count()


    @workflow
    def double(n: int) -> int:
        if n < 0:
            raise ValueError("negative: \\u202e")
        return n * 2


    @workflow
    def greet(name: str, punctuation: str = "!") -> str:
        return f"Hello {name}{punctuation}"


    @workflow
    def answer(question: str) -> str:
        return llm.generate(f"{docs.search(question, k=2)}\\n\\nQuestion: {question}\\nAnswer:", max_tokens=32)


    @workflow
    def tick(n: int) -> int:
        return next(ticks) + n


    @tool(reads=["file"])
    def first_line(path: str) -> str:
        """Waits until the file has a whole line."""
        for _ in range(500):
            text = Path(path).read_text() if Path(path).exists() else ""
            if "\\n" in text:
                return text.splitlines()[0]
            time.sleep(0.01)
        raise TimeoutError(path)


    @workflow
    def wait(path: str) -> str:
        if path == "":
            return "first"
        return first_line(path)


    def plain(n):
        return n
'''


@dataclass
class Result:
    code: int
    out: str
    err: str

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.out.splitlines()]

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Flowc = Callable[..., Result]


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Flowc]:
    """Runs `flowc ARGS` in this process, in `tmp_path`, where `qa.py` is; every run has an engine of its own."""
    before = dict(os.environ)
    for name in list(os.environ):
        if name.startswith("FLOWC_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "qa.py").write_text(dedent(SOURCE), encoding="utf-8")
    path = list(sys.path)

    def run(*args: str) -> Result:
        capfd.readouterr()
        code = main(list(args))
        flowc.shutdown()
        got = capfd.readouterr()
        return Result(code, got.out, got.err)

    yield run
    flowc.shutdown()
    sys.path[:] = path
    os.environ.clear()
    os.environ.update(before)


def spawn(*args: str, cwd: Path, stdin: str | None = None, env: dict[str, str] | None = None) -> Result:
    """Runs `python -m flowc ARGS` as a process."""
    root = Path(__file__).resolve().parents[2]
    variables = {k: v for k, v in os.environ.items() if not k.startswith("FLOWC_")}
    path = os.pathsep.join(filter(None, (str(root / "src"), os.environ.get("PYTHONPATH", ""))))
    done = subprocess.run(
        [sys.executable, "-m", "flowc", *args],
        cwd=cwd,
        input=stdin,
        env={**variables, "PYTHONPATH": path, **(env or {})},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return Result(done.returncode, done.stdout, done.stderr)


def lines(tmp_path: Path, *rows: str) -> str:
    path = tmp_path / "in.jsonl"
    path.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
    return str(path)


# -- the command as such


def test_version_and_help(cli: Flowc) -> None:
    assert cli("--version").out.startswith("flowc ")
    shown = cli("--help")
    assert shown.code == 0
    for command in ("compile", "opt", "run", "verify", "index", "model", "doctor", "demo"):
        assert re.search(rf"^  {command}\b", shown.out, re.MULTILINE)


@pytest.mark.parametrize("args", [["--version"], ["--help"], ["run", "--help"]])
def test_help_brings_nothing_heavy(args: list[str], tmp_path: Path) -> None:
    """typer itself asks pydantic about the parameters of one command, and only then."""
    program = f"""
import sys
from flowc.cli import main
code = main({args!r})
heavy = {{"torch", "numpy", "transformers", "faiss", "pydantic", "pydantic_settings", "lark", "networkx", "rich"}}
print("loaded:", sorted(heavy & sys.modules.keys()), code)
"""
    root = Path(__file__).resolve().parents[2]
    env = {**os.environ, "PYTHONPATH": str(root / "src")}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=env, cwd=tmp_path, timeout=60, check=True
    )
    assert done.stdout.splitlines()[-1] == ("loaded: ['pydantic'] 0" if args[0] == "run" else "loaded: [] 0")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["comiple"], "comiple"),
        (["run"], "TARGET"),
        (["run", "qa.py:double", "--nput", "n=1"], "--nput"),
        (["compile", "qa.py:double", "-O7"], "less than or equal to 3"),
        (["run", "qa.py:double", "--inputs", "x", "--concurrency", "0"], "greater than or equal to 1"),
    ],
)
def test_bad_usage_is_2(cli: Flowc, args: list[str], message: str) -> None:
    result = cli(*args)
    assert result.code == 2
    assert result.out == ""
    assert message in result.err


def test_colour_only_on_a_terminal(cli: Flowc, tmp_path: Path) -> None:
    for result in (cli("run", "qa.py:double", "--inputs", lines(tmp_path, "x")), cli("doctor"), cli("run", "no.py:x")):
        assert "\x1b" not in result.out + result.err


# -- targets


@pytest.mark.parametrize(
    ("target", "message", "hint"),
    [
        ("qa.py:dubble", "there is no workflow `dubble` in qa.py", "did you mean qa.py:double?"),
        ("qa.py:nothing", "there is no workflow `nothing` in qa.py", "double, greet, answer, tick, wait"),
        ("qa.py", "does not say which workflow", "workflows in qa.py: double"),
        ("qa.py:plain", "`plain` in qa.py is no workflow but a plain function", "put `@workflow` above it"),
        ("qa.py:llm", "is no workflow but a LLM", "workflows in qa.py"),
        ("qb.py:double", "there is no file qb.py", "did you mean qa.py?"),
        ("nowhere/qa.py:double", "there is no file", "there is no folder nowhere"),
        ("no_such_module:x", "there is no module no_such_module", "TARGET"),
        ("qa.flow", "there is no file qa.flow", ""),
    ],
)
def test_a_target_that_is_not_there(cli: Flowc, target: str, message: str, hint: str) -> None:
    result = cli("run", target, "--input", "n=1")
    assert result.code == 2
    assert result.out == ""
    assert message in result.err
    assert hint in result.err


def test_a_target_by_module(cli: Flowc, tmp_path: Path) -> None:
    (tmp_path / "pkg_for_flowc").mkdir()
    (tmp_path / "pkg_for_flowc" / "__init__.py").touch()
    shutil.copy(tmp_path / "qa.py", tmp_path / "pkg_for_flowc" / "inner.py")
    assert cli("run", "pkg_for_flowc.inner:double", "--input", "n=4").out == "8\n"


def test_a_target_that_fails_on_import_shows_the_users_lines(cli: Flowc, tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("x = 1\nimport no_such_package_anywhere\n")
    result = cli("run", "bad.py:w")
    assert result.code == 1
    assert 'bad.py", line 2' in result.err
    assert "No module named 'no_such_package_anywhere'" in result.err
    assert "commands" not in result.err  # no frame of flowc's


def test_the_only_workflow_beside_agents_needs_no_name(cli: Flowc, tmp_path: Path) -> None:
    (tmp_path / "agents.py").write_text(
        "from flowc import LLM, Agent, workflow\nllm = LLM()\none = Agent('one', llm)\ntwo = Agent('two', llm)\n\n"
        "@workflow\ndef both(x: str) -> str:\n    return two(one(x))\n"
    )
    assert parse_graph(cli("compile", "agents.py").out).name == "both"


def test_the_only_workflow_needs_no_name(cli: Flowc, tmp_path: Path) -> None:
    (tmp_path / "one.py").write_text("from flowc import workflow\n@workflow\ndef w(x: str) -> str:\n    return x\n")
    assert cli("run", "one.py", "--input", "x=hi").out == "hi\n"


# -- run


def test_one_run(cli: Flowc) -> None:
    result = cli("run", "qa.py:greet", "--input", "name=Ada = Lovelace", "-i", "punctuation=?")
    assert (result.code, result.out) == (0, "Hello Ada = Lovelace?\n")
    assert cli("run", "qa.py:double", "--input", "n=21", "--json").json["value"] == 42


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["n"], "has no `=`"),
        (["n=two"], "--input n takes JSON (it is a int)"),
        (["m=2"], "missing a required argument: 'n'"),
        (["n=1", "n=2"], "gives `n` twice"),
        ([], "missing a required argument: 'n'"),
    ],
)
def test_input_that_does_not_fit(cli: Flowc, flags: list[str], message: str) -> None:
    result = cli("run", "qa.py:double", *(part for flag in flags for part in ("--input", flag)))
    assert result.code == 2
    assert message in result.err


def test_a_failing_run_shows_the_users_line_and_is_1(cli: Flowc) -> None:
    result = cli("run", "qa.py:double", "--input", "n=-1")
    assert result.code == 1
    assert 'qa.py", line 15, in double' in result.err
    assert "ValueError: negative" in result.err
    assert "typer" not in result.err


def test_errors_as_json(cli: Flowc) -> None:
    data = cli("run", "qa.py:double", "--input", "n=-1", "--json").json
    assert data["error"]["type"] == "ValueError"
    assert data["error"]["place"].endswith("qa.py:15")
    data = cli("run", "qa.py:dubble", "--json").json
    assert (data["error"]["code"], data["error"]["hint"]) == ("F051", "did you mean qa.py:double?")


def test_many_runs_give_a_row_each(cli: Flowc, tmp_path: Path) -> None:
    result = cli("run", "qa.py:double", "--inputs", lines(tmp_path, '{"n": 1}', "", "2", "3", '{"n": -4}'))
    assert result.code == 1
    rows = sorted(result.rows, key=lambda r: r["index"])
    assert rows[:3] == [
        {"index": 0, "line": 1, "value": 2},
        {"index": 1, "line": 3, "value": 4},
        {"index": 2, "line": 4, "value": 6},
    ]
    assert rows[3]["error"]["type"] == "ValueError"
    assert rows[3]["line"] == 5
    assert "3 of 4 done, 1 failed" in result.err


def test_all_good_is_0(cli: Flowc, tmp_path: Path) -> None:
    result = cli("run", "qa.py:double", "--inputs", lines(tmp_path, "1", "2"), "--output", "out.jsonl")
    assert (result.code, result.out) == (0, "")
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert sorted(row["value"] for row in written) == [2, 4]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"n": 1', "in.jsonl, line 2 is not JSON: Expecting ',' delimiter at column 8"),
        ("nonsense", "in.jsonl, line 2 is not JSON"),
        ('{"m": 1}', "in.jsonl, line 2: missing a required argument: 'n'"),
        ('{"n": 1, "m": 2}', "in.jsonl, line 2: got an unexpected keyword argument 'm'"),
        ("[2]", "'<' not supported"),
        ("[" * 100_000, "in.jsonl, line 2 is not JSON"),
    ],
    ids=["cut off", "no json", "missing", "unknown", "a list", "nested"],
)
def test_a_malformed_line_is_named_and_the_rest_runs(cli: Flowc, tmp_path: Path, line: str, message: str) -> None:
    result = cli("run", "qa.py:double", "--inputs", lines(tmp_path, '{"n": 1}', line, '{"n": 3}'))
    assert result.code == 1
    rows = sorted(result.rows, key=lambda r: r["index"])
    assert [row.get("value") for row in rows] == [2, None, 6]
    assert message in rows[1]["error"]["message"]
    assert rows[1]["line"] == 2


def test_a_line_that_is_not_utf8_is_named(cli: Flowc, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(b'\xef\xbb\xbf{"n": 1}\n"\xff"\n{"n": 2}\r\n')
    result = cli("run", "qa.py:double", "--inputs", "in.jsonl")
    assert "in.jsonl, line 2 is not UTF-8" in result.err
    assert sorted(row["value"] for row in result.rows if "value" in row) == [2, 4]


def test_inputs_that_are_not_there(cli: Flowc) -> None:
    result = cli("run", "qa.py:double", "--inputs", "none.jsonl", "--output", "out.jsonl")
    assert result.code == 2
    assert "none.jsonl cannot be read: No such file" in result.err
    assert not Path("out.jsonl").exists()


def test_output_over_the_inputs_is_refused(cli: Flowc, tmp_path: Path) -> None:
    path = lines(tmp_path, "1")
    result = cli("run", "qa.py:double", "--inputs", path, "--output", path)
    assert result.code == 2
    assert Path(path).read_text() == "1\n"


def test_results_are_written_as_they_finish(cli: Flowc, tmp_path: Path) -> None:
    """The second program waits until the first one's row is in the file."""
    path = lines(tmp_path, '{"path": ""}', json.dumps({"path": str(tmp_path / "out.jsonl")}))
    result = cli("run", "qa.py:wait", "--inputs", path, "--output", "out.jsonl", "--concurrency", "2")
    assert result.code == 0, result.err
    first, second = ((tmp_path / "out.jsonl").read_text()).splitlines()
    assert json.loads(first)["value"] == "first"
    assert json.loads(json.loads(second)["value"])["value"] == "first"


def test_a_full_disk_loses_no_finished_result(cli: Flowc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk fills up in the middle of the third row: two whole rows stay in the file, the rest comes on stdout."""
    real, left = os.write, [120]
    target = tmp_path / "out.jsonl"

    def write(fd: int, data: Any) -> int:
        if not target.exists() or os.fstat(fd).st_ino != target.stat().st_ino:
            return real(fd, data)
        if not left[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        part = bytes(data)[: left[0]]
        left[0] -= len(part)
        return real(fd, part)

    monkeypatch.setattr(os, "write", write)
    result = cli("run", "qa.py:double", "--inputs", lines(tmp_path, *map(str, range(10))), "--output", str(target))
    assert result.code == 1
    assert "out.jsonl cannot be written: No space left on device" in result.err
    assert "the disk is full" in result.err
    kept = [json.loads(line) for line in target.read_text().splitlines()]
    assert kept
    assert f"{len(kept)} finished results are in {target}; the rest goes to stdout" in result.err
    assert sorted(row["value"] for row in kept + result.rows) == [2 * n for n in range(10)]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_device_that_is_full(cli: Flowc, tmp_path: Path) -> None:
    many = cli("run", "qa.py:double", "--inputs", lines(tmp_path, "1", "2"), "--output", "/dev/full")
    assert many.code == 1
    assert sorted(row["value"] for row in many.rows) == [2, 4]
    one = cli("run", "qa.py:double", "--input", "n=3", "--output", "/dev/full")
    assert (one.code, one.out) == (1, "6\n")
    assert "No space left" in one.err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_when_stdout_is_full_results_go_to_a_file(cli: Flowc, tmp_path: Path) -> None:
    path = lines(tmp_path, "1", "2")
    root = Path(__file__).resolve().parents[2]
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "flowc", "run", "qa.py:double", "--inputs", path],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(root / "src"), "TMPDIR": str(tmp_path)},
            timeout=60,
            check=False,
        )
    assert done.returncode == 1
    (saved,) = tmp_path.glob("flowc-results-*.jsonl")
    assert str(saved) in done.stderr
    assert sorted(json.loads(line)["value"] for line in saved.read_text().splitlines()) == [2, 4]
    assert "Traceback" not in done.stderr


def test_output_in_a_folder_that_is_not_there(cli: Flowc, tmp_path: Path) -> None:
    result = cli("run", "qa.py:double", "--inputs", lines(tmp_path, "1"), "--output", "no/such/out.jsonl")
    assert result.code == 1
    assert "no/such/out.jsonl cannot be written" in result.err


def test_rows_from_many_threads_are_whole(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    writer = ResultWriter(tmp_path / "out.jsonl")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: writer.write({"index": n, "value": "x" * n}), range(400)))
    writer.close()
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert sorted(row["index"] for row in rows) == list(range(400))
    assert writer.written == 400


def test_a_reader_that_goes_away_is_no_crash(cli: Flowc, tmp_path: Path) -> None:
    path = lines(tmp_path, *["1"] * 5000)
    root = Path(__file__).resolve().parents[2]
    command = f"{sys.executable} -m flowc run qa.py:double --inputs {path} | head -n 1"
    done = subprocess.run(
        ["sh", "-c", command],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(root / "src")},
        timeout=60,
        check=False,
    )
    assert json.loads(done.stdout)["value"] == 2
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr


def test_ctrl_c_ends_at_once_and_keeps_what_is_finished(cli: Flowc, tmp_path: Path) -> None:
    (tmp_path / "nap.py").write_text(
        "import time\nfrom flowc import tool, workflow\n@tool(reads=['clock'])\ndef nap(n: int) -> int:\n"
        "    time.sleep(60 if n else 0)\n    return n\n@workflow\ndef w(n: int) -> int:\n    return nap(n)\n"
    )
    root = Path(__file__).resolve().parents[2]
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "flowc",
            "run",
            "nap.py:w",
            "--inputs",
            lines(tmp_path, "0", "1"),
            "--output",
            "o.jsonl",
        ],
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(root / "src")},
    )
    try:
        for _ in range(600):
            if (tmp_path / "o.jsonl").exists() and (tmp_path / "o.jsonl").stat().st_size:
                break
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "1 of 2 results are written" in err
    assert "interrupted" in err
    assert "Traceback" not in err
    assert json.loads((tmp_path / "o.jsonl").read_text())["value"] == 0


def test_stdin_is_inputs_too(cli: Flowc, tmp_path: Path) -> None:
    result = spawn("run", "qa.py:double", "--inputs", "-", cwd=tmp_path, stdin="1\nx\n3\n")
    assert result.code == 1
    assert "<stdin>, line 2 is not JSON" in result.err
    assert sorted(row["value"] for row in result.rows if "value" in row) == [2, 6]


def test_the_json_summary(cli: Flowc, tmp_path: Path) -> None:
    path = lines(tmp_path, "1", "x", "-1")
    data = cli("run", "qa.py:double", "--inputs", path, "--json").json
    assert (data["programs"], data["failed"]) == (3, 2)
    assert [row["index"] for row in data["results"]] == [0, 1, 2]
    data = cli("run", "qa.py:double", "--inputs", path, "--output", "out.jsonl", "--json").json
    assert "results" not in data
    assert data["output"] == "out.jsonl"


def test_a_trace_is_written_also_of_a_run_that_fails(cli: Flowc, tmp_path: Path) -> None:
    assert cli("run", "qa.py:double", "--input", "n=-1", "--trace", "t.json").code == 1
    events = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    assert any(e.get("cat") == "program" for e in events)
    assert cli("compile", "qa.py:double", "-o", "plan", "--emit", "html", "--trace", "t.json").code == 0
    assert '"measured"' in (tmp_path / "plan" / "double.html").read_text()


def test_odd_values_are_written(cli: Flowc, tmp_path: Path) -> None:
    (tmp_path / "odd.py").write_text(
        dedent("""
        import dataclasses
        from flowc import workflow, Doc, Docs

        @dataclasses.dataclass
        class Point:
            x: int

        class Dark:
            def __repr__(self):
                raise RuntimeError

        VALUES = {
            "nan": float("nan"), "set": {2, 1}, "bytes": b"\\xff", "docs": Docs([Doc(1, "t", 0.5, "s")]),
            "data": Point(3), "keys": {1: 2}, "surrogate": "\\ud83e", "dark": Dark(), "tuple": (1, None),
        }
        own = []
        own.append(own)
        VALUES["own"] = own

        @workflow
        def odd(name: str):
            return VALUES[name]
        """)
    )
    names = ["nan", "set", "bytes", "docs", "data", "keys", "surrogate", "dark", "tuple", "own"]
    result = cli("run", "odd.py:odd", "--inputs", lines(tmp_path, *map(json.dumps, names)))
    assert result.code == 0, result.err
    values = {names[row["index"]]: row["value"] for row in result.rows}
    assert values == {
        "nan": {"float": "nan"},
        "set": [1, 2],
        "bytes": {"bytes": "/w=="},
        "docs": [{"id": 1, "text": "t", "score": 0.5, "source": "s", "title": ""}],
        "data": {"x": 3},
        "keys": {"items": [[1, 2]]},
        "surrogate": "\ud83e",
        "dark": {"repr": "<Dark: RuntimeError in its repr>"},
        "tuple": [1, None],
        "own": [{"repr": "..."}],
    }
    single = cli("run", "odd.py:odd", "--input", "name=surrogate")
    assert single.code == 0


# -- resources that are missing or broken


def build_notes(cli: Flowc, tmp_path: Path) -> Path:
    folder = tmp_path / "notes"
    folder.mkdir()
    (folder / "a.txt").write_text("The capital of France is Paris. Paris lies on the Seine.\n")
    (folder / "b.md").write_text("# Tea\n\nGreen tea is brewed at eighty degrees.\n")
    result = cli("index", "build", "notes", "-o", "idx", "--kind", "bm25")
    assert result.code == 0, result.err
    return tmp_path / "idx"


def test_a_missing_index(cli: Flowc) -> None:
    result = cli("run", "qa.py:answer", "--input", "question=tea?")
    assert result.code == 1
    assert "error[F061]: no index is called 'notes'" in result.err
    assert "docs.search(question, k=2)" in result.err  # the user's line
    assert "flowc index build" in result.err


def test_a_missing_index_fails_each_program_by_itself(cli: Flowc, tmp_path: Path) -> None:
    result = cli("run", "qa.py:answer", "--inputs", lines(tmp_path, '"a"', '"b"'))
    assert result.code == 1
    assert [row["error"]["code"] for row in result.rows] == ["F061", "F061"]


@pytest.mark.models
def test_index_build_info_search_and_run(cli: Flowc, tmp_path: Path) -> None:
    build_notes(cli, tmp_path)
    (tmp_path / "flowc.toml").write_text('[index.notes]\npath = "idx"\n')
    info = cli("index", "info", "idx", "--json").json
    assert (info["kind"], info["count"]) == ("bm25", 2)
    assert "bm25" in cli("index", "info", "notes").out
    found = cli("index", "search", "notes", "how hot is green tea", "-k", "1", "--json").json
    assert [doc["source"] for doc in found] == ["b.md"]
    assert "Green tea is brewed" in cli("index", "search", "idx", "green tea").out
    answered = cli("run", "qa.py:answer", "--input", "question=How is green tea brewed?")
    assert answered.code == 0, answered.err
    assert "eighty" in answered.out


@pytest.mark.models
def test_index_add_delete_compact_and_filters(cli: Flowc, tmp_path: Path) -> None:
    rows = [
        {"text": f"note {n} on tea", "id": f"n{n}", "meta": {"year": 2020 + n, "odd": n % 2 == 1}} for n in range(6)
    ]
    (tmp_path / "notes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:4]))
    (tmp_path / "more.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[3:]))
    assert cli("index", "build", "notes.jsonl", "-o", "idx", "--embedder", "hashing").code == 0
    taken = cli("index", "add", "idx", "more.jsonl")
    assert taken.code == 1
    assert "error[F063]: the index holds a passage with the key 'n3'" in taken.err
    added = cli("index", "add", "idx", "more.jsonl", "--upsert", "--json").json
    assert (added["added"], added["first_id"], added["passages"]) == (3, 4, 6)

    def years(*args: str) -> list[str]:
        found = cli("index", "search", "idx", "tea", "-k", "9", "--json", *args)
        assert found.code == 0, found.err
        return sorted(doc["source"] for doc in found.json)

    assert years() == ["n0", "n1", "n2", "n3", "n4", "n5"]
    assert years("--where", '{"year": {">=": 2022}, "odd": true}') == ["n3", "n5"]
    deleted = cli("index", "delete", "idx", "--id", "n0", "--number", "1", "--where", '{"year": [2024]}', "--json").json
    assert (deleted["deleted"], deleted["passages"]) == (3, 3)
    assert years() == ["n2", "n3", "n5"]
    info = cli("index", "info", "idx", "--json").json
    assert (info["count"], set(info["fields"])) == (3, {"year", "odd", "key", "source"})
    assert cli("index", "compact", "idx", "--json").json["passages"] == 3
    assert years() == ["n2", "n3", "n5"]
    info = cli("index", "info", "idx", "--json").json
    assert (info["count"], info["added"], info["deleted"]) == (3, 0, 0)
    (tmp_path / "questions.txt").write_text("tea\n\nnote 3\n")
    assert "2 given queries" in cli("index", "info", "idx", "--queries", "questions.txt").out
    for args, message in (
        (("index", "delete", "idx"), "nothing says what to delete"),
        (("index", "delete", "idx", "--where", "{"), "--where is not JSON"),
        (("index", "search", "idx", "tea", "--where", "[1]"), "--where is not a JSON object"),
        (("index", "search", "idx", "tea", "--where", '{"year": {"~": 1}}'), "unknown operator"),
    ):
        refused = cli(*args)
        assert refused.code == 2, refused.err
        assert message in refused.err
    assert cli("index", "build", "notes.jsonl", "-o", "words", "--kind", "bm25").code == 0
    assert cli("index", "add", "words", "more.jsonl", "--upsert").code == 0
    assert cli("index", "search", "words", "note 5", "-k", "1", "--json").json[0]["source"] == "n5"
    assert cli("index", "build", "notes.jsonl", "-o", "graph", "--kind", "hnsw", "--embedder", "hashing").code == 0
    refused = cli("index", "add", "graph", "more.jsonl", "--upsert")
    assert refused.code == 1
    assert "an index of kind hnsw takes no updates" in refused.err


@pytest.mark.models
def test_a_corrupt_index(cli: Flowc, tmp_path: Path) -> None:
    folder = build_notes(cli, tmp_path)
    (tmp_path / "flowc.toml").write_text('[index.notes]\npath = "idx"\n')
    largest = max((f for f in folder.rglob("*") if f.is_file() and f.suffix != ".json"), key=lambda f: f.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-7])
    for args in (
        ("index", "info", "idx"),
        ("index", "search", "idx", "tea"),
        ("run", "qa.py:answer", "--input", "question=tea"),
        ("doctor", "--deep"),
    ):
        result = cli(*args)
        assert result.code == 1, args
        assert "damaged" in result.out + result.err, args


@pytest.mark.models
def test_index_build_names_what_it_cannot_read(cli: Flowc, tmp_path: Path) -> None:
    path = tmp_path / "docs.jsonl"
    path.write_text('{"text": "one"}\n{"text": \n{"text": "three"}\n')
    result = cli("index", "build", str(path), "-o", "idx", "--kind", "bm25", "--json")
    assert result.code == 1
    assert "docs.jsonl" in result.err
    assert ":2" in result.err or "line 2" in result.err
    assert result.json["passages"] == 2
    assert cli("index", "info", "idx").code == 0


def test_an_index_of_nothing(cli: Flowc, tmp_path: Path) -> None:
    missing = cli("index", "build", "no_such_folder", "-o", "idx")
    assert missing.code == 1
    assert "F061" in missing.err
    named = cli("index", "search", "no-such", "tea")
    assert named.code == 2
    assert "there is no index folder no-such" in named.err


@pytest.mark.models
def test_a_wrong_model_path(cli: Flowc, tmp_path: Path) -> None:
    (tmp_path / "flowc.toml").write_text('[llm.default]\nbackend = "hf"\nmodel = "./no/model"\n')
    (tmp_path / "say.py").write_text(
        "from flowc import LLM, workflow\nllm = LLM()\n@workflow\ndef say(x: str) -> str:\n    return llm.generate(x)\n"
    )
    result = cli("run", "say.py:say", "--input", "x=hi")
    assert result.code == 1
    assert re.search(r"error\[F06\d\]", result.err)
    assert "no/model" in result.err
    doctor = cli("doctor")
    assert doctor.code == 1
    assert "there is no model folder" in doctor.out


@pytest.mark.models
def test_a_tiny_model_is_written_and_runs(cli: Flowc, tmp_path: Path) -> None:
    assert cli("model", "tiny", "tiny", "--vocab", "300", "--json").json["path"].endswith("tiny")
    (tmp_path / "flowc.toml").write_text('[llm.default]\nmodel = "tiny"\n')
    (tmp_path / "say.py").write_text(
        "from flowc import LLM, workflow\nllm = LLM()\n@workflow\n"
        "def say(x: str) -> str:\n    return llm.generate(x, max_tokens=4)\n"
    )
    result = cli("run", "say.py:say", "--input", "x=hi")
    assert result.code == 0, result.err
    assert cli("model", "tiny", "x", "--architecture", "gpt").code == 2


def test_a_mistake_in_the_configuration_stops_before_anything_runs(cli: Flowc, tmp_path: Path) -> None:
    (tmp_path / "flowc.toml").write_text("[run]\noptt = 1\n")
    result = cli("run", "qa.py:double", "--input", "n=1")
    assert result.code == 2
    assert "flowc.toml:2:1" in result.err
    assert "did you mean `opt`?" in result.err
    assert cli("run", "qa.py:double", "--input", "n=1", "--config", "none.toml").code == 2


# -- compile and opt


def test_compile_prints_ir_that_parses(cli: Flowc) -> None:
    result = cli("compile", "qa.py:answer")
    assert result.code == 0
    assert parse_graph(result.out).name == "answer"
    assert "operations" in result.err


def test_compile_writes_every_format(cli: Flowc, tmp_path: Path) -> None:
    args = ("compile", "qa.py:answer", "-o", "plan", "--emit", "html,svg,dot,mermaid,json,ir", "--json")
    data = cli(*args).json
    plan = tmp_path / "plan"
    files = {Path(f).relative_to("plan").as_posix() for f in data["files"]}
    assert files == {f.relative_to(plan).as_posix() for f in plan.rglob("*") if f.is_file()}
    assert {"answer.html", "answer.svg", "answer.dot", "answer.mmd", "answer.json", "ir/passes.json"} < files
    rows = json.loads((plan / "ir" / "passes.json").read_text())
    assert [row["pass"] for row in rows] == ["captured", *(p["name"] for p in data["passes"])]
    for row in rows:
        parse_graph((plan / "ir" / row["file"]).read_text())
    assert json.loads((plan / "answer.json").read_text())["hash"] == data["hash"]
    assert (plan / "answer.html").stat().st_size < 300_000


def test_a_second_compilation_leaves_no_stale_stages(cli: Flowc, tmp_path: Path) -> None:
    cli("compile", "qa.py:answer", "-o", "plan", "--emit", "ir")
    (tmp_path / "plan" / "ir" / "mine.flow").write_text("kept")
    cli("compile", "qa.py:answer", "-o", "plan", "--emit", "ir", "-p", "dce")
    names = sorted(f.name for f in (tmp_path / "plan" / "ir").iterdir())
    assert names == ["00-captured.flow", "01-dce.flow", "mine.flow", "passes.json"]


def test_print_after_and_remarks(cli: Flowc) -> None:
    after = cli("compile", "qa.py:answer", "--print-after", "prune-edges")
    assert after.out.startswith("# 06 prune-edges")
    assert parse_graph(after.out).name == "answer"
    remarks = cli("compile", "qa.py:answer", "--remarks")
    head, *rows = remarks.out.splitlines()
    assert head == "pass\tfired\toperation\tplace\twhy"
    assert any(row.startswith("wavefront\tyes\t") for row in rows)
    everything = cli("compile", "qa.py:answer", "--print-after-all").out
    assert everything == cli("compile", "qa.py:answer", "--print-after", "all").out
    assert everything.count("\nworkflow @answer") >= 5
    bad = cli("compile", "qa.py:answer", "--print-after", "prune")
    assert bad.code == 2
    assert "prune-edges" in bad.err


def test_the_difference_between_two_points(cli: Flowc) -> None:
    assert cli("compile", "qa.py:answer", "--diff", "final", "O2").out == ""
    levels = cli("compile", "qa.py:answer", "--diff", "O1", "O2").out
    assert levels.startswith("--- O1\n+++ O2\n")
    assert re.search(r"^\+.*wave = 0", levels, re.MULTILINE)
    bad = cli("compile", "qa.py:answer", "--diff", "captured", "wavefrnt")
    assert bad.code == 2
    assert "wavefront" in bad.err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--emit", "htlm", "-o", "x"], "did you mean `html`?"),
        (["--emit", "html"], "add -o DIR"),
        (["-p", "cse,dec"], "did you mean `dce`?"),
        (["-p", "cse{x=1}"], "has no option `x`"),
        (["-p", "cse", "-O1"], "exclude each other"),
        (["--trace", "qa.py"], "is not JSON"),
    ],
)
def test_compile_options_that_make_no_sense(cli: Flowc, args: list[str], message: str) -> None:
    result = cli("compile", "qa.py:answer", *args)
    assert result.code == 2
    assert message in result.err
    assert result.out == ""


def test_syntax_that_the_frontend_refuses(cli: Flowc, tmp_path: Path) -> None:
    (tmp_path / "gen.py").write_text("from flowc import workflow\n\n@workflow\ndef w(x: str):\n    yield x\n")
    for args in (("compile", "gen.py:w"), ("run", "gen.py:w", "--input", "x=1")):
        result = cli(*args)
        assert result.code == 1
        assert re.search(r"error\[F01\d\]: .*yield", result.err)
        assert "gen.py:5" in result.err
        assert "hint:" in result.err


def test_types_that_do_not_fit_between_operations(cli: Flowc, tmp_path: Path) -> None:
    """In a program the line is named, before it runs or when it gets there; in a graph given as text always before."""
    (tmp_path / "types.py").write_text(
        "from flowc import LLM, workflow\nllm = LLM()\n\n@workflow\ndef w(x: str) -> str:\n"
        "    return llm.generate(len(x))\n"
    )
    result = cli("run", "types.py:w", "--input", "x=1")
    assert result.code == 1
    assert re.search(r"error\[F0(21|74)\]", result.err)
    assert "types.py:6" in result.err
    ops = "  %d = search @i (%x) : docs\n  %t = generate @m (%d) : text\n  return %t\n"
    (tmp_path / "w.flow").write_text(f"workflow @w(%x: text) -> text {{\n{ops}}}\n")
    result = cli("opt", "w.flow")
    assert result.code == 1
    assert re.search(r"error\[F0[23]\d\]", result.err)
    assert "w.flow" in result.err


def test_a_malformed_flow_file_names_line_and_column(cli: Flowc, tmp_path: Path) -> None:
    (tmp_path / "w.flow").write_text("workflow @w(%x: text) -> text {\n  %y = generate @m %x : text\n  return %y\n}\n")
    for args in (("opt", "w.flow"), ("run", "w.flow", "--input", "x=1"), ("compile", "w.flow")):
        result = cli(*args)
        assert result.code == 1, args
        assert "w.flow:2:" in result.err, args
        assert "^" in result.err, args


def test_opt_rewrites_files_and_stdin(cli: Flowc, tmp_path: Path) -> None:
    text = (
        "workflow @w(%x: text) -> text {\n  %a = generate @m (%x) : text\n  %b = generate @m (%x) : text\n"
        '  %t = template "{}{}" (%a, %b) : text\n  return %t\n}\n'
    )
    (tmp_path / "w.flow").write_text(text)
    once = cli("opt", "w.flow")
    assert parse_graph(once.out) == parse_graph(text)
    shared = cli("opt", "w.flow", "-p", "cse,dce")
    assert shared.out.count("generate") == 1
    piped = spawn("opt", "-", "-p", "cse,dce", cwd=tmp_path, stdin=text)
    assert (piped.code, piped.out) == (0, shared.out)
    assert cli("opt", "w.flow", "-p", "cse,dce", "-o", "out.flow").out == ""
    assert (tmp_path / "out.flow").read_text() == shared.out
    unknown = cli("opt", "w.flow", "-p", "cse,dec")
    assert unknown.code == 2
    assert "there is no pass `dec`" in unknown.err
    assert cli("opt", "none.flow").code == 2


def test_a_saved_plan_runs_by_itself(cli: Flowc, tmp_path: Path) -> None:
    cli("compile", "qa.py:greet", "-o", "plan", "--emit", "ir")
    (saved,) = (tmp_path / "plan" / "ir").glob("*-wavefront.flow")
    result = spawn("run", str(saved), "--input", "name=Ada", "--input", "punctuation=.", cwd=tmp_path)
    assert (result.code, result.out) == (0, "Hello Ada.\n"), result.err
    short = cli("run", str(saved), "--input", "name=Ada")
    assert short.code == 2
    assert "punctuation" in short.err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_compile_to_a_place_that_cannot_be_written(cli: Flowc, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    result = cli("compile", "qa.py:double", "-o", "file/plan")
    assert result.code == 1
    assert "cannot be written" in result.err
    assert cli("opt", "missing.flow").code == 2
    cli("compile", "qa.py:double", "-o", "plan", "--emit", "ir")
    full = cli("opt", "plan/ir/00-captured.flow", "-o", "/dev/full")
    assert full.code == 1
    assert "No space left" in full.err


def test_a_full_disk_leaves_the_old_file(cli: Flowc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cli("compile", "qa.py:double", "-o", "plan", "--emit", "dot")
    before = (tmp_path / "plan" / "double.dot").read_bytes()

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    result = cli("compile", "qa.py:double", "-o", "plan", "--emit", "dot", "-O0")
    assert result.code == 1
    assert "error[F090]" in result.err
    assert [f.name for f in (tmp_path / "plan").iterdir()] == ["double.dot"]
    assert (tmp_path / "plan" / "double.dot").read_bytes() == before


# -- verify


def test_verify_of_a_workflow_that_holds(cli: Flowc, tmp_path: Path) -> None:
    result = cli("verify", "qa.py:double", "--inputs", lines(tmp_path, "1", "-2", '{"n": 3}'))
    assert result.code == 0, result.err
    assert result.out.splitlines()[0] == "line\teager\t-O0\t-O1\t-O2\t-O3"
    assert result.out.splitlines()[2].startswith("2\tValueError: negative")
    assert "3 of 3 inputs the same at every level" in result.err


def test_verify_names_what_differs(cli: Flowc, tmp_path: Path) -> None:
    """`tick` counts its calls, so no two runs agree: what verify has to say of it is known."""
    result = cli("verify", "qa.py:tick", "--inputs", lines(tmp_path, "10", "oops"), "--levels", "0,2", "--json")
    assert result.code == 1
    data = result.json
    assert data["wrong"] == 2
    first, second = data["rows"]
    assert first["levels"]["-O0"]["same"] is False
    assert first["levels"]["-O2"]["value"] != first["eager"]["value"]
    assert "is not JSON" in second["error"]["message"]
    assert cli("verify", "qa.py:tick", "--inputs", "in.jsonl", "--levels", "5").code == 2


class Box:
    """Has no equality of its own."""

    def __init__(self, inside: object) -> None:
        self.inside = inside


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        (1, 1, True),
        (1, True, False),
        (1, 1.0, False),
        (float("nan"), float("nan"), True),
        ([1, [float("nan")]], [1, [float("nan")]], True),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}, False),
        ((1, 2), [1, 2], False),
        ("x", "y", False),
        (object(), object(), True),
        (Box([1]), Box([1]), True),
        (Box([1]), Box([2]), False),
        (ValueError, ValueError, True),
    ],
)
def test_same_value(a: object, b: object, same: bool) -> None:
    assert run_commands.same_value(a, b) is same


def test_a_list_gives_several_arguments(cli: Flowc, tmp_path: Path) -> None:
    result = cli("run", "qa.py:greet", "--inputs", lines(tmp_path, '["Ada", "?"]', '["Bob"]', "[]"))
    assert sorted(row["value"] for row in result.rows if "value" in row) == ["Hello Ada?", "Hello Bob!"]
    assert "in.jsonl, line 3: missing a required argument: 'name'" in result.err


# -- doctor


def test_doctor_looks_and_does_not_import_torch(tmp_path: Path) -> None:
    program = "import sys; from flowc.cli import main; main(['doctor', '--json']); print('torch' in sys.modules)"
    root = Path(__file__).resolve().parents[2]
    env = {k: v for k, v in os.environ.items() if not k.startswith("FLOWC_")} | {"PYTHONPATH": str(root / "src")}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=env, cwd=tmp_path, timeout=60, check=True
    )
    text, _, loaded = done.stdout.rstrip().rpartition("\n")
    assert loaded == "False"
    findings = {f["what"]: f["status"] for f in json.loads(text)["findings"]}
    assert findings["python"] == "ok"
    assert findings["configuration"] == "ok"


def test_doctor_names_what_is_wrong(cli: Flowc, tmp_path: Path) -> None:
    (tmp_path / "flowc.toml").write_text(
        '[index.notes]\npath = "none"\n[llm.default]\nbackend = "replay"\nrecording = "none.jsonl"\n'
    )
    result = cli("doctor", "--json")
    assert result.code == 1
    wrong = {f["what"]: f["detail"] for f in result.json["findings"] if f["status"] == "wrong"}
    assert wrong.keys() == {"index notes", "llm default"}
    assert "there is no recording" in wrong["llm default"]
    (tmp_path / "flowc.toml").write_text("[rum]\n")
    result = cli("doctor", "--json")
    assert result.code == 1
    assert "did you mean `run`?" in json.dumps(result.json)

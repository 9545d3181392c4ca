"""Where configuration comes from, what wins, and what a mistake in it looks like."""

from dataclasses import fields
from pathlib import Path
from textwrap import dedent

import pytest

from flowc.config import (
    Config,
    EmbedderConfig,
    IndexConfig,
    LLMConfig,
    RerankerConfig,
    RunConfig,
    RuntimeConfig,
    find_config,
    load_config,
)
from flowc.ir.errors import ConfigError


def write(folder: Path, text: str, name: str = "flowc.toml") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(dedent(text), encoding="utf-8")
    return path


def load(folder: Path, env: dict[str, str] | None = None, **flags: object) -> Config:
    return load_config(folder, environ=env or {}, flags=flags)


def test_nothing_configured_is_the_defaults(tmp_path: Path) -> None:
    config = load_config(tmp_path, environ={})
    assert (config.run.opt, config.run.concurrency, config.run.timeout) == (2, 64, None)
    assert not config.llm
    assert not config.index
    assert not config.embedder


def test_a_named_model_runs_on_the_engine_unless_said_otherwise(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    write(tmp_path, '[llm.a]\nmodel = "m"\n[llm.b]\nmodel = "m"\nbackend = "hf"\n[llm.c]\nmax_batch = 2\n')
    assert {n: c.backend for n, c in load_config(tmp_path, environ={}).llm.items()} == {
        "a": "engine",
        "b": "hf",
        "c": "reader",
    }


def test_a_whole_file(tmp_path: Path) -> None:
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    path = write(
        tmp_path,
        """
        [llm.default]
        backend = "hf"
        model = "models/tiny"
        max_batch = 8
        options = { threads = 2 }

        [llm.taped]
        backend = "record"
        recording = "calls.jsonl"
        inner = "reader"

        [index.pydocs]
        path = "indexes/pydocs"
        nprobe = 4

        [embedder.small]
        backend = "hashing"
        options = { dim = 64 }

        [run]
        opt = 3
        timeout = 5
        """,
    )
    config = load_config(tmp_path, environ={})
    assert config.path == path
    assert config.llm["default"].arguments() == {
        "model": str(tmp_path / "models" / "tiny"),
        "max_batch": 8,
        "threads": 2,
    }
    assert config.llm["taped"].arguments() == {"path": tmp_path / "calls.jsonl", "inner": "reader"}
    assert config.index["pydocs"].path == tmp_path / "indexes" / "pydocs"
    assert config.index["pydocs"].nprobe == 4
    assert config.embedder["small"].spec == "hashing"
    assert config.embedder["small"].arguments() == {"dim": 64}
    assert config.run.opt == 3
    assert config.run.timeout == 5.0
    assert config.origins["run.opt"] == "flowc.toml:22"


def test_weak_to_strong_is_file_environment_flags(tmp_path: Path) -> None:
    write(tmp_path, "[run]\nopt = 1\nconcurrency = 1\ntimeout = 1.0\n")
    env = {"FLOWC_RUN__CONCURRENCY": "2", "FLOWC_RUN__TIMEOUT": "2"}
    config = load_config(tmp_path, environ=env, flags={"run": {"timeout": 3.0, "opt": None}})
    assert (config.run.opt, config.run.concurrency, config.run.timeout) == (1, 2, 3.0)
    assert config.origins["run.concurrency"] == "environment FLOWC_RUN__CONCURRENCY"
    assert config.origins["run.timeout"] == "flag"


def test_the_nearest_folder_wins_and_pyproject_counts(tmp_path: Path) -> None:
    write(tmp_path, "[run]\nopt = 0\n")
    inner = tmp_path / "a"
    write(inner, "[project]\nname = 'x'\n", "pyproject.toml")  # says nothing of flowc: looked past
    assert load(inner / "").run.opt == 0
    project = write(inner, "[tool.flowc.run]\nopt = 1\n", "pyproject.toml")
    assert find_config(inner) == project
    assert load(inner).run.opt == 1


def test_a_file_can_be_named(tmp_path: Path) -> None:
    path = write(tmp_path, "[run]\nopt = 0\n", "other.toml")
    assert load_config(tmp_path, file=path, environ={}).run.opt == 0
    assert load_config(tmp_path, environ={"FLOWC_CONFIG": str(path)}).run.opt == 0
    with pytest.raises(ConfigError, match="does not exist"):
        load_config(tmp_path, environ={"FLOWC_CONFIG": str(tmp_path / "none.toml")})


def test_environment_names_meet_the_files_names(tmp_path: Path) -> None:
    write(tmp_path, '[llm."My-Model"]\nbackend = "reader"\n')
    config = load(tmp_path, {"FLOWC_LLM__MY_MODEL__MAX_BATCH": "3", "FLOWC_LLM__NEW__BACKEND": "reader"})
    assert config.llm["My-Model"].max_batch == 3
    assert config.llm["new"].backend == "reader"


def test_variables_that_are_no_configuration_are_left_alone(tmp_path: Path) -> None:
    assert load(tmp_path, {"FLOWC_GPU": "1", "FLOWC_HOME": "x"}) == load(tmp_path)


def test_a_hub_id_stays_one_and_a_folder_becomes_absolute(tmp_path: Path) -> None:
    write(tmp_path, '[llm.a]\nbackend = "hf"\nmodel = "org/name"\n[llm.b]\nbackend = "hf"\nmodel = "./missing"\n')
    config = load(tmp_path)
    assert config.llm["a"].model == "org/name"
    assert config.llm["b"].model == str(tmp_path / "missing")


@pytest.mark.parametrize(
    ("text", "message", "hint", "line"),
    [
        ("[run]\noptt = 1\n", "unknown key `optt` in [run]", "did you mean `opt`?", 2),
        ("\n[lmm.default]\n", "unknown section `lmm`", "did you mean `llm`?", 2),
        ("[llm.default]\nmodle = 'x'\n", "unknown key `modle` in [llm.default]", "did you mean `model`?", 2),
        ("[run]\nopt = 7\n", "`run.opt` cannot be 7", "one of 0, 1, 2, 3", 2),
        ("[runtime]\npolicy = 'atlass'\n", "`runtime.policy` cannot be 'atlass'", "did you mean `atlas`?", 2),
        ("[runtime]\nmax_programs = 0\n", "cannot be 0", "at least 1", 2),
        ("[run]\nopt = true\n", "takes a whole number, not True", "", 2),
        ("[run]\nconcurrency = 0\n", "cannot be 0", "at least 1", 2),
        ("[run]\ntimeout = 'soon'\n", "takes a number, not 'soon'", "", 2),
        ("[llm.default]\nbackend = 'readr'\n", "cannot be 'readr'", "did you mean `reader`?", 2),
        ("[llm.default]\nbackend = 'hf'\n", "has backend `hf` and no `model`", "folder or a hub id", 2),
        ("[llm.x]\nbackend = 'replay'\n", "no `recording`", "", 2),
        ("[index.docs]\nnprobe = 2\n", "[index.docs] has no `path`", "add `path", 2),
        ("[index]\ndocs = 'x'\n", "is a table, not a value", "[index.NAME]", 2),
        ("run = 3\n", "is a table, not a value", "[run]", 1),
        ("[llm.x]\noptions = {a = [1]}\n", "`llm.x.options.a` takes a text", "", 2),
        ("[run]\nopt = = 1\n", "not valid TOML", "", 2),
    ],
)
def test_mistakes_in_the_file_name_their_line(tmp_path: Path, text: str, message: str, hint: str, line: int) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load(tmp_path)
    error = caught.value
    assert error.code == "F050"
    assert message in error.message
    assert hint in (error.hint or "")
    assert error.loc is not None
    assert (error.loc.file, error.loc.line) == (str(path), line)


def test_the_message_shows_the_line_with_a_caret(tmp_path: Path) -> None:
    path = write(tmp_path, "[run]\noptt = 1\n")
    with pytest.raises(ConfigError) as caught:
        load(tmp_path)
    assert str(caught.value) == dedent(f"""\
        error[F050]: unknown key `optt` in [run]
          --> {path}:2:1
          |
        2 | optt = 1
          | ^^^^
        hint: did you mean `opt`?""")


@pytest.mark.parametrize(
    ("variable", "value", "message", "hint"),
    [
        ("FLOWC_RUN__OPTT", "1", "unknown key `optt`", "did you mean `opt`?"),
        ("FLOWC_RUN_OPT", "1", "no key of the configuration", "FLOWC_RUN__OPT"),
        ("FLOWC_RNU__OPT", "1", "names no section", "did you mean `run`?"),
        ("FLOWC_RUN__OPT", "many", "takes a whole number, not 'many'", ""),
        ("FLOWC_LLM__DEFAULT", "hf", "names no key", "FLOWC_LLM__NAME__KEY"),
        ("FLOWC_LLM__DEFAULT__OPTIONS", "[1", "takes a table", ""),
    ],
)
def test_mistakes_in_the_environment_name_the_variable(
    tmp_path: Path, variable: str, value: str, message: str, hint: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, {variable: value})
    assert variable in caught.value.message
    assert message in caught.value.message
    assert hint in (caught.value.hint or "")


def test_a_file_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "flowc.toml").write_bytes(b"[run]\nopt = 1\n# \xff\n")
    with pytest.raises(ConfigError, match="not valid UTF-8") as caught:
        load(tmp_path)
    assert caught.value.loc is not None
    assert caught.value.loc.line == 3


def test_sections_cannot_be_changed(tmp_path: Path) -> None:
    config = load(tmp_path)
    with pytest.raises(TypeError):
        config.llm["x"] = config.run  # type: ignore[index]


KINDS = (LLMConfig, IndexConfig, EmbedderConfig, RerankerConfig, RunConfig, RuntimeConfig)


def test_the_documented_configuration_is_one_and_names_every_key(tmp_path: Path, root: Path) -> None:
    text = (root / "docs" / "command-line.md").read_text(encoding="utf-8").split("## Configuration")[1]
    block = "\n".join(line[4:] for line in text.splitlines() if line.startswith("    ") or not line.strip())
    write(tmp_path, block)
    config = load(tmp_path)
    assert config.llm["taped"].inner == "reader"
    named = {line.split(" = ")[0] for line in block.splitlines() if " = " in line}
    every = {f.name for kind in KINDS for f in fields(kind)}
    assert every == named

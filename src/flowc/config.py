"""Configuration: what the names in a workflow (`LLM("default")`, `Index("pydocs")`) are bound to on this machine.

Three places, the weaker first; each key is taken from the strongest place that says it:

1. `flowc.toml`, or `[tool.flowc]` in `pyproject.toml`, in the start folder or the nearest folder above it;
2. the environment: `FLOWC_RUN__OPT=3`, `FLOWC_LLM__DEFAULT__MODEL=/models/qwen` (two underscores between the parts);
3. flags of the command line.

    [llm.default]
    model = "models/tiny"           # a folder, relative to this file, or a hub id
    backend = "engine"              # the default where a model is named; "reader" where none is

    [index.pydocs]
    path = "indexes/pydocs"

    [run]
    concurrency = 64

An unknown key or a value of the wrong kind is a ConfigError (F050) that names the line and what was probably meant.
Only the standard library is imported here: reading a configuration costs a millisecond.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from flowc.ir.errors import ConfigError, Loc

__all__ = [
    "Config",
    "EmbedderConfig",
    "IndexConfig",
    "LLMConfig",
    "RunConfig",
    "RuntimeConfig",
    "find_config",
    "load_config",
]

FILE = "flowc.toml"
PREFIX = "FLOWC_"
Scalar = str | int | float | bool
_EMPTY: Mapping[str, Any] = MappingProxyType({})


def _key(
    kind: type, doc: str, default: Any = MISSING, *, choices: tuple[Any, ...] = (), least: float | None = None
) -> Any:
    """A dataclass field with what `_read_value` checks."""
    meta = {"kind": kind, "doc": doc, "choices": choices, "least": least}
    return field(metadata=meta) if default is MISSING else field(default=default, metadata=meta)


def _options() -> Any:
    meta = {"kind": dict, "doc": "anything else the backend takes, by name", "choices": (), "least": None}
    return field(default_factory=lambda: _EMPTY, metadata=meta)


@dataclass(frozen=True, slots=True)
class LLMConfig:
    """`[llm.NAME]`: what `LLM("NAME")` runs on."""

    backend: str = _key(str, "what answers", "reader", choices=("reader", "engine", "hf", "replay", "record"))
    model: str | None = _key(str, "a model folder (relative to the file) or a hub id; for `engine` and `hf`", None)
    recording: Path | None = _key(Path, "the file of recorded calls; for `replay` and `record`", None)
    inner: str | None = _key(
        str, "the backend whose calls are recorded; for `record`", None, choices=("reader", "engine", "hf")
    )
    device: str | None = _key(str, "`cpu`, `cuda`, `cuda:1`; absent: the best there is", None)
    dtype: str | None = _key(str, "precision of the weights", None, choices=("float32", "bfloat16", "float16", "auto"))
    max_batch: int | None = _key(int, "most requests in one backend call", None, least=1)
    options: Mapping[str, Scalar] = _options()

    def arguments(self) -> dict[str, Any]:
        """The options of `flowc.backends.llm.factory.open_llm(self.backend, ...)`."""
        given: dict[str, Any] = {"model": self.model, "device": self.device, "dtype": self.dtype}
        given["max_batch"] = self.max_batch
        if self.recording is not None:
            given |= {"path": self.recording, "inner": self.inner}
        return {key: value for key, value in given.items() if value is not None} | dict(self.options)


@dataclass(frozen=True, slots=True)
class IndexConfig:
    """`[index.NAME]`: the folder that `flowc index build` wrote for `Index("NAME")`."""

    path: Path = _key(Path, "the index folder")
    embedder: str | None = _key(str, "the embedder that it was built with; absent: what the index itself says", None)
    nprobe: int | None = _key(int, "clusters to probe; absent: what the index itself says", None, least=1)
    device: str = _key(str, "what holds the clusters in demand", "cpu", choices=("cpu", "cuda", "simulated"))
    device_bytes: int = _key(int, "the most of its memory that they may take", 1 << 30, least=1)


@dataclass(frozen=True, slots=True)
class EmbedderConfig:
    """`[embedder.NAME]`: what turns texts into vectors."""

    backend: str = _key(str, "`minilm` or `hashing`", "minilm", choices=("minilm", "hashing"))
    model: str | None = _key(str, "the folder of another sentence encoder (relative to the file)", None)
    device: str | None = _key(str, "`cpu`, `cuda`, `cuda:1`", None)
    dtype: str | None = _key(str, "precision of the weights", None, choices=("float32", "bfloat16"))
    options: Mapping[str, Scalar] = _options()

    @property
    def spec(self) -> str:
        """What `flowc.backends.embed.open_embedder` takes first."""
        return self.model or self.backend

    def arguments(self) -> dict[str, Any]:
        """The options of `flowc.backends.embed.open_embedder(self.spec, ...)`."""
        given = {"device": self.device, "dtype": self.dtype}
        return {key: value for key, value in given.items() if value is not None} | dict(self.options)


@dataclass(frozen=True, slots=True)
class RerankerConfig:
    """`[reranker.NAME]`: what `Reranker("NAME")` is: a cross-encoder in a folder, or a language model of `[llm.*]`."""

    model: str | None = _key(str, "the folder of a cross-encoder (relative to the file)", None)
    llm: str | None = _key(str, "the name of a language model that is asked about each passage", None)
    device: str | None = _key(str, "`cpu`, `cuda`, `cuda:1`", None)
    dtype: str | None = _key(str, "precision of the weights", None, choices=("float32", "bfloat16"))
    options: Mapping[str, Scalar] = _options()

    def arguments(self) -> dict[str, Any]:
        """The options of `flowc.backends.rerank.open_reranker(self.model, ...)`."""
        given = {"device": self.device, "dtype": self.dtype}
        return {key: value for key, value in given.items() if value is not None} | dict(self.options)


@dataclass(frozen=True, slots=True)
class RunConfig:
    """`[run]`: how plans are compiled and run where nothing else is said."""

    opt: int = _key(int, "optimisation level", 2, choices=(0, 1, 2, 3))
    concurrency: int = _key(int, "most programs at a time", 64, least=1)
    timeout: float | None = _key(float, "seconds that one program may take; absent: no limit", None, least=0.0)
    adapt: bool = _key(bool, "measure now and then what a rewrite saves, and switch off one that loses", True)
    calibration: Path | None = _key(
        Path, "what `flowc calibrate` measured; absent: .flowc/calibration.json beside the file, if it is there", None
    )


@dataclass(frozen=True, slots=True)
class RuntimeConfig:
    """`[runtime]`: how programs share the machine."""

    policy: str = _key(
        str,
        "whose requests go first where programs meet",
        "fcfs",
        choices=("fcfs", "mlfq", "plas", "atlas", "remaining", "deadline", "fair"),
    )
    max_programs: int | None = _key(int, "most programs at a time, over all calls; absent: no limit", None, least=1)
    max_queued: int | None = _key(int, "most programs that wait for `max_programs`; more are refused", None, least=0)


@dataclass(frozen=True, slots=True)
class Config:
    """The whole configuration. `origins` says for each key (`llm.default.model`) where its value comes from."""

    llm: Mapping[str, LLMConfig] = field(default_factory=lambda: _EMPTY)
    index: Mapping[str, IndexConfig] = field(default_factory=lambda: _EMPTY)
    embedder: Mapping[str, EmbedderConfig] = field(default_factory=lambda: _EMPTY)
    reranker: Mapping[str, RerankerConfig] = field(default_factory=lambda: _EMPTY)
    run: RunConfig = field(default_factory=RunConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    path: Path | None = None  # the file that was read
    origins: Mapping[str, str] = field(default_factory=lambda: _EMPTY)

    @property
    def calibration_path(self) -> Path:
        """Where the measured rates of this machine are, or would be."""
        base = self.path.parent if self.path is not None else Path.cwd()
        return self.run.calibration or base / ".flowc" / "calibration.json"


_NAMED: dict[str, type] = {
    "llm": LLMConfig,
    "index": IndexConfig,
    "embedder": EmbedderConfig,
    "reranker": RerankerConfig,
}
_SECTIONS: dict[str, type] = {**_NAMED, "run": RunConfig, "runtime": RuntimeConfig}


@dataclass(frozen=True, slots=True)
class _Entry:
    """One value as it was written: `path` is `("llm", "default", "model")`."""

    path: tuple[str, ...]
    value: Any
    origin: str
    base: Path
    loc: Loc | None = None


def find_config(start: Path | str | None = None) -> Path | None:
    """The `flowc.toml`, or the `pyproject.toml` with a `[tool.flowc]`, of the nearest folder at or above `start`."""
    here = Path(start) if start is not None else Path.cwd()
    here = here.resolve()
    for folder in (here, *here.parents):
        if (folder / FILE).is_file():
            return folder / FILE
        project = folder / "pyproject.toml"
        if project.is_file() and "flowc" in _parse(project).get("tool", {}):
            return project
    return None


def load_config(
    start: Path | str | None = None,
    *,
    file: Path | str | None = None,
    environ: Mapping[str, str] | None = None,
    flags: Mapping[str, Any] | None = None,
) -> Config:
    """The configuration that holds in the folder `start` (default: the current one).

    `file` (or FLOWC_CONFIG) names the file instead of searching for it; `flags` is a nested mapping such as
    `{"run": {"opt": 3}}` and wins over everything. Raises ConfigError.
    """
    env = os.environ if environ is None else environ
    named = file if file is not None else env.get(f"{PREFIX}CONFIG")
    path = Path(named).resolve() if named else find_config(start)
    if named and path is not None and not path.is_file():
        raise ConfigError(f"the configuration file {named} does not exist", hint="FLOWC_CONFIG or --config names it")
    entries: list[_Entry] = []
    if path is not None:
        entries += _from_file(path)
    base = Path(start).resolve() if start is not None else Path.cwd()
    entries += _from_environment(env, base, [e.path for e in entries])
    entries += _flatten(flags or {}, "flag", base)
    return _build(entries, path)


# -- reading the three places


def _parse(path: Path) -> dict[str, Any]:
    import tomllib

    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from error
    try:
        return tomllib.loads(data.decode("utf-8"))
    except tomllib.TOMLDecodeError as error:
        found = re.search(r"^(.*?) \(at line (\d+), column (\d+)\)", str(error))
        text, line, col = (found[1], int(found[2]), int(found[3]) - 1) if found else (str(error), 0, 0)
        raise ConfigError(f"not valid TOML: {text}", loc=Loc(str(path), line, col, col + 1)) from None
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ConfigError("not valid UTF-8", loc=Loc(str(path), line)) from None


def _from_file(path: Path) -> list[_Entry]:
    table = _parse(path)
    root: tuple[str, ...] = ()
    if path.name == "pyproject.toml":
        table, root = table.get("tool", {}).get("flowc", {}), ("tool", "flowc")
    lines = _line_numbers(path.read_text(encoding="utf-8"))
    entries = []
    for entry in _flatten(table, path.name, path.parent):
        full = (*root, *entry.path)
        place = next((lines[full[:n]] for n in range(len(full), 0, -1) if full[:n] in lines), None)
        loc = Loc(str(path), *place) if place else Loc(str(path), 0)
        entries.append(
            _Entry(entry.path, entry.value, f"{path.name}:{place[0]}" if place else path.name, path.parent, loc)
        )
    return entries


_HEADER = re.compile(
    r"""^\s*\[\[?\s*((?:[A-Za-z0-9_-]+|"[^"]*"|'[^']*')(?:\s*\.\s*(?:[A-Za-z0-9_-]+|"[^"]*"|'[^']*'))*)\s*\]"""
)
_ASSIGN = re.compile(r"""^\s*((?:[A-Za-z0-9_-]+|"[^"]*"|'[^']*')(?:\s*\.\s*(?:[A-Za-z0-9_-]+|"[^"]*"|'[^']*'))*)\s*=""")
_PART = re.compile(r"""[A-Za-z0-9_-]+|"[^"]*"|'[^']*'""")


def _line_numbers(text: str) -> dict[tuple[str, ...], tuple[int, int, int]]:
    """Key path -> (line, first column, end column) of each key and table of a TOML text.

    tomllib keeps no positions. This reads headers and assignments that stand at the start of a line, which is how
    configuration is written; whatever it does not see is reported without a line.
    """
    places: dict[tuple[str, ...], tuple[int, int, int]] = {}
    prefix: tuple[str, ...] = ()
    for number, line in enumerate(text.splitlines(), 1):
        if header := _HEADER.match(line):
            prefix = tuple(p.strip("\"'") for p in _PART.findall(header[1]))
            places.setdefault(prefix, (number, header.start(1), header.end(1)))
        elif assign := _ASSIGN.match(line):
            path = (*prefix, *(p.strip("\"'") for p in _PART.findall(assign[1])))
            places.setdefault(path, (number, assign.start(1), assign.end(1)))
    return places


def _flatten(table: Mapping[str, Any], origin: str, base: Path, prefix: tuple[str, ...] = ()) -> list[_Entry]:
    """One entry per leaf. A `options` table is a leaf, and so is a table where a value should stand."""
    entries: list[_Entry] = []
    for key, value in table.items():
        path = (*prefix, str(key))
        depth = 3 if path[0] in _NAMED else 2  # where values stand
        if isinstance(value, Mapping) and len(path) < depth:
            entries += _flatten(value, origin, base, path)
            if not value:
                entries.append(_Entry(path, {}, origin, base))  # `[llm.default]` alone declares it
        elif value is not None or origin != "flag":
            entries.append(_Entry(path, value, origin, base))
    return entries


def _from_environment(env: Mapping[str, str], base: Path, known: Iterable[tuple[str, ...]]) -> list[_Entry]:
    names = {(p[0], _fold(p[1])): p[1] for p in known if len(p) > 1}
    entries: list[_Entry] = []
    for variable in sorted(env):
        section, found, rest = variable.removeprefix(PREFIX).partition("__")
        if not variable.startswith(PREFIX):
            continue
        if not found:
            head = next((s for s in _SECTIONS if section.lower().startswith(f"{s}_")), None)
            if head is None:
                continue  # FLOWC_CONFIG and the like: not a key of the configuration
            tail = section[len(head) + 1 :].lower()
            name = "NAME__KEY" if head in _NAMED else tail.upper()
            shown = f"{PREFIX}{head.upper()}__{name}"
            raise ConfigError(
                f"the environment variable {variable} is no key of the configuration",
                hint=f"two underscores stand between the parts: {shown}",
            )
        section = section.lower()
        if section not in _SECTIONS:
            raise ConfigError(
                f"the environment variable {variable} names no section of the configuration",
                hint=_meant(section, _SECTIONS, f"the sections are {', '.join(_SECTIONS)}"),
            )
        if section in _NAMED:
            name, found, key = rest.rpartition("__")
            if not found:
                raise ConfigError(
                    f"the environment variable {variable} names no key",
                    hint=f"write {PREFIX}{section.upper()}__NAME__KEY, as in {PREFIX}{section.upper()}__DEFAULT__"
                    f"{fields(_NAMED[section])[0].name.upper()}",
                )
            path: tuple[str, ...] = (section, names.get((section, _fold(name)), name.lower()), key.lower())
        else:
            path = (section, rest.lower())
        entries.append(_Entry(path, env[variable], f"environment {variable}", base))
    return entries


def _fold(name: str) -> str:
    return name.lower().replace("-", "_")


# -- checking and putting together


def _build(entries: Iterable[_Entry], path: Path | None) -> Config:
    tables: dict[tuple[str, ...], dict[str, Any]] = {}
    declared: dict[tuple[str, ...], _Entry] = {}
    origins: dict[str, str] = {}
    for entry in entries:
        section = entry.path[0]
        if section not in _SECTIONS:
            raise _error(
                f"unknown section `{section}`",
                entry,
                _meant(section, _SECTIONS, f"the sections are {', '.join(_SECTIONS)}"),
            )
        depth = 2 if section in _NAMED else 1
        where = entry.path[:depth]
        if len(entry.path) <= depth:  # a table without keys, or a value where a table should stand
            if entry.value != {}:
                shown = f"[{section}.NAME]" if section in _NAMED else f"[{section}]"
                raise _error(f"`{'.'.join(entry.path)}` is a table, not a value", entry, f"write a table {shown}")
            if len(entry.path) == depth:
                tables.setdefault(where, {})
                declared.setdefault(where, entry)
            continue
        key = entry.path[depth]
        known = {f.name: f for f in fields(_SECTIONS[section])}
        if key not in known:
            raise _error(
                f"unknown key `{key}` in [{'.'.join(where)}]",
                entry,
                _meant(key, known, f"its keys are {', '.join(known)}"),
            )
        tables.setdefault(where, {})[key] = _read_value(entry, known[key].metadata)
        declared.setdefault(where, entry)
        origins[".".join(entry.path)] = entry.origin
    named: dict[str, dict[str, Any]] = {section: {} for section in _NAMED}
    single: dict[str, Any] = {"run": RunConfig(), "runtime": RuntimeConfig()}
    for where, table in tables.items():
        kind = _SECTIONS[where[0]]
        for f in fields(kind):
            if f.default is MISSING and f.default_factory is MISSING and f.name not in table:
                raise _error(
                    f"[{'.'.join(where)}] has no `{f.name}`",
                    declared[where],
                    f"add `{f.name} = ...`: {f.metadata['doc']}",
                )
        if where[0] in _NAMED:
            named[where[0]][where[1]] = _checked(kind, table, declared[where])
        else:
            single[where[0]] = kind(**table)
    read_only: dict[str, Any] = {name: MappingProxyType(dict(sorted(tables.items()))) for name, tables in named.items()}
    return Config(**read_only, **single, path=path, origins=MappingProxyType(origins))


T = TypeVar("T")


def _checked(kind: type[T], table: Mapping[str, Any], entry: _Entry) -> T:
    if kind is LLMConfig and table.get("model") is not None and "backend" not in table:
        table = {**table, "backend": "engine"}
    made = kind(**table)
    if isinstance(made, RerankerConfig) and (made.model is None) == (made.llm is None):
        name = ".".join(entry.path[:2])
        which = "neither `model` nor `llm`" if made.model is None else "both `model` and `llm`"
        raise _error(f"[{name}] has {which}", entry, "say `model`, a cross-encoder's folder, or `llm`, a model's name")
    if isinstance(made, LLMConfig):
        name = ".".join(entry.path[:2])
        if made.backend in ("engine", "hf") and not made.model:
            raise _error(
                f"[{name}] has backend `{made.backend}` and no `model`",
                entry,
                'add `model = "..."`: a model folder or a hub id',
            )
        if made.backend in ("replay", "record") and made.recording is None:
            raise _error(
                f"[{name}] has backend `{made.backend}` and no `recording`", entry, 'add `recording = "calls.jsonl"`'
            )
    return made


_WANTED = {
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    Path: "a path",
    dict: "a table",
}


def _read_value(entry: _Entry, meta: Mapping[str, Any]) -> Any:
    """The entry's value, checked; texts from the environment are converted, relative paths completed."""
    kind: type = meta["kind"]
    name = ".".join(entry.path)
    value = _converted(entry, kind)
    accepted: Any = (str, Path) if kind is Path else kind
    if not isinstance(value, accepted) or (type(value) is bool) != (kind is bool):  # True is no whole number
        raise _error(f"`{name}` takes {_WANTED[kind]}, not {entry.value!r}", entry, meta["doc"])
    if kind is dict:
        for key, item in value.items():
            if not isinstance(item, str | int | float | bool):
                message = f"`{name}.{key}` takes a text, a number or true or false, not {item!r}"
                raise _error(message, entry, meta["doc"])
        return MappingProxyType(dict(value))
    choices, least = meta["choices"], meta["least"]
    if choices and value not in choices:
        known = [str(choice) for choice in choices]
        raise _error(
            f"`{name}` cannot be {value!r}", entry, _meant(str(value), known, f"it is one of {', '.join(known)}")
        )
    if least is not None and not value >= least:  # NaN too
        raise _error(f"`{name}` cannot be {value!r}", entry, f"it is at least {least}")
    if kind is Path:
        return (entry.base / Path(value).expanduser()).resolve()
    if entry.path[-1] == "model" and value:
        # A folder if there is one, seen from the file that names it, not from where the command runs; else a hub id.
        folder = entry.base / Path(value).expanduser()
        if folder.exists() or value.startswith((".", "~", "/")):
            return str(folder.resolve())
    return value


def _converted(entry: _Entry, kind: type) -> Any:
    """The value in the wanted type where its text, or a whole number, says one; else as it is."""
    value: Any = entry.value
    if kind is float and type(value) is int:
        return float(value)
    if not entry.origin.startswith("environment") or not isinstance(value, str):
        return value
    import tomllib

    try:
        if kind in (int, float):
            return kind(value)
        if kind is bool:
            return {"true": True, "1": True, "false": False, "0": False}[value.lower()]
        if kind is dict:
            return tomllib.loads(f"v = {value}")["v"]
    except (ValueError, KeyError):
        pass
    return value


def _error(message: str, entry: _Entry, hint: str | None) -> ConfigError:
    if entry.loc is not None:
        return ConfigError(message, loc=entry.loc, hint=hint)
    return ConfigError(f"{message} (from the {entry.origin})", hint=hint)


def _meant(word: str, known: Iterable[str], otherwise: str) -> str:
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"did you mean `{close[0]}`?" if close else otherwise

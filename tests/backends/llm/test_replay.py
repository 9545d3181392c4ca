"""Record and replay, the scripted double, the factory, and what all backends share."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowc.backends.llm.common import StopFilter, plain_chat, word_pieces
from flowc.backends.llm.factory import BACKENDS, open_llm
from flowc.backends.llm.reader import ReaderBackend
from flowc.backends.llm.replay import RecordingBackend, ReplayBackend
from flowc.backends.llm.scripted import ScriptedBackend
from flowc.ir.errors import ConfigError, InputError, ReplayMismatch, ResourceError, RunError
from flowc.runtime.protocols import ChooseRequest, GenerateRequest, Generation, IsCancelled, LLMBackend, OnText


def texts(results: Sequence[Generation | Exception]) -> list[str]:
    out = []
    for result in results:
        assert isinstance(result, Generation), result
        out.append(result.text)
    return out


# Record and replay


def test_round_trip_with_odd_text(tmp_path: Path) -> None:
    answers: dict[str, str | Exception] = {
        "plain": "two words",
        "lone \ud83d surrogate": "high \ud800 low \udfff end",
        "lines\r\n\u2028\u0085": 'a\nb\u2028c\u0085d\x00\x1f\\ "q"',
        "emoji 🚲": "🚲" * 3,
        "empty": "",
        "fails": ResourceError("too long", code="F068", hint="shorten"),
        "odd failure": KeyError("what"),
    }
    path = tmp_path / "deep" / "calls.jsonl"
    recorder = RecordingBackend(ScriptedBackend(answers, choose=lambda p: "no"), path)
    assert isinstance(recorder, LLMBackend)
    requests = [GenerateRequest(p, max_tokens=99, stop=("END",), seed=7) for p in answers]
    live = recorder.generate(requests)
    chosen = recorder.choose([ChooseRequest("plain", ("yes", "no")), ChooseRequest("x", ("a", "b"))])
    assert path.read_bytes().count(b"\n") == len(answers) + 2, "every call is on disk before the recorder closes"
    assert path.read_bytes().isascii()
    recorder.close()

    replay = ReplayBackend(path)
    assert isinstance(replay, LLMBackend)
    assert replay.kind == "replay"
    said: dict[int, str] = {}
    again = replay.generate(requests[::-1], lambda i, piece: said.update({i: said.get(i, "") + piece}))[::-1]
    assert list(again[:5]) == list(live[:5])
    assert [said.get(6 - i, "") for i in range(5)] == texts(live[:5])
    failed = again[5]
    assert isinstance(failed, ResourceError)
    assert (failed.code, failed.message, failed.hint) == ("F068", "too long", "shorten")
    assert isinstance(again[6], RunError)
    assert "KeyError" in str(again[6])
    assert replay.choose([ChooseRequest("plain", ("yes", "no"))]) == [1] == list(chosen[:1])
    assert isinstance(replay.choose([ChooseRequest("x", ("a", "b"))])[0], RunError)


def test_what_few_requests_ask_for_is_part_of_a_call(tmp_path: Path) -> None:
    class Sure(ScriptedBackend):
        def generate(
            self,
            requests: Sequence[GenerateRequest],
            on_text: OnText | None = None,
            is_cancelled: IsCancelled | None = None,
        ) -> Sequence[Generation | Exception]:
            return [
                Generation(f"{r.min_p} {r.schema}", logprobs=(-0.5, -1.0) if r.logprobs else None) for r in requests
            ]

    requests = [
        GenerateRequest("p"),
        GenerateRequest("p", min_p=0.1),
        GenerateRequest("p", schema='{"type": "object"}'),
        GenerateRequest("p", logprobs=True),
    ]
    with_rare = tmp_path / "calls.jsonl"
    recorder = RecordingBackend(Sure({}), with_rare)
    live = recorder.generate(requests)
    recorder.close()
    assert "min_p" not in with_rare.read_text().splitlines()[0], "older recordings stay readable"
    assert list(ReplayBackend(with_rare).generate(requests[::-1]))[::-1] == list(live)


@given(st.text(st.characters(codec=None), max_size=30), st.text(st.characters(codec=None), max_size=30))
def test_any_text_comes_back(tmp_path_factory: pytest.TempPathFactory, prompt: str, answer: str) -> None:
    path = tmp_path_factory.mktemp("calls") / "calls.jsonl"
    recorder = RecordingBackend(ScriptedBackend(lambda _: answer), path)
    recorder.generate([GenerateRequest(prompt)])
    recorder.close()
    # A high surrogate right before a low one is one character in JSON; any other text comes back as it was.
    joined = json.loads(json.dumps(answer))
    assert texts(ReplayBackend(path).generate([GenerateRequest(prompt)])) == [joined]


def test_repeated_requests_are_answered_in_recorded_order(tmp_path: Path) -> None:
    path, count = tmp_path / "calls.jsonl", iter(range(9))
    recorder = RecordingBackend(ScriptedBackend(lambda _: f"answer {next(count)}"), path)
    for _ in range(3):
        recorder.generate([GenerateRequest("same")])
    recorder.close()
    replay = ReplayBackend(path)
    assert texts(replay.generate([GenerateRequest("same")] * 2)) == ["answer 0", "answer 1"]
    assert texts(replay.generate([GenerateRequest("same", timeout_s=3.0)] * 3)) == ["answer 2"] * 3
    appended = RecordingBackend(ScriptedBackend({"same": "later"}), path)
    appended.generate([GenerateRequest("same")])
    appended.close()
    assert texts(ReplayBackend(path).generate([GenerateRequest("same")] * 5))[3:] == ["later", "later"]


def test_unknown_calls_name_the_nearest_recorded_prompt(tmp_path: Path) -> None:
    path = tmp_path / "calls.jsonl"
    recorder = RecordingBackend(ScriptedBackend(lambda p: "x"), path)
    context = "Context:\n[1] Sorting: use sorted().\n\n"
    prompts = [f"{context}Question: how do I sort a {what}?" for what in ("list", "tuple", "dict")] + ["Say hello"]
    recorder.generate([GenerateRequest(p) for p in prompts])
    recorder.close()
    replay = ReplayBackend(path)
    good, bad, parameter = replay.generate(
        [
            GenerateRequest(prompts[0]),
            GenerateRequest(f"{context}Question: how do I sort a tuple, please?"),
            GenerateRequest("Say hello", max_tokens=7),
        ]
    )
    assert isinstance(good, Generation), "an unknown neighbour takes nothing with it"
    assert isinstance(bad, ReplayMismatch)
    assert bad.code == "F073"
    assert "differs from line 4" in bad.message
    assert "sort a tuple?" in bad.message
    assert "sort a tuple, please" in bad.message
    assert isinstance(parameter, ReplayMismatch)
    assert "max_tokens=256 recorded, 7 asked" in parameter.message
    chosen = replay.choose([ChooseRequest("Say hello", ("a", "b"))])[0]
    assert isinstance(chosen, ReplayMismatch)
    assert "no choose call" in chosen.message
    assert isinstance(replay.generate([GenerateRequest("\ud800")])[0], ReplayMismatch)


LINE = '{"call": "generate", "request": {"prompt": "p", "max_tokens": 5}, "result": {"text": "t"}}'


@pytest.mark.parametrize(
    "bad",
    [
        LINE[:40],
        "[]",
        "{}",
        '{"call": "sing", "request": {"prompt": "p"}, "result": {"text": "t"}}',
        '{"call": "generate", "request": {"prompt": 3}, "result": {"text": "t"}}',
        '{"call": "generate", "request": {"prompt": "p"}, "result": {"tex": "t"}}',
        '{"call": "generate", "request": {"prompt": "p"}, "result": {"text": 4}}',
        '{"call": "generate", "request": {"prompt": "p"}}',
        '{"call": "choose", "request": {"prompt": "p", "options": ["a"]}, "result": 1}',
        "\udcff",
    ],
)
def test_malformed_lines_are_named(tmp_path: Path, bad: str) -> None:
    path = tmp_path / "calls.jsonl"
    path.write_bytes(f"{LINE}\n\n{bad}\n{LINE}\n".encode("utf-8", "surrogateescape"))
    with pytest.raises(InputError) as caught:
        ReplayBackend(path)
    assert "line 3" in caught.value.message
    assert caught.value.hint


def test_a_recording_that_broke_off_is_kept_apart(tmp_path: Path) -> None:
    path = tmp_path / "calls.jsonl"
    path.write_text(LINE + "\n" + LINE[:30])
    recorder = RecordingBackend(ScriptedBackend({"new": "text"}), path)
    recorder.generate([GenerateRequest("new")])
    recorder.close()
    lines = path.read_text().splitlines()
    assert lines[1] == LINE[:30]
    assert json.loads(lines[2])["result"]["text"] == "text"


def test_files_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match=r"nothing\.jsonl"):
        ReplayBackend(tmp_path / "nothing.jsonl")
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError):
        RecordingBackend(ReaderBackend(), tmp_path / "file" / "calls.jsonl")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_loses_no_answer() -> None:
    recorder = RecordingBackend(ScriptedBackend({"p": "answer"}), "/dev/full")
    assert texts(recorder.generate([GenerateRequest("p")])) == ["answer"]
    with pytest.raises(ResourceError, match="incomplete"):
        recorder.close()


def test_cancelled_calls_are_not_recorded(tmp_path: Path) -> None:
    path = tmp_path / "calls.jsonl"
    recorder = RecordingBackend(ScriptedBackend(lambda p: "some words here"), path)
    results = recorder.generate([GenerateRequest("a"), GenerateRequest("b")], None, lambda i: i == 0)
    recorder.close()
    assert [r.finish_reason for r in results if isinstance(r, Generation)] == ["cancelled", "stop"]
    assert [json.loads(line)["request"]["prompt"] for line in path.read_text().splitlines()] == ["b"]


# The scripted double


def test_scripted_answers_errors_and_batches() -> None:
    def script(prompt: str) -> str | Exception:
        if prompt == "raise":
            raise ValueError("raised")
        return KeyError("returned") if prompt == "return" else prompt.upper()

    llm = ScriptedBackend(script, max_batch=3)
    assert isinstance(llm, LLMBackend)
    results = llm.generate([GenerateRequest("raise"), GenerateRequest("ok"), GenerateRequest("return")])
    assert isinstance(results[0], ValueError)
    assert isinstance(results[2], KeyError)
    assert texts(results[1:2]) == ["OK"]
    limited = llm.generate([GenerateRequest("one two, three", max_tokens=3), GenerateRequest("a b", stop=(" B",))])
    assert [(r.text, r.finish_reason) for r in limited if isinstance(r, Generation)] == [
        ("ONE TWO,", "length"),
        ("A", "stop"),
    ]
    assert llm.batches == [3, 2]
    assert [c.prompt for c in llm.calls[:2]] == ["raise", "ok"]
    missing = ScriptedBackend({"a": "b"}).generate([GenerateRequest("c"), GenerateRequest("a")])
    assert isinstance(missing[0], RunError)
    assert texts(missing[1:]) == ["b"]


def test_scripted_choices() -> None:
    llm = ScriptedBackend(lambda p: "no, never", choose={"p": "b", "q": "z"})
    results = llm.choose([ChooseRequest("p", ("a", " b")), ChooseRequest("q", ("a", "b")), ChooseRequest("p", ())])
    assert results[0] == 1
    assert isinstance(results[1], RunError)
    assert isinstance(results[2], InputError)
    assert ScriptedBackend(lambda p: "no, never").choose([ChooseRequest("p", ("yes", "no"))]) == [1]


# The factory


def test_the_factory_opens_by_name(tmp_path: Path) -> None:
    assert isinstance(open_llm(), ReaderBackend)
    path = tmp_path / "calls.jsonl"
    recorder = open_llm("record", path=path, inner="reader", name="mine")
    assert recorder.name == "mine"
    recorder.generate([GenerateRequest("Hello")])
    recorder.close()
    assert texts(open_llm("replay", path=path, max_batch=2).generate([GenerateRequest("Hello")])) == ["Hello."]


def test_the_factory_explains_mistakes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'reader'"):
        open_llm("raeder")
    with pytest.raises(ConfigError, match="there are: reader, engine, hf, replay, record"):
        open_llm("gpt-17")
    with pytest.raises(ConfigError, match="did you mean 'max_batch'"):
        open_llm("reader", max_bach=3)
    with pytest.raises(ConfigError, match="needs the option 'path'"):
        open_llm("record")
    with pytest.raises(ConfigError, match="needs the option 'path'"):
        open_llm("replay")
    with pytest.raises(ConfigError, match="no LLM backend 'zebra'"):
        open_llm("record", path=tmp_path / "x", inner="zebra")
    assert not (tmp_path / "x").exists()


@pytest.mark.models
@pytest.mark.parametrize("backend", ["engine", "hf"])
def test_the_factory_checks_the_options_of_models(backend: str) -> None:
    with pytest.raises(ConfigError, match="needs the option 'model'"):
        open_llm(backend)
    with pytest.raises(ConfigError, match="did you mean 'dtype'"):
        open_llm(backend, model="m", dtyp="float32")


def test_a_missing_library_is_named(root: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from flowc.backends.llm.factory import open_llm\nfrom flowc.ir.errors import ConfigError\n"
        "try:\n    open_llm('hf', model='x')\nexcept ConfigError as e:\n    print(e)"
    )
    env = {"PYTHONPATH": str(root / "src")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert "torch" in done.stdout
    assert "flowc[local]" in done.stdout


def test_nothing_heavy_is_imported(root: Path) -> None:
    modules = ", ".join(f"flowc.backends.llm.{m}" for m in ("factory", "reader", "replay", "scripted", "common"))
    code = (
        f"import sys, {modules}; print(sorted({{'torch', 'transformers', 'numpy', 'tokenizers'}} & set(sys.modules)))"
    )
    env = {"PYTHONPATH": str(root / "src")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert done.stdout.strip() == "[]"
    assert set(BACKENDS) == {"reader", "engine", "hf", "replay", "record"}


# What all share


def until_first_stop(text: str, stops: Sequence[str]) -> str:
    """The specification: the text before the stop string that is complete first."""
    for end in range(len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return text[: end - len(stop)]
    return text


@given(st.lists(st.text("ab", max_size=4), max_size=12), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_stop_filter_by_characters_meets_its_specification(pieces: list[str], stops: list[str]) -> None:
    text = "".join(pieces)
    filtered = StopFilter(stops)
    shown = ""
    for character in text:
        shown += filtered.push(character)
        assert not any(stop in shown for stop in stops)
    shown += filtered.flush()
    assert shown == until_first_stop(text, stops)
    assert (filtered.matched is not None) == any(stop in text for stop in stops)


@given(st.lists(st.text("ab", max_size=4), max_size=12), st.text("ab", min_size=1, max_size=4))
def test_stop_filter_by_pieces_finds_the_first_occurrence(pieces: list[str], stop: str) -> None:
    text = "".join(pieces)
    filtered = StopFilter((stop,))
    shown = "".join(filtered.push(piece) for piece in pieces) + filtered.flush()
    assert shown == (text[: text.find(stop)] if stop in text else text)


@given(st.text(max_size=40))
def test_word_pieces_concatenate(text: str) -> None:
    assert "".join(word_pieces(text)) == text


def test_plain_chat() -> None:
    assert plain_chat([]) == "Assistant:"
    assert ReaderBackend().render_chat([{"role": "user", "content": "Hi"}]) == "User: Hi\n\nAssistant:"

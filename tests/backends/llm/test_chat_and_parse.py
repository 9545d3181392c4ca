"""`llm.chat` and `llm.parse` from a workflow down to a local model: compiled, and as plain Python runs them."""

from __future__ import annotations

import json
import pickle
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pytest
from pydantic import BaseModel, Field

pytest.importorskip("torch")
pytest.importorskip("llguidance")

from flowc import LLM, RunError, workflow
from flowc.dsl.resources import chat_prompt
from flowc.engine import bind, shutdown
from flowc.ir.errors import ResourceError
from flowc.ir.values import Conversation
from flowc.runtime.protocols import GenerateRequest, Generation

if TYPE_CHECKING:
    from flowc.backends.llm.hf import HFBackend
    from flowc.backends.llm.local import LocalBackend

pytestmark = pytest.mark.models
llm = LLM("tiny")
TURNS = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is a list?"}]


class Verdict(BaseModel):
    grade: Literal["good", "bad", "unclear"]
    marks: list[int] = Field(max_length=2)


class Essay(BaseModel):
    text: str


@workflow
def judge(answer: str) -> Any:
    return llm.parse(f"Judge this answer: {answer}\n", Verdict, max_tokens=60)


@workflow
def ramble(topic: str) -> Any:
    return llm.parse(f"Write about {topic}\n", Essay, max_tokens=12)


@workflow
def talk(question: str) -> str:
    first = llm.chat([{"role": "user", "content": question}], max_tokens=6)
    return llm.chat([{"role": "user", "content": question}, {"role": "assistant", "content": first}], max_tokens=6)


@pytest.fixture
def bound(either: LocalBackend) -> Iterator[LocalBackend]:
    class Kept:  # the engine closes what it was given; this backend serves the next test too
        def __getattr__(self, name: str) -> Any:
            return getattr(either, name)

        def close(self) -> None:
            pass

    shutdown()
    bind(llm={"tiny": Kept()})
    yield either
    shutdown()


def test_parse_gives_an_object(bound: LocalBackend) -> None:
    for answer in ("yes", "no, or rather perhaps"):
        found = judge(answer)
        assert isinstance(found, Verdict)
        assert found == judge.eager(answer)


def test_an_object_that_does_not_fit_is_named(bound: LocalBackend) -> None:
    for run in (ramble, ramble.eager):
        with pytest.raises(RunError, match="cut off after 12 tokens") as told:
            run("clouds")
        assert "raise max_tokens (it was 12)" in str(told.value.hint)
        assert "Essay" in str(told.value.hint)


def test_a_conversation_is_written_by_the_models_template(bound: LocalBackend) -> None:
    said = talk("What is a tuple?")
    assert said == talk.eager("What is a tuple?")
    rendered = bound.render_chat(TURNS)
    assert rendered.startswith("<|im_start|>system\nBe brief.<|im_end|>")
    plain = str(chat_prompt(TURNS))
    assert bound.count_tokens(chat_prompt(TURNS)) == bound.count_tokens(rendered) != bound.count_tokens(plain)
    asked = [GenerateRequest(p, max_tokens=8) for p in (chat_prompt(TURNS), rendered, plain)]
    conversation, written, other = bound.generate(asked)
    assert conversation == written != other


def with_template(folder: Path, to: Path, template: str | None) -> HFBackend:
    from flowc.backends.llm.hf import HFBackend

    shutil.copytree(folder, to)
    settings = json.loads((to / "tokenizer_config.json").read_text())
    settings["chat_template"] = template
    (to / "tokenizer_config.json").write_text(json.dumps({n: v for n, v in settings.items() if v is not None}))
    return HFBackend(to, device="cpu")


def test_without_a_template_a_conversation_is_its_text(folder: Path, tmp_path: Path) -> None:
    backend = with_template(folder, tmp_path / "plain", None)
    asked = [GenerateRequest(p, max_tokens=8) for p in (chat_prompt(TURNS), str(chat_prompt(TURNS)))]
    conversation, text = backend.generate(asked)
    assert conversation == text


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no system message, please') }}",
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
    ],
)
def test_a_template_is_confined_and_fails_its_own_request(folder: Path, tmp_path: Path, template: str) -> None:
    backend = with_template(folder, tmp_path / "odd", template)
    bad, good = backend.generate(
        [GenerateRequest(chat_prompt(TURNS), max_tokens=4), GenerateRequest("Hi", max_tokens=4)]
    )
    assert isinstance(bad, ResourceError)
    assert bad.code == "F066"
    assert isinstance(good, Generation)


OWN_CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
Path({mark!r}).touch()
class MineConfig(LlamaConfig):
    model_type = "mine"
class Mine(LlamaForCausalLM):
    config_class = MineConfig
"""


def test_a_models_own_code_runs_only_when_asked(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flowc.backends.llm.hf import HFBackend

    for module in ("transformers.dynamic_module_utils", "transformers.utils.hub"):
        monkeypatch.setattr(f"{module}.HF_MODULES_CACHE", str(tmp_path / "modules"), raising=False)
    monkeypatch.setattr(sys, "path", [*sys.path])
    own, mark = shutil.copytree(folder, tmp_path / "own"), tmp_path / "ran"
    config = json.loads((own / "config.json").read_text())
    code = {"AutoConfig": "mine.MineConfig", "AutoModelForCausalLM": "mine.Mine"}
    config |= {"model_type": "mine", "architectures": ["MineForCausalLM"], "auto_map": code}
    (own / "config.json").write_text(json.dumps(config))
    (own / "mine.py").write_text(OWN_CODE.format(mark=str(mark)))
    with pytest.raises(ResourceError) as told:
        HFBackend(own, device="cpu")
    assert told.value.code == "F065"
    assert not mark.exists()
    asked = [GenerateRequest("What is a list?", max_tokens=6)]
    assert list(HFBackend(own, device="cpu", trust_remote_code=True).generate(asked)) == list(
        HFBackend(folder, device="cpu").generate(asked)
    )
    assert mark.exists()


def test_a_conversation_stays_one_when_it_is_copied() -> None:
    made = chat_prompt(iter(TURNS))
    again = pickle.loads(pickle.dumps(made))
    assert isinstance(again, Conversation)
    assert again == made == "system: Be brief.\n\nuser: What is a list?\n\nassistant:"
    assert again.messages == made.messages == tuple(TURNS)

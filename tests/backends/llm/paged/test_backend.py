"""The engine as a backend: the answers of `HFBackend`, calls side by side, errors, cancellation, models it refuses."""

from __future__ import annotations

import shutil
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from flowc.backends.llm.factory import open_llm  # noqa: E402
from flowc.backends.llm.hf import HFBackend  # noqa: E402
from flowc.backends.llm.local import LocalModel  # noqa: E402
from flowc.backends.llm.paged.backend import PagedBackend  # noqa: E402
from flowc.backends.llm.paged.packed import PackedLinear, copies_fit, pack_linears  # noqa: E402
from flowc.ir.errors import NodeTimeoutError, ResourceError  # noqa: E402
from flowc.runtime.protocols import ChooseRequest, GenerateRequest, Generation, LLMBackend, PrefixCache, Ticket  # noqa: E402

pytestmark = pytest.mark.models
PROMPTS = [
    "What is a generator?",
    "Hi",
    "Context:\n[1] Sorting: Use sorted() to get a new list.\n" * 6 + "Question: how do I sort?\nAnswer:",
    "naïve café – 東京 🚲",
    "def f(x):\n    return x + 1\n",
]


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[PagedBackend]:
    backend = PagedBackend(folder, device="cpu", threads=1)
    yield backend
    backend.close()


@pytest.fixture(scope="module")
def plain(folder: Path) -> Iterator[HFBackend]:
    backend = HFBackend(folder, device="cpu")
    yield backend
    backend.close()


def texts(results: Any) -> list[str]:
    assert all(isinstance(r, Generation) for r in results), results
    return [r.text for r in results]


def requests() -> list[GenerateRequest]:
    """Greedy and sampled rows of all kinds, that share steps."""
    kinds: list[dict[str, Any]] = [
        {},
        {"temperature": 1.0, "seed": 3},
        {"temperature": 1.5, "top_p": 0.7, "seed": 4},
        {"temperature": 0.7, "top_k": 5, "seed": 5},
        {"stop": ("e",)},
    ]
    return [GenerateRequest(p, max_tokens=20, **kind) for p in PROMPTS for kind in kinds]


def test_answers_are_those_of_the_padded_backend(llm: PagedBackend, plain: HFBackend) -> None:
    assert isinstance(llm, LLMBackend)
    said: dict[int, list[str]] = {}
    got = llm.generate(requests(), on_text=lambda item, piece: said.setdefault(item, []).append(piece))
    assert list(got) == list(plain.generate(requests()))
    assert ["".join(said.get(i, [])) for i in range(len(got))] == texts(got)
    assert len(set(texts(got))) > 10


def test_choices_are_those_of_the_padded_backend(llm: PagedBackend, plain: HFBackend) -> None:
    options = ((" yes", " no"), ("A", "B", "C"), (" generator", " function that returns", " iterator of all", " x"))
    asked = [ChooseRequest(p, o) for p in PROMPTS for o in options]
    asked.insert(2, ChooseRequest("word " * 600, (" yes", " no")))
    got, expected = llm.choose(asked), plain.choose(asked)
    assert isinstance(got[2], ResourceError)
    assert got[2].code == "F068"
    assert [g for i, g in enumerate(got) if i != 2] == [e for i, e in enumerate(expected) if i != 2]
    before = llm.engine.stats.decode_tokens
    llm.choose([ChooseRequest("A judge: ", (" yes", " no"))])
    assert llm.engine.stats.decode_tokens == before


def test_calls_from_many_threads_share_steps_and_a_short_one_is_answered_first(llm: PagedBackend) -> None:
    ended: list[str] = []
    started = threading.Event()

    def long() -> None:
        llm.generate([GenerateRequest("Hi", max_tokens=200, temperature=1.0, seed=1)], on_text=lambda *_: started.set())
        ended.append("long")

    thread = threading.Thread(target=long)
    thread.start()
    assert started.wait(30)
    llm.generate([GenerateRequest("What", max_tokens=2)])
    ended.append("short")
    thread.join(60)
    assert ended == ["short", "long"]


def test_cancellation_and_time_limits_end_one_row_and_free_its_blocks(llm: PagedBackend) -> None:
    heard = 0

    def on_text(item: int, piece: str) -> None:
        nonlocal heard
        heard += item == 0

    got = llm.generate(
        [
            GenerateRequest("Hi", max_tokens=300, temperature=1.0, seed=2),
            GenerateRequest("Hi", max_tokens=300, temperature=1.0, seed=7, timeout_s=0.0),
            GenerateRequest("Hi", max_tokens=5),
        ],
        on_text,
        lambda item: item == 0 and heard >= 3,
    )
    assert isinstance(got[0], Generation)
    assert got[0].finish_reason == "cancelled"
    assert isinstance(got[1], NodeTimeoutError)
    assert isinstance(got[2], Generation)
    assert llm.engine.pool.free + llm.engine.tree.size == llm.engine.pool.usable


def test_a_listener_that_fails_fails_its_own_item(llm: PagedBackend) -> None:
    def on_text(item: int, piece: str) -> None:
        if item == 0:
            raise KeyError("mine")

    got = llm.generate([GenerateRequest("Hi", max_tokens=4), GenerateRequest("What", max_tokens=4)], on_text)
    assert isinstance(got[0], KeyError)
    assert isinstance(got[1], Generation)


def test_what_the_cache_cannot_hold_is_said(folder: Path) -> None:
    backend = PagedBackend(folder, device="cpu", kv_blocks=6, block_size=4)
    got = backend.generate([GenerateRequest("word " * 100), GenerateRequest("Hi", max_tokens=3)])
    assert isinstance(got[0], ResourceError)
    assert got[0].code == "F069"
    assert isinstance(got[1], Generation)
    backend.close()


def test_closing_ends_calls_in_flight(folder: Path) -> None:
    backend = PagedBackend(folder, device="cpu")
    started = threading.Event()
    got: list[Generation | Exception] = []

    def call() -> None:
        got.extend(
            backend.generate([GenerateRequest("Hi", max_tokens=400, temperature=1.0)], on_text=lambda *_: started.set())
        )

    thread = threading.Thread(target=call)
    thread.start()
    assert started.wait(30)
    backend.close()
    thread.join(30)
    assert isinstance(got[0], ResourceError)
    with pytest.raises(ResourceError, match="closed"):
        backend.generate([GenerateRequest("Hi")])


def test_a_model_that_the_engine_refuses_runs_plainly_and_the_user_is_told(folder: Path, tmp_path: Path) -> None:
    size = {"vocab_size": 4096, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(7)
    config = transformers.BloomConfig(**size, eos_token_id=0, bos_token_id=0, pad_token_id=3)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / name, tmp_path)
    with pytest.warns(UserWarning, match="plain generation") as told:
        backend = open_llm("engine", model=tmp_path, device="cpu")
    assert len(told) == 1
    assert isinstance(backend, HFBackend)
    assert "ALiBi" in str(backend.info().detail["not_on_the_engine"])
    reference = HFBackend(tmp_path, device="cpu")
    asked = [GenerateRequest(p, max_tokens=8) for p in PROMPTS]
    assert list(backend.generate(asked)) == list(reference.generate(asked))


def test_a_model_that_fails_the_probe_is_left_as_it_was(folder: Path) -> None:
    local = LocalModel(folder, device="cpu")
    before = local.model.config._attn_implementation
    local.model.model.layers[1].self_attn.layer_idx = 0  # two layers that call themselves one
    with pytest.raises(ResourceError, match="1 of its 2 layers"):
        PagedBackend(local)
    assert local.model.config._attn_implementation == before


def test_announced_prompts_stay_and_come_back_from_the_host(folder: Path, plain: HFBackend) -> None:
    backend = PagedBackend(folder, device="cpu", kv_blocks=26, block_size=4, max_sequences=2, host_blocks=200)
    system = "You are a careful reviewer of Python code. Answer in one word. "
    asked = [GenerateRequest(f"{system}{p}"[:150], max_tokens=6) for p in PROMPTS]
    expected = list(plain.generate(asked))
    backend.hint(("program", "agent"), system, 0)
    backend.pin(system, 5.0)
    for _ in range(3):
        assert [backend.generate([a])[0] for a in asked] == expected
    backend.release(("program", "agent"))
    detail = backend.info().detail
    assert detail["reused_tokens"] > detail["prefill_tokens"]
    backend.close()
    with pytest.raises(ResourceError, match="unknown policy"):
        PagedBackend(folder, policy="fifo")


def test_a_prefix_is_computed_before_its_prompt_is_known(folder: Path, plain: HFBackend) -> None:
    backend = PagedBackend(folder, device="cpu", block_size=4)
    assert isinstance(backend, PrefixCache)
    system = "You are a careful reviewer of Python code. Answer in one wor"  # cut otherwise than in the whole prompt
    asked = GenerateRequest(f"{system}d. {PROMPTS[0]}", max_tokens=6, ticket=Ticket(1, 2.0))
    backend.prefill("site", system, Ticket(1))
    whole = len(backend.local.encode(system)) // 4 * 4
    deadline = time.monotonic() + 30
    while backend.engine.stats.prefill_tokens < whole and time.monotonic() < deadline:
        time.sleep(0.001)
    assert list(backend.generate([asked])) == list(plain.generate([asked]))
    assert 0 < backend.engine.stats.reused_tokens <= whole
    backend.release("site")
    backend.prefill("", "")
    backend.close()
    for advise in (backend.prefill, lambda key, text: backend.hint(key, text, 1), lambda _, text: backend.pin(text, 1)):
        advise("late", system)
    backend.release("late")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_packed_layers_give_what_plain_ones_give(folder: Path, dtype: str) -> None:
    local = LocalModel(folder, dtype, device="cpu")
    ids = torch.tensor([local.encode(PROMPTS[2])])
    with torch.inference_mode():
        plain = local.model(input_ids=ids).logits, local.model(input_ids=ids[:, :1]).logits
        assert copies_fit(local.model)
        count = pack_linears(local.model, least_weights=1024)
        assert count == len([m for m in local.model.modules() if isinstance(m, PackedLinear)]) > 4
        packed = local.model(input_ids=ids).logits, local.model(input_ids=ids[:, :1]).logits
    tolerance = 1e-4 if dtype == "float32" else 0.1
    for before, after in zip(plain, packed, strict=True):
        torch.testing.assert_close(after, before, atol=tolerance, rtol=tolerance)
    assert pack_linears(local.model, least_weights=0) == 0, "what is packed stays as it is"


def test_packing_can_be_chosen(folder: Path, llm: PagedBackend) -> None:
    assert llm.packed_layers > 0
    backend = PagedBackend(folder, device="cpu", pack=False)
    assert backend.info().detail["packed_layers"] == 0
    assert list(backend.generate(requests()[:5])) == list(llm.generate(requests()[:5]))
    backend.close()


def test_the_engine_is_what_the_factory_opens(folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backend = open_llm("engine", model=folder, device="cpu", max_step_tokens=32)
    assert isinstance(backend, PagedBackend)
    assert backend.info().detail["kv_tokens"] == backend.engine.capacity_tokens > 1000
    backend.close()

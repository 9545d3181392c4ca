"""The Hugging Face backend against transformers itself, on a tiny model with random weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from flowc.ir.errors import InputError, NodeTimeoutError, ResourceError
from flowc.runtime.protocols import ChooseRequest, GenerateRequest, Generation, LLMBackend

pytestmark = pytest.mark.models
pytest.importorskip("torch")
pytest.importorskip("transformers")

if TYPE_CHECKING:
    from flowc.backends.llm.hf import HFBackend

PROMPTS = [
    "What is a generator?",
    "Hi",
    "Context:\n[1] Sorting: Use sorted() to get a new list.\n" * 6 + "Question: how do I sort?\nAnswer:",
    "The quick brown fox jumps over the lazy dog, and then it does so once more. " * 3,
    "naïve café – 東京 🚲",
    "def f(x):\n    return x + 1\n",
    "What is a generator?",
]


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[HFBackend]:
    from flowc.backends.llm.hf import HFBackend

    backend = HFBackend(folder, device="cpu", threads=1)
    yield backend
    backend.close()


@pytest.fixture(scope="module")
def reference(folder: Path) -> tuple[Any, Any]:
    """The same folder through transformers alone: (model, tokenizer)."""
    import transformers

    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    return model, transformers.AutoTokenizer.from_pretrained(folder)


def one_by_one(reference: tuple[Any, Any], prompt: str, max_tokens: int) -> tuple[str, int]:
    """Text and number of new tokens of plain greedy `model.generate`."""
    import torch

    model, tokenizer = reference
    inputs = tokenizer(prompt, return_tensors="pt")
    with torch.inference_mode():
        out = model.generate(**inputs, max_new_tokens=max_tokens, do_sample=False)
    new = out[0, inputs["input_ids"].shape[1] :].tolist()
    return tokenizer.decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False), len(new)


def texts(results: Sequence[Generation | Exception]) -> list[str]:
    out = []
    for result in results:
        assert isinstance(result, Generation), result
        out.append(result.text)
    return out


def test_meets_the_protocol(llm: HFBackend) -> None:
    assert isinstance(llm, LLMBackend)
    assert llm.kind == "language-model"
    detail = llm.info().detail
    assert detail["architecture"] == "LlamaForCausalLM"
    assert detail["one_by_one"] is None, "a plain Llama must run batched"
    assert llm.batch_key(GenerateRequest("a", seed=1)) == llm.batch_key(GenerateRequest("b", max_tokens=3))


@pytest.mark.parametrize("max_batch", [1, 3, 16])
def test_batched_greedy_equals_generate_one_by_one(folder: Path, reference: tuple[Any, Any], max_batch: int) -> None:
    from flowc.backends.llm.hf import HFBackend

    backend = HFBackend(folder, device="cpu", max_batch=max_batch)
    results = backend.generate([GenerateRequest(p, max_tokens=24) for p in PROMPTS])
    for prompt, result in zip(PROMPTS, results, strict=True):
        text, tokens = one_by_one(reference, prompt, 24)
        assert isinstance(result, Generation)
        assert (result.text, result.completion_tokens) == (text, tokens)
        assert result.prompt_tokens == len(reference[1](prompt)["input_ids"])
    assert len(set(texts(results))) > 4, "degenerate outputs would make the comparison empty"


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("Qwen2", {}),
        ("Mistral", {"sliding_window": 8}),
        ("GPT2", {}),
        ("Bloom", {}),  # ALiBi, takes no positions: runs row by row
        ("Mamba", {}),  # recurrent state: runs row by row
        ("Llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}}),
    ],
)
def test_other_architectures_are_exact_too(
    tmp_path: Path, folder: Path, reference: tuple[Any, Any], kind: str, options: dict[str, Any]
) -> None:
    import torch
    import transformers

    from flowc.backends.llm.hf import HFBackend

    size = {"vocab_size": len(reference[1]), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    if kind not in ("Bloom", "GPT2", "Mamba"):
        size |= {"intermediate_size": 64, "num_key_value_heads": 2, "max_position_embeddings": 512}
    ends = {"initializer_range": 0.2, "tie_word_embeddings": False, "eos_token_id": 0, "bos_token_id": 0}
    config = getattr(transformers, f"{kind}Config")(**size, **options, **ends, pad_token_id=3)
    torch.manual_seed(7)
    names = {"GPT2": "GPT2LMHeadModel"}
    model: Any = getattr(transformers, names.get(kind, f"{kind}ForCausalLM"))(config).eval()
    model.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / name, tmp_path)
    backend = HFBackend(tmp_path, device="cpu")
    assert bool(backend.info().detail["one_by_one"]) == (
        kind in ("Bloom", "Mamba") or bool(options.get("rope_parameters"))
    )
    results = backend.generate([GenerateRequest(p, max_tokens=12) for p in PROMPTS[:4]])
    assert texts(results) == [one_by_one((model, reference[1]), p, 12)[0] for p in PROMPTS[:4]]
    request = ChooseRequest("Is it?", (" yes", " no, never", " maybe"))
    scores = [log_probability((model, reference[1]), request.prompt, option) for option in request.options]
    assert backend.choose([request, ChooseRequest("And " * 9, request.options)])[0] == scores.index(max(scores))


def test_pieces_concatenate_to_the_text(llm: HFBackend) -> None:
    said: dict[int, list[str]] = {}
    requests = [GenerateRequest(p, max_tokens=40, temperature=1.5, seed=i) for i, p in enumerate(PROMPTS)]
    results = llm.generate(requests, on_text=lambda item, piece: said.setdefault(item, []).append(piece))
    for item, text in enumerate(texts(results)):
        assert "".join(said.get(item, [])) == text
        assert len(said[item]) > 5, "it should stream, not speak once"


def test_stop_strings_are_never_said_even_across_tokens(llm: HFBackend) -> None:
    prompt = PROMPTS[0]
    whole = texts(llm.generate([GenerateRequest(prompt, max_tokens=30)]))[0]
    for start in range(2, len(whole) - 6, 3):
        stops = (whole[start : start + 5], "never said anywhere")
        said: list[str] = []
        request = GenerateRequest(prompt, max_tokens=30, stop=stops)
        result = llm.generate([request], on_text=lambda _, piece, said=said: said.append(piece))[0]  # type: ignore[misc]
        assert isinstance(result, Generation)
        assert result.text == whole[: whole.find(stops[0])]
        assert "".join(said) == result.text
        assert result.finish_reason == "stop"
        assert result.completion_tokens <= 30


def test_stop_string_at_the_very_end_and_unfinished_stop(llm: HFBackend) -> None:
    whole = texts(llm.generate([GenerateRequest(PROMPTS[0], max_tokens=12)]))[0]
    at_end = llm.generate([GenerateRequest(PROMPTS[0], max_tokens=12, stop=(whole[-3:],))])[0]
    assert isinstance(at_end, Generation)
    assert at_end.text == whole[: whole.find(whole[-3:])]
    held = llm.generate([GenerateRequest(PROMPTS[0], max_tokens=12, stop=(whole[-3:] + "x",))])[0]
    assert isinstance(held, Generation)
    assert (held.text, held.finish_reason) == (whole, "length"), "what was held back in vain must be said at the end"


def test_every_request_has_its_own_limit(llm: HFBackend) -> None:
    limits = [1, 0, 7, 19]
    results = llm.generate([GenerateRequest(PROMPTS[0], max_tokens=n) for n in limits])
    assert [r.completion_tokens for r in results if isinstance(r, Generation)] == limits
    assert {r.finish_reason for r in results if isinstance(r, Generation)} == {"length"}
    whole = texts(results)[3]
    assert all(whole.startswith(text.rstrip("\ufffd")) for text in texts(results))


def test_cancelling_one_leaves_the_others_exact(llm: HFBackend) -> None:
    requests = [GenerateRequest(p, max_tokens=24) for p in PROMPTS]
    alone = texts(llm.generate(requests))
    said: dict[int, list[str]] = {}
    asked = [0]

    def is_cancelled(item: int) -> bool:
        asked[0] += 1
        return item in (0, 3) and len(said.get(item, [])) >= 4

    results = llm.generate(requests, lambda i, piece: said.setdefault(i, []).append(piece), is_cancelled)
    for item, result in enumerate(results):
        assert isinstance(result, Generation)
        assert result.text == "".join(said[item])
        if item in (0, 3):
            assert result.finish_reason == "cancelled"
            assert alone[item].startswith(result.text)
            assert result.completion_tokens < 24
        else:
            assert result.text == alone[item]
    before = llm.generate(requests, is_cancelled=lambda item: True)
    assert {(r.text, r.finish_reason) for r in before if isinstance(r, Generation)} == {("", "cancelled")}


def test_sampling_depends_on_the_seed_and_not_on_the_neighbours(llm: HFBackend) -> None:
    def ask(prompt: str, seed: int) -> GenerateRequest:
        return GenerateRequest(prompt, max_tokens=16, temperature=1.0, top_p=0.95, top_k=200, seed=seed)

    target = ask(PROMPTS[0], 11)
    alone = texts(llm.generate([target]))[0]
    mixed = [ask(PROMPTS[2], 1), target, GenerateRequest(PROMPTS[3], max_tokens=5), ask(PROMPTS[0], 12), target]
    together = texts(llm.generate(mixed))
    assert together[1] == together[4] == alone
    assert together[3] != alone
    free = texts(llm.generate([GenerateRequest(PROMPTS[0], max_tokens=16, temperature=1.0)] * 2))
    assert free[0] != free[1], "without a seed two samples differ"


def log_probability(reference: tuple[Any, Any], prompt: str, option: str) -> float:
    """The total log-probability of `option` after `prompt`, one token and one whole forward at a time."""
    import torch

    model, tokenizer = reference
    ids = tokenizer(prompt)["input_ids"]
    total = 0.0
    with torch.inference_mode():
        for token in tokenizer(option, add_special_tokens=False)["input_ids"]:
            logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
            total += float(torch.log_softmax(logits, dim=-1)[token])
            ids = [*ids, token]
    return total


@pytest.mark.parametrize("max_batch", [2, 16])
def test_choose_equals_naive_scoring(folder: Path, reference: tuple[Any, Any], max_batch: int) -> None:
    from flowc.backends.llm.hf import HFBackend

    llm = HFBackend(folder, device="cpu", max_batch=max_batch)
    options = ((" yes", " no"), ("A", "B", "C"), (" generator", " function that returns", " iterator of all", " x"))
    requests = [ChooseRequest(p, options[i % 3]) for i, p in enumerate(PROMPTS)]
    expected = []
    for request in requests:
        scores = [log_probability(reference, request.prompt, option) for option in request.options]
        assert sorted(scores)[-1] - sorted(scores)[-2] > 1e-3, "too close to tell right from wrong"
        expected.append(scores.index(max(scores)))
    assert llm.choose(requests) == expected
    assert len(set(expected)) > 1
    asked = [
        (i, llm.local.encode(r.prompt), [llm.local.encode(o, special=False) for o in r.options])
        for i, r in enumerate(requests)
    ]
    import torch

    with torch.inference_mode():
        for request, batched in zip(requests[:max_batch], llm._score(asked[:max_batch]), strict=True):
            assert batched == pytest.approx(
                [log_probability(reference, request.prompt, o) for o in request.options], abs=1e-3
            )


def test_choose_ties_go_to_the_first_and_bad_choices_fail_alone(llm: HFBackend) -> None:
    results = llm.choose(
        [
            ChooseRequest("So", (" yes", " yes")),
            ChooseRequest("So", ()),
            ChooseRequest("So", (" yes", "")),
            ChooseRequest("word " * 600, (" yes", " no")),
            ChooseRequest("So", (" only",)),
        ]
    )
    assert results[0] == 0
    assert results[4] == 0
    assert isinstance(results[1], InputError)
    assert isinstance(results[2], InputError)
    assert "option 2 of 2" in str(results[2])
    assert isinstance(results[3], ResourceError)
    assert results[3].code == "F068"


def test_a_prompt_that_is_too_long_fails_alone(llm: HFBackend) -> None:
    long = "word " * 600
    tokens = llm.count_tokens(long)
    results = llm.generate([GenerateRequest(PROMPTS[0], max_tokens=8), GenerateRequest(long, max_tokens=8)])
    error = results[1]
    assert isinstance(error, ResourceError)
    assert error.code == "F068"
    assert str(tokens) in error.message
    assert "512" in error.message
    assert error.hint
    assert texts(results[:1]) == texts(llm.generate([GenerateRequest(PROMPTS[0], max_tokens=8)]))


def test_an_answer_ends_where_the_context_ends(llm: HFBackend) -> None:
    prompt = "word " * 500
    left = 512 - llm.count_tokens(prompt)
    assert 0 < left < 100
    result = llm.generate([GenerateRequest(prompt, max_tokens=400)])[0]
    assert isinstance(result, Generation)
    assert result.finish_reason in ("length", "stop")
    assert result.completion_tokens <= left


def test_bad_parameters_fail_alone(llm: HFBackend) -> None:
    good = GenerateRequest("Hi", max_tokens=3)
    bad = [
        GenerateRequest("Hi", max_tokens=-1),
        GenerateRequest("Hi", temperature=-0.5),
        GenerateRequest("Hi", temperature=float("nan")),
        GenerateRequest("Hi", top_p=0.0),
        GenerateRequest("Hi", top_k=-2),
        GenerateRequest("Hi", stop=("",)),
    ]
    results = llm.generate([*bad, good])
    assert all(isinstance(r, InputError) and r.hint for r in results[:-1])
    assert isinstance(results[-1], Generation)


def test_a_failing_listener_fails_its_own_item_only(llm: HFBackend) -> None:
    alone = texts(llm.generate([GenerateRequest(PROMPTS[1], max_tokens=8)]))

    def on_text(item: int, piece: str) -> None:
        if item == 0:
            raise KeyError("listener")

    results = llm.generate([GenerateRequest(p, max_tokens=8) for p in PROMPTS[:2]], on_text)
    assert isinstance(results[0], KeyError)
    assert texts(results[1:]) == alone


def test_timeouts_are_errors_of_their_item(llm: HFBackend) -> None:
    results = llm.generate([GenerateRequest("Hi", max_tokens=50, timeout_s=0.0), GenerateRequest("Hi", max_tokens=3)])
    assert isinstance(results[0], NodeTimeoutError)
    assert isinstance(results[1], Generation)


def test_odd_prompts_have_answers(llm: HFBackend) -> None:
    for prompt in ("", "\ud800 lone", "\x00", "<|im_end|>"):
        assert isinstance(llm.generate([GenerateRequest(prompt, max_tokens=2)])[0], Generation), ascii(prompt)


def test_a_batch_that_does_not_fit_goes_on_in_halves(llm: HFBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    requests = [GenerateRequest(p, max_tokens=16) for p in PROMPTS]
    alone = texts(llm.generate(requests))
    forward, steps, widest = llm._forward, [0], [0]

    def tight(ids: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        steps[0] += 1
        if len(ids) > 2 and steps[0] > 5:  # memory runs out while some have spoken already
            raise torch.OutOfMemoryError("CUDA out of memory")
        widest[0] = max(widest[0], len(ids))
        return forward(ids, *args, **kwargs)

    monkeypatch.setattr(llm, "_forward", tight)
    said: dict[int, str] = {}
    results = llm.generate(requests, lambda i, piece: said.update({i: said.get(i, "") + piece}))
    assert widest[0] == len(PROMPTS)
    assert texts(results) == alone == [said[i] for i in range(len(PROMPTS))]

    def never(*args: Any, **kwargs: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(llm, "_forward", never)
    outcome = llm.generate(requests[:2])
    assert all(isinstance(r, ResourceError) and r.code == "F069" for r in outcome)
    chosen = llm.choose([ChooseRequest("So", (" a", " b"))])
    assert isinstance(chosen[0], ResourceError)


def test_chat_template(llm: HFBackend, folder: Path, tmp_path: Path) -> None:
    from flowc.backends.llm.hf import HFBackend

    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert llm.render_chat(turns) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    plain = shutil.copytree(folder, tmp_path / "plain")
    settings = json.loads((plain / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    (plain / "tokenizer_config.json").write_text(json.dumps(settings))
    assert HFBackend(plain, device="cpu").render_chat(turns) == "Be brief.\n\nUser: Hi\n\nAssistant:"
    settings["chat_template"] = "{{ raise_exception('no system message, please') }}"
    (plain / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ResourceError, match="no system message, please"):
        HFBackend(plain, device="cpu").render_chat(turns)
    settings["chat_template"] = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    (plain / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ResourceError, match="chat template"):
        HFBackend(plain, device="cpu").render_chat(turns)


def damage(folder: Path, to: Path, what: str) -> Path:
    shutil.copytree(folder, to)
    config = json.loads((to / "config.json").read_text())
    if what == "no config":
        (to / "config.json").unlink()
    elif what == "bad config":
        (to / "config.json").write_text("{")
    elif what == "no weights":
        (to / "model.safetensors").unlink()
    elif what == "cut weights":
        data = (to / "model.safetensors").read_bytes()
        (to / "model.safetensors").write_bytes(data[: len(data) // 2])
    elif what == "layer missing":
        (to / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    elif what == "pickle":
        (to / "model.safetensors").rename(to / "pytorch_model.bin")
    elif what == "no tokenizer":
        (to / "tokenizer.json").unlink()
        (to / "tokenizer_config.json").unlink()
    elif what == "masked":
        (to / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertForMaskedLM"]}))
    elif what == "encoder-decoder":
        (to / "config.json").write_text(
            json.dumps(
                {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True}
            )
        )
    elif what == "embedder":
        (to / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaModel"]}))
    return to


@pytest.mark.parametrize(
    ("what", "code"),
    [
        ("no config", "F065"),
        ("bad config", "F065"),
        ("no weights", "F065"),
        ("cut weights", "F065"),
        ("layer missing", "F065"),
        ("pickle", "F065"),
        ("no tokenizer", "F066"),
        ("masked", "F067"),
        ("encoder-decoder", "F067"),
        ("embedder", "F067"),
    ],
)
def test_damaged_folders_are_named(folder: Path, tmp_path: Path, what: str, code: str) -> None:
    from flowc.backends.llm.hf import HFBackend

    bad = damage(folder, tmp_path / "bad", what)
    with pytest.raises(ResourceError) as caught:
        HFBackend(bad, device="cpu")
    assert caught.value.code == code
    assert str(bad) in caught.value.message
    assert caught.value.hint


def test_wrong_paths_are_named(tmp_path: Path, folder: Path) -> None:
    from flowc.backends.llm.hf import HFBackend

    for wrong in (tmp_path / "nothing", str(tmp_path / "nothing"), "./nothing", folder / "config.json"):
        with pytest.raises(ResourceError) as caught:
            HFBackend(wrong)
        assert caught.value.code == "F064"
    with pytest.raises(ResourceError) as caught:  # a hub id; HF_HUB_OFFLINE is set in tests
        HFBackend("flowc-tests/no-such-model")
    assert caught.value.code == "F064"
    assert "flowc-tests/no-such-model" in caught.value.message
    with pytest.raises(ResourceError, match="unknown dtype 'int3'"):
        HFBackend(folder, dtype="int3")


def test_bfloat16_runs_and_closing_is_final(folder: Path) -> None:
    from flowc.backends.llm.hf import HFBackend

    llm = HFBackend(folder, dtype="bfloat16", device="cpu")
    assert llm.info().detail["dtype"] == "bfloat16"
    assert llm.info().detail["one_by_one"] is None
    result = llm.generate([GenerateRequest("Hi", max_tokens=5), GenerateRequest("word " * 30, max_tokens=5)])[0]
    assert isinstance(result, Generation)
    assert result.completion_tokens >= 1
    llm.close()
    llm.close()
    with pytest.raises(ResourceError, match="closed"):
        llm.generate([GenerateRequest("Hi")])


def test_detokenizer_never_shows_half_a_character() -> None:
    from flowc.backends.llm.rows import Detokenizer

    def decode(ids: list[int]) -> str:
        return bytes(ids).decode("utf-8", "replace")

    for data in (
        "naïve 東京 🚲!".encode(),
        b"\xff\xfe ok \xe6\x9d",
        "\ufffd\ufffd\ufffd\ufffd x \ufffd".encode(),
        b"\x80" * 9,
    ):
        detokenizer = Detokenizer(decode)
        pieces = [detokenizer.push(byte) for byte in data]
        pieces.append(detokenizer.flush())
        assert "".join(pieces) == decode(list(data))
        for i, piece in enumerate(pieces[:-1]):
            assert decode(list(data)).startswith("".join(pieces[: i + 1])), "a piece was taken back"
            assert "\ufffd" not in piece or "\ufffd" in decode(list(data))

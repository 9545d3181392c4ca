"""Plain decoders put together anew write what `model.generate` writes, whoever has a copy of his cache and who not."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from flowc.backends.llm.paged.engine import Engine  # noqa: E402
from flowc.backends.llm.paged.model import PagedModel  # noqa: E402
from tests.backends.llm.paged.test_exact import (  # noqa: E402
    ARCHITECTURES,
    SMALL,
    drive,
    owner,
    reference,
    sequence,
)

pytestmark = pytest.mark.models
ARCHITECTURES["mistral_plain"] = lambda: transformers.MistralConfig(**SMALL, sliding_window=None)
ARCHITECTURES["llama_biased"] = lambda: transformers.LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True)
FUSED = ("llama", "qwen2", "qwen3", "llama_yarn", "mistral_plain", "llama_biased")


def packed_engine(name: str, decode_tokens: int = 10_000, **options: Any) -> tuple[Engine, Any]:
    model, prompts, expected = reference(name)
    paged = PagedModel(copy.deepcopy(model), name)
    paged.pack(decode_tokens)
    made = {"blocks": 64, "block_size": 16, "max_step_tokens": 64, "poison": True, **options}
    return Engine(paged, **made), (prompts, expected)


@pytest.mark.parametrize("name", FUSED)
def test_tokens_are_those_of_generate(name: str) -> None:
    engine, (prompts, expected) = packed_engine(name)
    assert engine.model.fused is not None
    for _ in range(2):  # the second time with everything cached
        sequences = [sequence(p) for p in prompts]
        drive(engine, [sequences])
        assert [owner(s).tokens for s in sequences] == expected
    assert engine.stats.reused_tokens > 0
    assert engine.model.fused.decode.tokens == 0, "who is done keeps no copy"


@pytest.mark.parametrize("name", ["mistral", "phi3", "gemma2"])
def test_others_keep_their_modules_with_packed_products(name: str) -> None:
    engine, (prompts, expected) = packed_engine(name)
    assert engine.model.fused is None
    sequences = [sequence(p) for p in prompts]
    drive(engine, [sequences])
    assert [owner(s).tokens for s in sequences] == expected


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("decode_tokens", [0, 130, 10_000])
def test_any_arrival_under_pressure(seed: int, decode_tokens: int) -> None:
    """Copies for none, some or all of the sequences, which are preempted meanwhile."""
    rng = random.Random(seed)
    options = {"block_size": 4, "blocks": rng.choice([26, 40]), "max_step_tokens": rng.choice([5, 32])}
    engine, (prompts, expected) = packed_engine("qwen3", decode_tokens, max_sequences=8, **options)
    jobs = [i for i in range(len(prompts)) for _ in range(3)]
    rng.shuffle(jobs)
    sequences = [sequence(prompts[i]) for i in jobs]
    arrivals: list[list[Any]] = [[] for _ in range(12)]
    for s in sequences:
        arrivals[rng.randrange(12)].append(s)
    drive(engine, arrivals)
    assert [owner(s).tokens for s in sequences] == [expected[i] for i in jobs]
    assert engine.model.fused is not None
    assert engine.model.fused.decode.tokens == 0


def test_copies_grow_with_their_sequences() -> None:
    engine, (prompts, _) = packed_engine("llama", blocks=64)
    model = reference("llama")[0]
    with torch.inference_mode():
        ids = torch.tensor([prompts[2]])
        got = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=150, do_sample=False)
    long = sequence(prompts[2], 150)
    drive(engine, [[long], [sequence(prompts[4])]])
    assert owner(long).tokens == got[0, ids.shape[1] :].tolist()


def test_bfloat16_logits_are_near() -> None:
    model = copy.deepcopy(reference("qwen3")[0]).bfloat16()
    paged = PagedModel(model, "qwen3")
    assert paged.pack(1000) == 4 * 2 + 1
    assert paged.fused is not None, "the probe let it pass"


def test_a_model_that_computes_otherwise_keeps_its_modules() -> None:
    model = copy.deepcopy(reference("llama")[0])
    layer = model.model.layers[0]
    layer.register_forward_hook(lambda _m, _a, out: out * 1.01)  # somebody's own change, which `fused` cannot see
    paged = PagedModel(model, "changed")
    paged.pack(1000)
    assert paged.fused is None

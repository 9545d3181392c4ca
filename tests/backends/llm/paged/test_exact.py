"""The engine writes the tokens that `model.generate` writes, whatever the architecture, schedule and pressure."""

from __future__ import annotations

import copy
import random
import threading
from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from flowc.backends.llm.paged.engine import Engine  # noqa: E402
from flowc.backends.llm.paged.model import NotPagedError, PagedModel  # noqa: E402
from flowc.backends.llm.paged.sequence import Sequence  # noqa: E402
from flowc.ir.errors import ResourceError  # noqa: E402
from flowc.runtime.protocols import Ticket  # noqa: E402

pytestmark = pytest.mark.models
VOCAB, NEW = 211, 12
SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
WINDOW = {"sliding_window": 24}


def _config(name: str, **more: Any) -> Callable[[], Any]:
    return lambda: getattr(transformers, name)(**{**SMALL, **more})


ARCHITECTURES = {
    "llama": _config("LlamaConfig"),
    "qwen2": _config("Qwen2Config"),
    "qwen3": _config("Qwen3Config"),
    "mistral": _config("MistralConfig", **WINDOW),
    "gemma2": _config("Gemma2Config", **WINDOW, query_pre_attn_scalar=8),
    "gemma3": _config("Gemma3TextConfig", **WINDOW, query_pre_attn_scalar=8),
    "phi3": _config("Phi3Config"),
    "gpt_oss": _config("GptOssConfig", **WINDOW, **MOE),
    "olmo": _config("OlmoConfig", clip_qkv=0.5),
    "olmo2": _config("Olmo2Config"),
    "granite": _config("GraniteConfig"),
    "mixtral": _config("MixtralConfig", **MOE),
    "qwen2_moe": _config("Qwen2MoeConfig", **MOE, shared_expert_intermediate_size=24),
    "qwen3_moe": _config("Qwen3MoeConfig", **MOE),
    "granite_moe": _config("GraniteMoeConfig", **MOE),
    "deepseek_v3": _config(  # latent attention, expanded: keys are wider than values
        "DeepseekV3Config",
        **MOE,
        num_key_value_heads=4,
        n_routed_experts=4,
        n_group=2,
        topk_group=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        first_k_dense_replace=1,
    ),
    "llama_yarn": _config("LlamaConfig", rope_parameters={"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}),
}


def make(name: str) -> Any:
    torch.manual_seed(7)
    return transformers.AutoModelForCausalLM.from_config(ARCHITECTURES[name](), dtype=torch.float32).eval()


_expected: dict[str, tuple[Any, list[list[int]], list[list[int]]]] = {}


def reference(name: str) -> tuple[Any, list[list[int]], list[list[int]]]:
    """(model, prompts, greedy continuations by `generate`, one prompt at a time)."""
    if name not in _expected:
        model = make(name)
        rng = random.Random(3)
        shared = [rng.randrange(2, VOCAB) for _ in range(40)]
        prompts = [[rng.randrange(2, VOCAB) for _ in range(n)] for n in (1, 5, 17, 33)]
        prompts += [shared + [rng.randrange(2, VOCAB) for _ in range(n)] for n in (1, 9, 30)]
        outs = []
        with torch.inference_mode():
            for p in prompts:
                ids = torch.tensor([p])
                got = model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=NEW,
                    do_sample=False,
                    return_dict_in_generate=True,
                    output_scores=True,
                )
                top = torch.stack([s[0].topk(2).values for s in got.scores])
                assert float((top[:, 0] - top[:, 1]).min()) > 1e-5, "a tie: choose another seed"
                outs.append(got.sequences[0, len(p) :].tolist())
        _expected[name] = model, prompts, outs
    return _expected[name]


class Greedy:
    """An owner that takes the likeliest token and counts to a limit."""

    def __init__(self, limit: int = NEW) -> None:
        self.limit = limit
        self.tokens: list[int] = []
        self.error: Exception | None = None
        self.is_cancelled = False
        self.has_ended = False
        self.done = threading.Event()

    def accept(self, sequence: Sequence, token: int) -> bool:
        self.tokens.append(token)
        return len(self.tokens) < self.limit

    def is_wanted(self, sequence: Sequence) -> bool:
        return not self.is_cancelled

    def targets(self, sequence: Sequence) -> list[int]:
        raise AssertionError

    def ended(self, sequence: Sequence, error: Exception | None) -> None:
        assert not self.has_ended, "told twice"
        self.has_ended, self.error = True, error
        self.done.set()


def owner(sequence: Sequence) -> Greedy:
    assert isinstance(sequence.owner, Greedy)
    return sequence.owner


def engine_for(model: Any, name: str, **options: Any) -> Engine:
    own = copy.deepcopy(model)  # attention is exchanged for good; the reference keeps its own
    return Engine(PagedModel(own, name), **{"blocks": 64, "block_size": 16, "max_step_tokens": 64, **options})


def drive(engine: Engine, arrivals: list[list[Sequence]], until: int = 2000) -> None:
    """Steps the engine by hand; a group of sequences arrives before each step."""
    with torch.inference_mode():
        for n in range(until):
            if n < len(arrivals):
                for s in arrivals[n]:
                    s.order = engine._arrivals
                    engine._arrivals += 1
                    engine.waiting.append(s)
            if not engine.waiting and not engine.running and n >= len(arrivals):
                return
            engine.step()
            engine.check()
    raise AssertionError("the engine did not come to an end")


def sequence(prompt: list[int], limit: int = NEW) -> Sequence:
    return Sequence(list(prompt), Greedy(limit), limit=limit)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_tokens_are_those_of_generate(name: str) -> None:
    model, prompts, expected = reference(name)
    engine = engine_for(model, name)
    sequences = [sequence(p) for p in prompts]
    drive(engine, [sequences])
    assert [owner(s).tokens for s in sequences] == expected
    again = [sequence(p) for p in prompts]  # now with everything cached
    before = engine.stats.reused_tokens
    drive(engine, [again])
    assert [owner(s).tokens for s in again] == expected
    assert engine.stats.reused_tokens > before


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("chunk", [1, 7, 64])
@pytest.mark.parametrize("block_size", [4, 16])
def test_chunks_and_blocks_change_nothing(name: str, chunk: int, block_size: int) -> None:
    model, prompts, expected = reference(name)
    engine = engine_for(model, name, block_size=block_size, blocks=1024 // block_size, max_step_tokens=chunk)
    sequences = [sequence(p) for p in prompts]
    drive(engine, [sequences])
    assert [owner(s).tokens for s in sequences] == expected


@pytest.mark.parametrize("seed", range(6))
def test_any_arrival_under_pressure(seed: int) -> None:
    """Arrivals in any order into a pool so small that sequences are preempted and cached blocks evicted."""
    model, prompts, expected = reference("qwen3")
    rng = random.Random(seed)
    jobs = [i for i in range(len(prompts)) for _ in range(3)]
    rng.shuffle(jobs)
    sequences = [sequence(prompts[i]) for i in jobs]
    arrivals: list[list[Sequence]] = [[] for _ in range(12)]
    for s in sequences:
        s.ticket = Ticket(0, rng.choice([0.0, 0.0, 1.0]))
        arrivals[rng.randrange(12)].append(s)
    engine = engine_for(
        model, "qwen3", block_size=4, blocks=rng.choice([26, 40]), max_step_tokens=rng.choice([5, 32]), max_sequences=8
    )
    drive(engine, arrivals)
    assert [owner(s).tokens for s in sequences] == [expected[i] for i in jobs]
    assert engine.stats.evicted_blocks > 0
    assert engine.pool.free + engine.tree.size == engine.pool.usable


def test_a_preempted_sequence_is_computed_again() -> None:
    model, prompts, expected = reference("qwen3")
    engine = engine_for(model, "qwen3", block_size=4, blocks=18, max_step_tokens=64, max_sequences=8)
    sequences = [sequence(prompts[i]) for i in (3, 2, 2, 1)]
    drive(engine, [sequences])
    assert [owner(s).tokens for s in sequences] == [expected[i] for i in (3, 2, 2, 1)]
    assert engine.stats.preemptions > 0


def test_a_fan_out_prefills_its_common_prefix_once() -> None:
    model, _, _ = reference("llama")
    engine = engine_for(model, "llama", blocks=200)
    rng = random.Random(5)
    shared = [rng.randrange(2, VOCAB) for _ in range(96)]
    sequences = [sequence([*shared, 2 + i], 2) for i in range(8)]
    drive(engine, [sequences])
    assert engine.stats.prefill_tokens == 96 + 8
    assert engine.stats.reused_tokens == 7 * 96


def test_a_cancelled_sequence_gives_its_blocks_back_and_disturbs_nobody() -> None:
    model, prompts, expected = reference("llama")
    engine = engine_for(model, "llama", max_step_tokens=16)
    sequences = [sequence(p) for p in prompts]
    with torch.inference_mode():
        engine.waiting += sequences
        for n in range(400):
            if n == 6:
                owner(sequences[1]).is_cancelled = owner(sequences[5]).is_cancelled = True
            if not engine.waiting and not engine.running:
                break
            engine.step()
            engine.check()
    assert all(owner(s).has_ended for s in sequences)
    for i in (0, 2, 3, 4, 6):
        assert owner(sequences[i]).tokens == expected[i]
    assert engine.pool.free + engine.tree.size == engine.pool.usable


def test_what_cannot_fit_is_an_error_of_its_own() -> None:
    model, prompts, expected = reference("llama")
    engine = engine_for(model, "llama", blocks=5, block_size=4, max_step_tokens=64)
    big, small = sequence(prompts[3]), sequence(prompts[1], 4)
    drive(engine, [[big, small]])
    assert isinstance(owner(big).error, ResourceError)
    assert "KV cache" in str(owner(big).error)
    assert owner(small).tokens == expected[1][:4]


LONG = {"rope_type": "longrope", "rope_theta": 1e4, "long_factor": [2.0] * 4, "short_factor": [1.0] * 4}
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "bloom": (lambda: transformers.BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4), "ALiBi"),
    "falcon": (
        lambda: transformers.FalconConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4),
        "only through a mask",
    ),
    "mpt": (lambda: transformers.MptConfig(vocab_size=VOCAB, d_model=32, n_heads=4, n_layers=2), "ALiBi"),
    "mamba": (
        lambda: transformers.MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2),
        "recurrent state",
    ),
    "qwen3_next": (
        _config("Qwen3NextConfig", **MOE, layer_types=["linear_attention", "full_attention"]),
        "recurrent state|linear_attention",
    ),
    "llama4": (
        _config("Llama4TextConfig", **MOE, attention_chunk_size=8, intermediate_size_mlp=48),
        "chunked",
    ),
    "gptj": (
        lambda: transformers.GPTJConfig(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, rotary_dim=8),
        "0 of its 2 layers use transformers' attention interface",
    ),
    "dynamic rope": (
        _config("LlamaConfig", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
        "longest sequence of a step",
    ),
    "longrope": (
        _config("Phi3Config", rope_parameters=LONG, original_max_position_embeddings=64),
        "longest sequence of a step",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_architectures_that_would_be_wrong_are_refused(name: str) -> None:
    config, reason = REFUSED[name]
    model = transformers.AutoModelForCausalLM.from_config(config()).eval()
    before = model.config._attn_implementation
    with pytest.raises(NotPagedError, match=reason) as refusal:
        PagedModel(model, name)
    assert refusal.value.code == "F067"
    assert name in refusal.value.message
    assert model.config._attn_implementation == before

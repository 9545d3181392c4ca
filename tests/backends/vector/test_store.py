"""Indexes on disk: what is damaged is named, and no build, kill or full disk takes the old index away."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from flowc.backends.embed.hashing import HashingEmbedder
from flowc.backends.vector import Passage, build_index, index_info, open_index
from flowc.backends.vector.store import IndexWriter, read_manifest
from flowc.ir.errors import ResourceError
from flowc.ir.values import Docs
from flowc.runtime.protocols import SearchRequest

Built = Callable[[str], Path]
TEXTS = [f"passage number {n} about {w}" for n, w in enumerate(["cats", "dogs", "birds", "fish"] * 10)]
KINDS = ("flat", "ivf", "bm25")


def make(out: Path, kind: str, texts: list[str] = TEXTS) -> str:
    nlist = 4 if kind == "ivf" else None
    return build_index(texts, HashingEmbedder(64), out, kind=kind, nlist=nlist).generation  # type: ignore[arg-type]


def texts_of(path: Path, query: str = "passage number", k: int = 1000) -> set[str]:
    index = open_index(path, verify=True)
    (docs,) = index.search([SearchRequest(query, k)])
    index.close()
    assert isinstance(docs, Docs), docs
    return set(docs.texts)


# ------------------------------------------------------------------------------------------------ damage
@pytest.mark.parametrize("kind", KINDS)
def test_every_file_cut_short_or_missing_is_noticed_when_opening(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "index"
    make(out, kind)
    manifest = read_manifest(out)
    assert len(manifest.files) >= 3
    for name in manifest.files:
        file = out / manifest.generation / name
        whole = file.read_bytes()
        for damage in (whole[:-1], whole[: len(whole) // 2], b"", whole + b"x", None):
            file.unlink()
            if damage is not None:
                file.write_bytes(damage)
            with pytest.raises(ResourceError, match=f"{name} (has|is missing)") as caught:
                open_index(out)
            assert caught.value.code == "F062"
            assert "build" in (caught.value.hint or "")
            file.write_bytes(whole)
    assert texts_of(out) == set(TEXTS)


@pytest.mark.parametrize("kind", KINDS)
def test_every_flipped_byte_is_noticed_by_the_checksums(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "index"
    make(out, kind)
    manifest = read_manifest(out)
    for name in manifest.files:
        file = out / manifest.generation / name
        whole = file.read_bytes()
        for at in range(0, len(whole), max(1, len(whole) // 7)):
            file.write_bytes(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
            with pytest.raises(ResourceError, match="does not match its checksum") as caught:
                open_index(out, verify=True)
            assert caught.value.code == "F062"
            with pytest.raises(ResourceError, match="checksum"):
                index_info(out)
        file.write_bytes(whole)


@pytest.mark.parametrize("kind", ["flat", "bm25"])
def test_files_of_the_right_size_with_other_content_do_not_crash_the_process(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "index"
    make(out, kind)
    manifest = read_manifest(out)
    for name in manifest.files:
        file = out / manifest.generation / name
        whole = file.read_bytes()
        file.write_bytes(b"\x5a" * len(whole))
        try:
            (result,) = open_index(out).search([SearchRequest("cats", 3)])
            error: object = result if isinstance(result, ResourceError) else None
        except ResourceError as e:
            error = e
        if name in ("index.faiss", "offsets.npy", "passages.jsonl", "terms.txt", "starts.npy"):
            assert isinstance(error, ResourceError), name
            assert error.code == "F062"
        file.write_bytes(whole)


@pytest.mark.parametrize(
    ("text", "code", "message"),
    [
        (b"", "F062", "not a JSON object"),
        (b"{", "F062", "not a JSON object"),
        (b"[]", "F062", "not a JSON object"),
        (b"\xff\xfe", "F062", "cannot be read"),
        (b'{"format": "flowc-index/1"}', "F062", "lacks or garbles"),
        (b'{"format": "flowc-index/9"}', "F062", "flowc-index/9"),
        (b'{"format": "something else"}', "F061", "something else"),
    ],
)
def test_a_damaged_manifest(tmp_path: Path, text: bytes, code: str, message: str) -> None:
    out = tmp_path / "index"
    make(out, "bm25")
    (out / "manifest.json").write_bytes(text)
    with pytest.raises(ResourceError, match=message) as caught:
        open_index(out)
    assert caught.value.code == code
    assert caught.value.hint


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": "many"}, "garbles"),
        ({"count": 41}, "do not make 41"),
        ({"nlist": 5}, "is not the index"),
        ({"codec": "fp32"}, "is not the index"),
        ({"kind": "tree"}, "garbles"),
        ({"embedder": None}, "garbles"),
        ({"generation": "../elsewhere"}, "garbles"),
        ({"files": {"../../x": {"size_bytes": 1, "sha256": ""}}}, "garbles"),
        ({"generation": "0123456789ab"}, "is missing"),
    ],
)
def test_a_manifest_that_says_something_else_than_the_files(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    out = tmp_path / "index"
    make(out, "ivf")
    row = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(json.dumps(row | change))
    with pytest.raises(ResourceError, match=message) as caught:
        open_index(out)
    assert caught.value.code == "F062"


def test_no_index_there(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for name, message in (("nowhere", "no index at"), ("empty", "not an index"), ("file", "is a file")):
        with pytest.raises(ResourceError, match=message) as caught:
            open_index(tmp_path / name)
        assert caught.value.code == "F061"
        assert "flowc index build" in (caught.value.hint or "")


# ------------------------------------------------------------------------------------------------ saving
def test_a_rebuild_replaces_the_files_and_leaves_readers_alone(tmp_path: Path) -> None:
    out = tmp_path / "index"
    make(out, "ivf")
    reader = open_index(out)
    before = reader.search([SearchRequest("cats", 5)])
    other = [t.replace("passage", "page") for t in TEXTS[:20]]
    generation = make(out, "ivf", other)
    assert sorted(p.name for p in out.iterdir()) == sorted([".lock", "manifest.json", generation])
    assert reader.search([SearchRequest("cats", 5)]) == before
    assert texts_of(out) == set(other)
    assert make(out, "ivf", other) == generation  # the same content is the same generation
    assert texts_of(out) == set(other)


def test_a_damaged_generation_is_not_taken_for_the_new_one(tmp_path: Path) -> None:
    out = tmp_path / "index"
    generation = make(out, "bm25")
    (out / generation / "passages.jsonl").write_bytes(b"gone")
    assert make(out, "bm25") == f"{generation}-1"
    assert texts_of(out) == set(TEXTS)
    assert not (out / generation).exists()


def test_a_folder_with_other_things_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("precious")
    (tmp_path / "file").write_text("")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "manifest.json").write_text('{"format": "flowc-passages/1"}')
    for out in (tmp_path, tmp_path / "file", tmp_path / "set"):
        with pytest.raises(ResourceError) as caught:
            make(out, "bm25")
        assert caught.value.code == "F060"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "notes.txt", "set"]
    assert [p.name for p in (tmp_path / "set").iterdir()] == ["manifest.json"]


def test_two_builds_at_once_do_not_mix(tmp_path: Path) -> None:
    out = tmp_path / "index"
    with IndexWriter(out):
        with pytest.raises(ResourceError, match="another process is writing") as caught:
            make(out, "bm25")
        assert caught.value.code == "F060"
    assert not out.exists()  # nothing was committed
    make(out, "bm25")


def test_a_failed_build_leaves_nothing_or_the_old_index(tmp_path: Path) -> None:
    class Breaks(HashingEmbedder):
        def embed_many(self, texts: object, progress: object = None) -> object:  # type: ignore[override]
            raise RuntimeError("out of tokens")

    out = tmp_path / "index"
    with pytest.raises(RuntimeError, match="out of tokens"):
        build_index(TEXTS, Breaks(64), out)
    assert not out.exists()
    make(out, "flat")
    before = sorted(p.name for p in out.rglob("*"))
    with pytest.raises(RuntimeError, match="out of tokens"):
        build_index(TEXTS[:5], Breaks(64), out)
    assert sorted(p.name for p in out.rglob("*")) == before
    assert texts_of(out) == set(TEXTS)


def child(code: str, *args: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    return subprocess.run([sys.executable, "-c", code, *args], env=env, capture_output=True, text=True, timeout=60)


KILLED = """
import os, signal, sys
from pathlib import Path
from flowc.backends.vector import build_index

out, moment = sys.argv[1], int(sys.argv[2])
steps = 0
def deadly(call):
    def wrapped(*args, **kwargs):
        global steps
        steps += 1
        if steps == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*args, **kwargs)
    return wrapped
os.fsync, os.rename, os.replace = deadly(os.fsync), deadly(os.rename), deadly(os.replace)
build_index([f"new passage {n}" for n in range(30)], None, out)
"""


def test_a_build_that_is_killed_anywhere_leaves_the_old_index_or_the_new_one(tmp_path: Path) -> None:
    out = tmp_path / "index"
    new = {f"new passage {n}" for n in range(30)}
    seen = []
    for moment in range(1, 30):
        make(out, "bm25")
        done = child(KILLED, str(out), str(moment))
        assert done.returncode in (0, -signal.SIGKILL), done.stderr
        found = texts_of(out, "passage")
        assert found in (set(TEXTS), new)
        seen.append(found == new)
        if done.returncode == 0:
            break
    else:
        pytest.fail("the build has more steps than the test tries")
    assert seen == sorted(seen)  # before the manifest is replaced always the old one, after it always the new one
    assert seen.count(False) >= 8
    assert seen.count(True) >= 2  # killed after the replacement, and not killed at all
    fresh = tmp_path / "fresh"
    assert child(KILLED, str(fresh), "3").returncode == -signal.SIGKILL
    with pytest.raises(ResourceError, match="did not finish"):
        open_index(fresh)
    make(fresh, "bm25")
    assert sorted(p.name for p in fresh.iterdir())[:2] == sorted([".lock", read_manifest(fresh).generation])


FULL = """
import resource, sys
from flowc.backends.vector import build_index
from flowc.backends.embed.hashing import HashingEmbedder
from flowc.ir.errors import ResourceError

resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]),) * 2)
try:
    texts = [f"new passage {n} " + "x" * 50 for n in range(300)]
    build_index(texts, HashingEmbedder(64), sys.argv[1], kind=sys.argv[2])
except ResourceError as e:
    print(e)
"""


@pytest.mark.parametrize(("kind", "room"), [("flat", 1000), ("flat", 30_000), ("bm25", 1000), ("bm25", 20_000)])
def test_no_room_on_the_disk_keeps_the_old_index(tmp_path: Path, kind: str, room: int) -> None:
    out = tmp_path / "index"
    make(out, kind)
    before = sorted(p.name for p in out.rglob("*"))
    done = child(FULL, str(out), kind, str(room))
    assert "error[F060]" in done.stdout, (done.stdout, done.stderr)
    assert "the index that was there is unchanged" in done.stdout
    assert sorted(p.name for p in out.rglob("*")) == before
    assert texts_of(out) == set(TEXTS)


def test_a_reader_that_meets_a_builder_gets_one_index_or_the_other(tmp_path: Path) -> None:
    out = tmp_path / "index"
    make(out, "bm25")
    stop = threading.Event()
    errors: list[BaseException] = []

    def build() -> None:
        turn = 0
        while not stop.is_set():
            turn += 1
            make(out, "bm25", TEXTS if turn % 2 else TEXTS[:20])

    def read() -> None:
        try:
            for _ in range(60):
                assert texts_of(out) in (set(TEXTS), set(TEXTS[:20]))
        except BaseException as e:
            errors.append(e)

    builder = threading.Thread(target=build)
    builder.start()
    read()
    stop.set()
    builder.join()
    assert errors == []


def test_text_comes_back_as_it_went_in(tmp_path: Path) -> None:
    odd = [
        Passage('quote " and \\ and\nline\r\n\u2028 \x00 \U0001f40d', "títle", "a/b c.html", "k1"),
        Passage("\ud800 half"),
    ]
    build_index(odd, None, tmp_path / "i")
    index = open_index(tmp_path / "i")
    (docs,) = index.search([SearchRequest("quote", 1)])
    assert isinstance(docs, Docs)
    assert (docs[0].text, docs[0].title, docs[0].source) == (odd[0].text, odd[0].title, odd[0].source)
    assert index.store.row(0)["key"] == "k1"
    assert index.store.row(1)["text"] == "? half"

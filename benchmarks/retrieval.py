"""What a search of inverted lists costs, by how many come at once: flowc beside plain FAISS, same index, one run.

    python benchmarks/retrieval.py [--json FILE] [--repeat N] [--quick]
    python benchmarks/retrieval.py --vectors V.npy --queries Q.npy [--nlist 2048] ...   # a corpus of your own

Without arguments the corpus is the bundled Python documentation (16,425 passages, MiniLM, fp16 lists) under its FAQ
questions and index entries. A larger one comes from `benchmarks/static_vectors.py`. Figures are microseconds a query,
the median over interleaved rounds, with the quartiles: processor time of the process first (a busy machine moves it
less), wall time after it. Each round draws other queries, and every system gets the same ones. One thread everywhere.

    faiss one by one   index.search of one query after another
    faiss batched      index.search of all at once, which scans query by query
    one call           lists ranked by us, one preassigned call, results ordered by us: what flowc did before
    flowc              Lists.search, which picks its form by what it measured
    flowc by query, flowc by list    the same with the form fixed
    flowc in 8 pieces  begin, eight scans of an eighth of the lists each, finish

Before anything is timed, scores of all are compared: they must be the same bits.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
import numpy.typing as npt

from flowc.backends.vector.bundle import find_bundle, read_bundle
from flowc.backends.vector.scan import Lists, load_faiss
from flowc.ir.errors import ResourceError

F32 = npt.NDArray[np.float32]
SEED = 20_26
faiss = load_faiss()


class Fixed:
    """Scans every wave in one form."""

    def __init__(self, by_list: bool) -> None:
        self.form = by_list
        self.now = time.thread_time

    def by_list(self, share: float, keep: int, codes: int) -> bool:
        return self.form

    def learn(self, *_: Any) -> None:
        pass


def bundled() -> tuple[str, F32, F32]:
    bundle = read_bundle(find_bundle())
    assert bundle.vectors is not None
    vectors = np.asarray(bundle.vectors, dtype=np.float32)
    questions = [q.text for q in bundle.queries()]
    pick = np.random.default_rng(SEED).permutation(len(questions))[:1500]
    try:
        from flowc.backends.embed import open_embedder

        embedder = open_embedder(bundle.embedder)
        return "pydocs, its own questions", vectors, embedder.embed([questions[i] for i in pick])
    except ResourceError:
        near = vectors[::11]
        return "pydocs, its own vectors as queries: no embedder is installed, this is easier", vectors, near


def build(vectors: F32, nlist: int, path: Path) -> None:
    """The lists as `build_index` makes them, so that plain FAISS and flowc read one file."""
    dim = vectors.shape[1]
    quantizer = faiss.IndexFlatIP(dim)
    codec = faiss.ScalarQuantizer.QT_fp16
    index = faiss.IndexIVFScalarQuantizer(quantizer, dim, nlist, codec, faiss.METRIC_INNER_PRODUCT, False)
    index.cp.seed = SEED
    index.train(vectors)
    index.add(vectors)
    faiss.write_index(index, str(path))


def one_call(lists: Lists, index: Any, queries: F32, k: int, nprobe: int) -> F32:
    """Scores by one preassigned call over lists that were ranked query by query; results ordered in numpy."""
    keep = k + 6
    probed = np.stack([lists.nearest_lists(query, nprobe, k)[:nprobe] for query in queries])
    coarse = np.zeros(probed.shape, dtype=np.float32)
    scores = np.empty((len(queries), keep), dtype=np.float32)
    ids = np.empty((len(queries), keep), dtype=np.int64)
    params = faiss.SearchParametersIVF(nprobe=nprobe)
    ptr = faiss.swig_ptr
    index.search_preassigned_c(
        len(queries), ptr(queries), keep, ptr(probed), ptr(coarse), ptr(scores), ptr(ids), False, params
    )
    out = []
    for row in range(len(queries)):
        order = np.lexsort((ids[row], -scores[row]))[:k]
        out.append(scores[row][order])
    return np.stack(out)


def in_pieces(lists: Lists, queries: F32, k: int, nprobe: int, pieces: int) -> F32:
    searches = lists.begin_many(queries, [k] * len(queries), [nprobe] * len(queries))
    cuts = [round(n * nprobe / pieces) for n in range(pieces + 1)]
    for start, end in itertools.pairwise(cuts):
        lists.run([(search, range(start, end)) for search in searches])
    return np.stack([lists.finish(search)[0] for search in searches])


def systems(path: Path, k: int, nprobe: int) -> dict[str, Callable[[F32], F32]]:
    """Name -> function from queries to scores of shape (queries, k)."""

    def opened() -> Any:
        return faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)

    plain, params = opened(), faiss.SearchParametersIVF(nprobe=nprobe)
    free, by_query, by_list, pieces = (Lists(opened()) for _ in range(4))
    by_query._forms = Fixed(False)  # type: ignore[assignment]
    by_list._forms = Fixed(True)  # type: ignore[assignment]

    def one_by_one(queries: F32) -> F32:
        return np.concatenate([plain.search(queries[n : n + 1], k, params=params)[0] for n in range(len(queries))])

    def searched(lists: Lists, queries: F32) -> F32:
        count = len(queries)
        return np.stack([scores for scores, _ in lists.search(queries, [k] * count, [nprobe] * count)])

    return {
        "faiss one by one": one_by_one,
        "faiss batched": lambda q: plain.search(q, k, params=params)[0],
        "one call": lambda q: one_call(free, plain, q, k, nprobe),
        "flowc": functools.partial(searched, free),
        "flowc by query": functools.partial(searched, by_query),
        "flowc by list": functools.partial(searched, by_list),
        "flowc in 8 pieces": lambda q: in_pieces(pieces, q, k, nprobe, 8),
    }


def quartiles(values: list[float]) -> tuple[float, float, float]:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return round(low, 1), round(middle, 1), round(high, 1)


def measure(
    path: Path, queries: F32, batch: int, k: int, nprobe: int, repeat: int, rng: np.random.Generator
) -> list[dict[str, Any]]:
    made = systems(path, k, nprobe)

    def draw() -> F32:
        return np.ascontiguousarray(queries[rng.choice(len(queries), batch, replace=batch > len(queries))])

    first = draw()
    expected = made["faiss batched"](first)
    for name, system in made.items():
        if not np.array_equal(system(first), expected):
            raise SystemExit(f"{name}: other scores than FAISS at batch {batch}, nprobe {nprobe}")
    for _ in range(2):
        warm = draw()
        for system in made.values():
            system(warm)
    for _ in range(6 if batch > 1 else 0):  # it has tried each of its forms then
        made["flowc"](draw())
    cpu: dict[str, list[float]] = {name: [] for name in made}
    wall: dict[str, list[float]] = {name: [] for name in made}
    turns = max(1, 16 // batch)  # short runs are timed several at a time
    for number in range(repeat):
        batches = [draw() for _ in range(turns)]
        names = list(made)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            system = made[name]
            c, w = time.process_time(), time.perf_counter()
            for drawn in batches:
                system(drawn)
            cpu[name].append((time.process_time() - c) / (turns * batch) * 1e6)
            wall[name].append((time.perf_counter() - w) / (turns * batch) * 1e6)
    index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
    probed = index.quantizer.search(draw(), nprobe)[1]
    share = round(probed.size / len(np.unique(probed)), 2)
    best = min(statistics.median(cpu["faiss one by one"]), statistics.median(cpu["faiss batched"]))
    return [
        {
            "batch": batch,
            "nprobe": nprobe,
            "k": k,
            "share": share,
            "system": name,
            "cpu_us": quartiles(cpu[name]),
            "wall_us": quartiles(wall[name]),
            "times_faiss": round(best / statistics.median(cpu[name]), 2),
        }
        for name in made
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--repeat", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="fewer sizes and rounds")
    parser.add_argument("--vectors", type=Path, help="unit vectors, (count, dim), .npy")
    parser.add_argument("--queries", type=Path, help="unit vectors, .npy")
    parser.add_argument("--nlist", type=int)
    parser.add_argument("--nprobe", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32, 64, 128, 512])
    parser.add_argument("-k", type=int, nargs="+", default=[10])
    options = parser.parse_args()
    if (options.vectors is None) != (options.queries is None):
        parser.error("--vectors and --queries go together")
    if options.vectors is not None:
        name = options.vectors.stem
        vectors, queries = (np.load(p).astype(np.float32) for p in (options.vectors, options.queries))
    else:
        name, vectors, queries = bundled()
    if options.quick:
        options.repeat, options.batch, options.nprobe = 5, [1, 32, 128], [16]
    nlist = options.nlist or 2 ** round(np.log2(3 * np.sqrt(len(vectors))))
    faiss.omp_set_num_threads(os.cpu_count() or 1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lists.faiss"
        build(vectors, nlist, path)
        faiss.omp_set_num_threads(1)
        about = {
            "corpus": name,
            "vectors": len(vectors),
            "dim": int(vectors.shape[1]),
            "nlist": nlist,
            "codec": "fp16",
            "queries": len(queries),
            "python": platform.python_version(),
            "faiss": faiss.__version__,
            "numpy": np.__version__,
            "processor": processor(),
            "load": os.getloadavg()[0],
            "rounds": options.repeat,
            "seed": SEED,
        }
        print("  ".join(f"{key} {value}" for key, value in about.items()), file=sys.stderr)
        rng = np.random.default_rng(SEED)
        rows = []
        for nprobe in options.nprobe:
            for k in options.k:
                for batch in options.batch:
                    found = measure(path, queries, batch, k, nprobe, options.repeat, rng)
                    rows += found
                    print(f"\nbatch {batch}, nprobe {nprobe}, k {k}: each list wanted {found[0]['share']} times")
                    for row in found:
                        c, w = row["cpu_us"], row["wall_us"]
                        print(
                            f"  {row['system']:18} {c[1]:8.1f} us cpu ({c[0]:.1f} to {c[2]:.1f}), {w[1]:8.1f} us wall "
                            f"({w[0]:.1f} to {w[2]:.1f}), {row['times_faiss']:.2f} times the better FAISS"
                        )
    if options.json:
        options.json.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")


if __name__ == "__main__":
    main()

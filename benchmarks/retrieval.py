"""What a search of inverted lists costs, by how many come at once: flowc beside plain FAISS, same index, one run.

    python benchmarks/retrieval.py [--json FILE] [--quick]                   # the bundled Python documentation
    python benchmarks/retrieval.py --vectors V.npy --queries Q.npy [...]     # a corpus of your own, unit vectors

Without arguments the corpus is small enough for the processor's cache (16,425 passages, MiniLM), so that reading a list
once for many gains nothing. A large one: passages of real text, one JSON object a line, through
`benchmarks/static_vectors.py`, which says what its vectors are. One thread everywhere.

    faiss one by one   index.search of one query after another
    faiss batched      index.search of all at once, which scans query by query
    flowc              Lists.search of all at once, which picks its form by what it measured

A point is a number of queries at once, an nprobe and a k. The systems take turns, each with the same few batches in a
row; the order of turns rotates, each turn draws other queries. Given are microseconds a query, median and quartiles
over turns: processor time of the thread (a busy machine moves it less), and wall time. `times_faiss` is the better
FAISS of a turn over flowc, median and quartiles. Before anything is timed, scores are compared: the same bits.

Also: fp16 lists beside fp32; a search in 8 pieces beside the same search in one, alone with cold caches and 32 at once;
latency of single searches while batches are scanned; a scan and matrix products of a decode's shape side by side.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import threading
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
from flowc.runtime.compute import processor as tokens
from flowc.runtime.protocols import ScanBudget

F32 = npt.NDArray[np.float32]
Search = Callable[[F32], Any]
SEED = 20_26
AT_LEAST = {64: 1.15, 512: 1.6}  # what `times_faiss` is to reach with so many queries at once
FLOOR = 0.95  # and with any number
faiss = load_faiss()


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


def build(vectors: F32, nlist: int, folder: Path) -> dict[str, Path]:
    """One set of lists in both codecs, as `build_index` makes them, so that plain FAISS and flowc read one file."""
    dim = vectors.shape[1]
    quantizer = faiss.IndexFlatIP(dim)
    flat = faiss.IndexIVFFlat(quantizer, dim, nlist, faiss.METRIC_INNER_PRODUCT)
    flat.cp.seed = SEED
    flat.train(vectors)
    kind = faiss.ScalarQuantizer.QT_fp16
    half = faiss.IndexIVFScalarQuantizer(quantizer, dim, nlist, kind, faiss.METRIC_INNER_PRODUCT, False)
    half.train(vectors)
    paths = {}
    for name, index in (("fp16", half), ("fp32", flat)):
        index.add(vectors)
        paths[name] = folder / f"{name}.faiss"
        faiss.write_index(index, str(paths[name]))
    return paths


def opened(path: Path) -> Any:
    return faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)


class Points:
    """Plain FAISS and flowc over one index, timed at many points."""

    def __init__(self, path: Path, queries: F32, seconds: float) -> None:
        self.plain = opened(path)
        self.lists = Lists(opened(path))
        self.queries = queries
        self.seconds = seconds  # a point may take, about
        self.rng = np.random.default_rng(SEED)

    def draw(self, count: int) -> F32:
        return np.ascontiguousarray(self.queries[self.rng.integers(len(self.queries), size=count)])

    def systems(self, k: int, nprobe: int) -> dict[str, Search]:
        """Name -> function from queries to results: FAISS's pair of arrays, or a pair for each query."""
        params = faiss.SearchParametersIVF(nprobe=nprobe)
        plain, lists = self.plain, self.lists

        return {
            "faiss one by one": lambda q: [plain.search(q[n : n + 1], k, params=params) for n in range(len(q))],
            "faiss batched": lambda q: plain.search(q, k, params=params),
            "flowc": lambda q: lists.search(q, [k] * len(q), [nprobe] * len(q)),
        }

    def measure(self, batch: int, nprobe: int, k: int) -> dict[str, Any]:
        made = self.systems(k, nprobe)
        first = self.draw(batch)
        expected = np.concatenate([scores for scores, _ in made["faiss one by one"](first)])
        if not np.array_equal(np.stack([scores for scores, _ in made["flowc"](first)]), expected):
            raise SystemExit(f"flowc: other scores than FAISS at batch {batch}, nprobe {nprobe}, k {k}")
        for _ in range(9 if batch > 1 else 2):  # it has tried each of its forms then
            made["flowc"](self.draw(batch))
        began = time.thread_time()
        made["faiss batched"](self.draw(batch))
        cost = 3 * (time.thread_time() - began)
        turns = max(1, min(32 // batch, int(self.seconds / cost / 5)))
        rounds = max(3, min(15, int(self.seconds / (cost * turns))))
        cpu: dict[str, list[float]] = {name: [] for name in made}
        wall: dict[str, list[float]] = {name: [] for name in made}
        names = list(made)
        for number in range(rounds):
            batches = [self.draw(batch) for _ in range(turns)]
            for name in names[number % 3 :] + names[: number % 3]:
                c, w = timed(made[name], batches)
                cpu[name].append(c / batch)
                wall[name].append(w / batch)
        best = min(names[:2], key=lambda name: statistics.median(cpu[name]))
        times = [a / b for a, b in zip(cpu[best], cpu["flowc"], strict=True)]
        probed = self.plain.quantizer.search(self.draw(batch), nprobe)[1]
        return {
            "batch": batch,
            "nprobe": nprobe,
            "k": k,
            "share": round(probed.size / len(np.unique(probed)), 2),
            "rounds": rounds,
            "cpu_us": {name: quartiles(values) for name, values in cpu.items()},
            "wall_us": {name: quartiles(values) for name, values in wall.items()},
            "times_faiss": quartiles(times, 3),
            "better_faiss": best,
            "wanted": AT_LEAST.get(batch, FLOOR),
        }

    # ---------------------------------------------------------------------------------------- pieces
    def pieces(self, queries: F32, k: int, nprobe: int, count: int) -> None:
        searches = self.lists.begin_many(queries, [k] * len(queries), [nprobe] * len(queries))
        for n in range(count):
            ranks = range(n * nprobe // count, (n + 1) * nprobe // count)
            self.lists.run([(search, ranks) for search in searches])
        for search in searches:
            self.lists.finish(search)

    def split(self, batch: int, nprobe: int, k: int, rounds: int, cold: bool) -> dict[str, Any]:
        """What begin, 1 or 8 scans, and finish cost; `cold`: 64 MB of other numbers were read before each."""
        junk = np.ones(16 << 20, dtype=np.float32)
        cost: dict[int, list[float]] = {1: [], 8: []}
        for number in range(rounds):
            queries = self.draw(batch)
            for count in (1, 8) if number % 2 else (8, 1):
                junk.sum() if cold else self.pieces(queries, k, nprobe, count)
                began = time.thread_time()
                self.pieces(queries, k, nprobe, count)
                cost[count].append((time.thread_time() - began) * 1e6 / batch)
        return {
            "batch": batch,
            "nprobe": nprobe,
            "k": k,
            "caches": "cold" if cold else "warm",
            "cpu_us": {f"in {count}": quartiles(values) for count, values in cost.items()},
            "times_whole": quartiles([b / a for a, b in zip(cost[1], cost[8], strict=True)], 3),
        }

    # ---------------------------------------------------------------------------------------- under load
    def under_load(self, nprobe: int, k: int, seconds: float) -> dict[str, Any]:
        """Latency of single searches, 200 a second, while batches of 32 are scanned without end in steps of 1 ms."""
        ended = threading.Event()
        scanned = 0

        def load() -> None:
            nonlocal scanned
            while not ended.is_set():
                searches = self.lists.begin_many(self.draw(32), [k] * 32, [nprobe] * 32)
                while not all(search.done for search in searches):
                    with tokens.hold():
                        self.lists.scan(searches, ScanBudget(seconds=0.001))
                scanned += 32

        queries = [self.draw(1) for _ in range(int(200 * seconds))]
        found: dict[str, list[float]] = {}
        for name in ("alone", "under load"):
            thread = threading.Thread(target=load)
            if name == "under load":
                thread.start()
            found[name] = []
            for query in queries:
                began = time.perf_counter()
                with tokens.hold():
                    self.lists.search(query, [k], [nprobe])
                took = time.perf_counter() - began
                found[name].append(took * 1e6)
                time.sleep(max(0.0, 0.005 - took))
        ended.set()
        thread.join()
        rows = {
            name: {f"p{p}_us": round(float(np.percentile(values, p)), 1) for p in (50, 90, 99)}
            for name, values in found.items()
        }
        times = {name: round(row["p99_us"] / row["p50_us"], 2) for name, row in rows.items()}
        return {"nprobe": nprobe, "k": k, "searches": len(queries), "beside": scanned, **rows, "p99_by_p50": times}

    # ---------------------------------------------------------------------------------------- beside a decode
    def beside(self, nprobe: int, k: int, seconds: float) -> dict[str, Any]:
        """Processor time a unit of work of two threads, alone and side by side.

        One searches 32 at a time; the other multiplies 8 rows with 24 matrices of 1,024 x 1,024, the products of a step
        of a small model's decode.
        """
        rng = np.random.default_rng(SEED)
        layers = [rng.standard_normal((1024, 1024), dtype=np.float32) for _ in range(24)]
        state = rng.standard_normal((8, 1024), dtype=np.float32)

        def scan() -> None:
            queries = self.draw(32)
            with tokens.hold():
                self.lists.search(queries, [k] * 32, [nprobe] * 32)

        def decode() -> None:
            with tokens.hold():
                for layer in layers:
                    for n in range(0, 1024, 32):  # small enough that no library starts threads of its own
                        _ = state @ layer[:, n : n + 32]

        def cost(work: Callable[[], None], out: list[float]) -> None:
            faiss.omp_set_num_threads(1)
            end, count = time.perf_counter() + seconds, 0
            began = time.thread_time()
            while time.perf_counter() < end:
                work()
                count += 1
            out.append((time.thread_time() - began) / count * 1e6)

        rows: dict[str, dict[str, list[float]]] = {w: {"alone": [], "beside": []} for w in ("scan", "decode")}
        for _ in range(5):
            cost(scan, rows["scan"]["alone"])
            cost(decode, rows["decode"]["alone"])
            threads = [
                threading.Thread(target=cost, args=(work, rows[name]["beside"]))
                for name, work in (("scan", scan), ("decode", decode))
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        return {
            name: {
                "cpu_us": {how: quartiles(values) for how, values in row.items()},
                "lost": round(statistics.median(row["beside"]) / statistics.median(row["alone"]) - 1, 3),
            }
            for name, row in rows.items()
        }


def timed(system: Search, batches: list[F32]) -> tuple[float, float]:
    """Microseconds a batch: of this thread's processor time, and on the wall."""
    c, w = time.thread_time(), time.perf_counter()
    for batch in batches:
        system(batch)
    count = len(batches)
    return (time.thread_time() - c) / count * 1e6, (time.perf_counter() - w) / count * 1e6


def quartiles(values: list[float], digits: int = 1) -> tuple[float, float, float]:
    """Median first, then the first and third quartile."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return round(middle, digits), round(low, digits), round(high, digits)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="a tenth of the points")
    parser.add_argument("--seconds", type=float, default=2.5, help="of processor time for a point (default 2.5)")
    parser.add_argument("--vectors", type=Path, help="unit vectors, (count, dim), .npy")
    parser.add_argument("--queries", type=Path, help="unit vectors, .npy")
    parser.add_argument("--name", help="what the vectors are, for the record")
    parser.add_argument("--nlist", type=int)
    parser.add_argument("--nprobe", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32, 64, 128, 512])
    parser.add_argument("-k", type=int, nargs="+", default=[1, 10, 100])
    options = parser.parse_args()
    if (options.vectors is None) != (options.queries is None):
        parser.error("--vectors and --queries go together")
    if options.vectors is not None:
        vectors, queries = (np.load(p).astype(np.float32) for p in (options.vectors, options.queries))
        name = options.name or options.vectors.stem
    else:
        name, vectors, queries = bundled()
    if options.quick:
        options.batch, options.nprobe, options.k, options.seconds = [1, 32, 512], [64], [10], 1.0
    nlist = options.nlist or 2 ** round(np.log2(3 * np.sqrt(len(vectors))))
    with tempfile.TemporaryDirectory() as folder:
        faiss.omp_set_num_threads(os.cpu_count() or 1)
        paths = build(vectors, nlist, Path(folder))
        faiss.omp_set_num_threads(1)
        report: dict[str, Any] = {
            "corpus": name,
            "vectors": len(vectors),
            "dim": int(vectors.shape[1]),
            "nlist": nlist,
            "queries": len(queries),
            "python": platform.python_version(),
            "faiss": faiss.__version__,
            "numpy": np.__version__,
            "processor": processor(),
            "cores": tokens.count,
            "load": os.getloadavg()[0],
            "seed": SEED,
        }
        print("  ".join(f"{key} {value}" for key, value in report.items()), file=sys.stderr)
        half = Points(paths["fp16"], queries, options.seconds)
        report["fp16"] = [
            shown(half.measure(batch, nprobe, k), "fp16")
            for nprobe in options.nprobe
            for k in options.k
            for batch in options.batch
        ]
        full = Points(paths["fp32"], queries, options.seconds)
        nprobe, k = options.nprobe[len(options.nprobe) // 2], options.k[len(options.k) // 2]
        report["fp32"] = [shown(full.measure(batch, nprobe, k), "fp32") for batch in options.batch]
        del full
        rounds = 40 if options.quick else 150
        report["pieces"] = [
            half.split(1, nprobe, k, rounds, cold=True),
            half.split(32, nprobe, k, rounds // 8, cold=False),
        ]
        for row in report["pieces"]:
            print(f"batch {row['batch']}, {row['caches']}: in 8 pieces {row['times_whole'][0]} times what in one takes")
        seconds = 2.0 if options.quick else 10.0
        report["under_load"] = half.under_load(nprobe, k, seconds)
        print(f"single searches, p99 by p50: {report['under_load']['p99_by_p50']}")
        report["beside"] = half.beside(nprobe, k, seconds / 10)
        print("side by side, processor time lost:", {name: row["lost"] for name, row in report["beside"].items()})
    rows = report["fp16"]
    report["missed"] = [
        {key: row[key] for key in ("batch", "nprobe", "k", "times_faiss", "wanted")}
        for row in rows
        if row["times_faiss"][0] < row["wanted"]
    ]
    print(f"{len(rows) - len(report['missed'])} of {len(rows)} points reach what is wanted of them")
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


def shown(row: dict[str, Any], codec: str) -> dict[str, Any]:
    cost = "  ".join(f"{name} {value[0]:.0f}" for name, value in row["cpu_us"].items())
    times, low, high = row["times_faiss"]
    mark = "" if times >= row["wanted"] else f"  below {row['wanted']}"
    print(
        f"{codec}  batch {row['batch']:3}  nprobe {row['nprobe']:3}  k {row['k']:3}  share {row['share']:5}  us cpu a "
        f"query: {cost}  {times:.2f} times ({low:.2f} to {high:.2f}){mark}",
        flush=True,
    )
    return row


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")


if __name__ == "__main__":
    main()

"""Lookahead on real text: what a prediction covers of the search to come, and what that is worth under a byte bound.

    python benchmarks/lookahead.py [--json FILE] [--queries N] [--corpus PASSAGES.jsonl] [--quick]

Two corpora. *pydocs*: the bundled Python documentation in MiniLM's space, under its FAQ's questions and index entries.
*docstrings*: those of the Python files installed here (or the passages of `--corpus`), each without its first line,
which is the question, in static vectors (see static_vectors.py). 512 or 1,024 lists, one in 16 probed.

Part 1, hit rates: which of the lists that a search probes, and of its ten results, lie in the lists that a prediction
names. Everything is computed, nothing simulated. "HyDE" would have a model write a hypothetical answer; here the first
40 words of the right passage stand in for it, which is kinder to the search than a model's text would be.

Also: after which share of its lists a search has its result, in two orders.

Part 2, time under a bound: programs that ask, write 40 words and search run in virtual time over a *simulated* device.
The cache, the lookahead, the scans and their results are the real ones, and each result is compared with the CPU's,
bit for bit; times come from the model below, in which each byte of the index stands for as many as make it 64 GB. The
share of the bound's cost that is hidden: (t_demand - t) / (t_demand - t_resident), with t the mean time of a search.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import os
import platform
import re
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
import numpy.typing as npt

from flowc.backends.embed import open_embedder
from flowc.backends.vector.bundle import find_bundle, read_bundle
from flowc.backends.vector.confidence import put_first
from flowc.backends.vector.device.cache import ListCache
from flowc.backends.vector.device.hybrid import HostLists, HybridScanner
from flowc.backends.vector.device.lookahead import AHEAD, WORDS, Lookahead
from flowc.backends.vector.device.simulated import SimulatedDevice, VirtualTime
from flowc.backends.vector.scan import Lists, load_faiss

F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]
SEED = 20_26
K = 10
ANSWER_WORDS = 40
SINGLE = (10**9,)  # words after which a single prediction is made anew: never
BUDGETS = (1, 2, 4)  # lists predicted, in units of nprobe

# The simulated machine: a PCIe 4 link, a GPU, and a socket of CPU cores beside it. Bytes a second.
INDEX_BYTES, LINK, DEVICE, CPU = 64e9, 25e9, 2e12, 40e9
LAUNCH_S, WORDS_PER_S = 60e-6, 100.0


@dataclass(frozen=True)
class Question:
    text: str
    answer: list[str]  # the right passage's first words

    def after(self, words: int) -> str:
        """What is known once so many words of the answer are written."""
        return " ".join([self.text, *self.answer[:words]])


@dataclass
class Corpus:
    name: str
    about: str
    vectors: F32
    passages: list[str]
    questions: list[Question]
    embed: Any  # texts -> unit vectors
    nlist: int
    lists: Lists = None  # type: ignore[assignment]

    @property
    def nprobe(self) -> int:
        return self.nlist // 16


# ------------------------------------------------------------------------------------------------ corpora
def pydocs(count: int) -> Corpus:
    bundle = read_bundle(find_bundle())
    assert bundle.vectors is not None
    passages = [p.text for p in bundle.passages]
    rng = np.random.default_rng(SEED)
    faq, index = bundle.queries("faq"), bundle.queries("index")
    some = [*faq[: count // 2], *(index[i] for i in rng.permutation(len(index))[: count - min(count // 2, len(faq))])]
    questions = [Question(q.text, passages[q.relevant[0]].split()[:ANSWER_WORDS]) for q in some]
    questions = [questions[i] for i in rng.permutation(len(questions))]
    embedder = open_embedder(bundle.embedder)
    vectors = np.asarray(bundle.vectors, dtype=np.float32)
    return Corpus("pydocs", "Python documentation, MiniLM", vectors, passages, questions, embedder.embed, 512)


_DOCSTRING = re.compile(r'^[ ]*(?:async )?(?:def|class)[^\n]*:\n\s+[rR]?"""(.*?)"""', re.M | re.S)


def docstrings(most: int) -> Iterator[tuple[str, str]]:
    """First line and rest of docstrings in the files of the standard library and the installed packages, by path."""
    seen = set()
    for root in (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")):
        for file in sorted(Path(root).rglob("*.py")):
            if file.stat().st_size > 400_000 or "test" in str(file.relative_to(root)):
                continue
            for match in _DOCSTRING.finditer(file.read_text("utf-8", "replace")):
                first, _, rest = match[1].strip().partition("\n")
                words = rest.split()
                if len(first.split()) >= 4 and len(words) >= 25 and first not in seen:
                    seen.add(first)
                    yield first, " ".join(words[:120])
                    if len(seen) == most:
                        return


def large(file: Path | None, count: int, most: int) -> Corpus:
    """A larger corpus in static vectors; see static_vectors.py."""
    from static_vectors import embed, token_vectors, tokens_of
    from tokenizers import Tokenizer

    from flowc.backends.embed.minilm import find_minilm

    if file is None:
        pairs = list(docstrings(most))
        name, about = "docstrings", "docstrings of the Python files installed here, static vectors"
    else:
        rows = (json.loads(line)["text"].split() for line in file.open(encoding="utf-8"))
        long = (words for words in rows if len(words) >= 35)
        pairs = [(" ".join(words[:8]), " ".join(words[8:])) for words in long][:most]
        name, about = (
            file.resolve().parent.name,
            "passages without their first eight words, which are the question, static vectors",
        )
    folder = find_minilm()
    if folder is None:
        raise SystemExit("the package with MiniLM's weights is not installed")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    table = token_vectors(folder, tokenizer, 256)
    texts = [rest for _, rest in pairs]
    tokens = tokens_of(tokenizer, texts)
    df = np.zeros(len(table))
    for ids in tokens:
        df[np.unique(ids)] += 1
    weight = np.log((len(tokens) + 1) / (df + 1)).astype(np.float32)

    def vectors(some: Sequence[str]) -> F32:
        return np.asarray(embed(tokens_of(tokenizer, list(some)), table, weight), dtype=np.float32)

    pick = np.random.default_rng(SEED).permutation(len(pairs))[:count]
    questions = [Question(pairs[i][0], pairs[i][1].split()[:ANSWER_WORDS]) for i in pick]
    rows = embed(tokens, table, weight).astype(np.float32)
    return Corpus(name, about, rows, texts, questions, vectors, 1024)


def index(corpus: Corpus) -> None:
    faiss = load_faiss()
    dim = corpus.vectors.shape[1]
    quantizer = faiss.IndexFlatIP(dim)
    codec = faiss.ScalarQuantizer.QT_fp16
    made = faiss.IndexIVFScalarQuantizer(quantizer, dim, corpus.nlist, codec, faiss.METRIC_INNER_PRODUCT, False)
    made.own_fields = True
    quantizer.this.disown()
    made.cp.seed = SEED
    faiss.omp_set_num_threads(1)
    made.cp.min_points_per_centroid = 1
    made.train(corpus.vectors[:: max(1, len(corpus.vectors) // (50 * corpus.nlist))])
    made.add(corpus.vectors)
    corpus.lists = Lists(made)


class Texts:
    """Each text's vector and its nearest lists, computed once."""

    def __init__(self, corpus: Corpus) -> None:
        self.corpus = corpus
        self.vectors: dict[str, F32] = {}
        self._near: dict[str, I64] = {}

    def learn(self, texts: Sequence[str]) -> None:
        new = [text for text in dict.fromkeys(texts) if text not in self.vectors]
        for start in range(0, len(new), 64):
            part = new[start : start + 64]
            self.vectors |= dict(zip(part, np.ascontiguousarray(self.corpus.embed(part), np.float32), strict=True))

    def near(self, text: str) -> I64:
        """The lists nearest to a text, as many as a prediction names."""
        if text not in self._near:
            most = AHEAD * self.corpus.nprobe
            self._near[text] = self.corpus.lists.nearest_lists(self.vectors[text], most, 0)
        return self._near[text]

    def plan(self, texts: Sequence[str]) -> list[tuple[I64, int] | None]:
        return [(self.near(" ".join(text.split())), self.corpus.nprobe) for text in texts]


# ------------------------------------------------------------------------------------------------ part 1
def rewrites(corpus: Corpus, texts: Texts) -> dict[str, list[tuple[list[str], str]]]:
    """By kind of rewrite, for each question: the texts to predict from, the earliest first, and what is searched."""
    rng = np.random.default_rng(SEED)
    texts.learn([q.text for q in corpus.questions])
    edits, grown, answers, alone = [], [], [], []
    for q in corpus.questions:
        words = q.text.split()
        kept = [w for w in words if rng.random() > 0.3] or words[:1]
        edits.append(([q.text], " ".join(kept)))
        _, ids = corpus.lists.search(texts.vectors[q.text][None], [1], [corpus.nprobe])[0]
        top = corpus.passages[int(ids[0])].split()
        grown.append(([q.text], " ".join([*words, *rng.choice(top, 3).tolist()])))
        steps = [q.text, *(q.after(n) for n in WORDS if n < ANSWER_WORDS)]
        answers.append((steps, q.after(ANSWER_WORDS)))
        alone.append((steps, " ".join(q.answer)))
    return {
        "30 % of the words dropped": edits,
        "3 words of the best passage added": grown,
        "question + answer": answers,
        "answer alone (HyDE)": alone,
    }


def hit_rates(corpus: Corpus, texts: Texts) -> list[dict[str, Any]]:
    out = []
    for kind, rows in rewrites(corpus, texts).items():
        texts.learn([text for steps, final in rows for text in (*steps, final)])
        finals = np.stack([texts.vectors[final] for _, final in rows])
        found = corpus.lists.search(finals, [K] * len(rows), [corpus.nprobe] * len(rows))
        probed = [corpus.lists.nearest_lists(vector, corpus.nprobe, 0) for vector in finals]
        homes = [np.array([int(corpus.lists.clusters_of(np.array([i]))[0]) for i in ids.tolist()]) for _, ids in found]
        for step in range(max(len(steps) for steps, _ in rows)):
            words = (0, *WORDS)[step]
            for budget in BUDGETS:
                lists, results, whole = [], [], []
                for (steps, _), probe, home in zip(rows, probed, homes, strict=True):
                    named = texts.near(steps[step])[: budget * corpus.nprobe]
                    lists.append(np.isin(probe, named).mean())
                    results.append(np.isin(home, named).mean())
                    whole.append(bool(np.isin(home, named).all()))
                row = {"search": kind, "words": words, "budget": budget, "lists": float(np.mean(lists))}
                out.append(row | {"results": float(np.mean(results)), "all results": float(np.mean(whole))})
    return out


def measured_chances(corpus: Corpus, texts: Texts) -> list[list[float]]:
    """How often a list of a prediction is probed, by words known and rank: what `lookahead.CHANCES` rounds."""
    edges = np.array([0, 0.25, 0.5, 1, 2, 4]) * corpus.nprobe
    out = []
    for words in (0, *(n for n in WORDS if n < ANSWER_WORDS)):
        hits = np.zeros(AHEAD * corpus.nprobe)
        for q in corpus.questions:
            probe = texts.near(q.after(ANSWER_WORDS))[: corpus.nprobe]
            hits += np.isin(texts.near(q.after(words)), probe)
        share = hits / len(corpus.questions)
        out.append([float(share[int(a) : int(b)].mean()) for a, b in itertools.pairwise(edges)])
    return out


def settled(corpus: Corpus, texts: Texts) -> list[dict[str, Any]]:
    """After which share of its lists a search has its result, with the nearest lists first, and with those first that
    held the ten hits of the question's own search."""
    out = []
    for order in ("nearest first", "earlier hits first"):
        after = []
        for q in corpus.questions[:100]:
            search = corpus.lists.begin(texts.vectors[q.after(ANSWER_WORDS)], K, corpus.nprobe)
            if order == "earlier hits first":
                _, ids = corpus.lists.search(texts.vectors[q.text][None], [K], [corpus.nprobe])[0]
                put_first(search, ids.tolist())
            tops = []
            for rank in range(search.units):
                corpus.lists.run([(search, [rank])])
                tops.append(corpus.lists.best(search)[1].tolist())
            after.append((tops.index(tops[-1]) + 1) / search.units)
        shares = {f"by {part:.0%}": float(np.mean([a <= part for a in after])) for part in (0.1, 0.2, 0.3, 0.5)}
        out.append({"order": order, "mean": float(np.mean(after)), **shares})
    return out


# ------------------------------------------------------------------------------------------------ part 2
def simulate(
    corpus: Corpus,
    texts: Texts,
    expected: Mapping[str, tuple[list[float], list[int]]],
    *,
    policy: str,
    cap: float,
    programs: int,
) -> dict[str, Any]:
    """The times of searches of `programs` programs at once under a bound of `cap` times the index's bytes.

    Policies: "resident" (all lists, no bound), "demand" (lists by past searches alone), "single" (and one prediction
    from the question, as TeleRAG), "streaming" (and predicted again while the answer is written).
    """
    lists = corpus.lists
    size = int(lists.sizes.sum()) * lists.dim * 2
    scale = INDEX_BYTES / size
    clock = VirtualTime()
    device = SimulatedDevice(
        memory_bytes=1 << 40,
        link_rate=LINK / scale,
        scan_rate=DEVICE / scale,
        launch_s=LAUNCH_S,
        ring_bytes=int(64e6 / scale) or 1,
        jitter=0.1,
        seed=SEED,
        clock=clock,
    )
    source = HostLists(lists)
    code_s = lists.dim * 2 * scale / CPU
    bound = int((2.0 if policy == "resident" else cap) * size)
    # A list of 244 vectors, which is usual, wastes an eighth in pages of 32; so do these shorter ones.
    page = 2 ** max(1, round(np.log2(lists.count / lists.nlist / 7.6)))
    cache = ListCache(device, source, bound, page=page, code_s=code_s, threads=False)
    cache.learn = lambda codes, seconds: None  # type: ignore[method-assign]  # the CPU's time is the model's
    scanner = HybridScanner(source, cache)
    ahead = Lookahead(cache, texts.plan, threads=False, words=WORDS if policy == "streaming" else SINGLE)
    lists.accelerator = scanner

    def elapse(until: float) -> None:
        cache.pump()
        while (arrival := device.arrival_s()) is not None and arrival <= until:
            clock.now_s = max(clock.now_s, arrival)
            cache.pump()
        clock.now_s = max(clock.now_s, until)
        cache.pump()

    if policy == "resident":
        for number in np.flatnonzero(lists.sizes).tolist():
            cache._demand[number] = 1.0
        cache._plan()
        elapse(1e3)
    took: list[float] = []
    rng = np.random.default_rng(SEED)
    waiting = list(reversed(corpus.questions))
    warm = len(waiting) // 3  # questions after which times count
    events: list[tuple[float, int, int, Question]] = []  # when, program, words written, about what
    for program in range(programs):
        heapq.heappush(events, (clock.now_s + 0.1 * rng.random(), program, 0, waiting.pop()))
    window = ANSWER_WORDS / WORDS_PER_S
    done = 0
    while events:
        when, program, words, q = heapq.heappop(events)
        elapse(when)
        if words == 0 and policy in ("single", "streaming"):
            ahead.predict(program, q.text, window)
        if 0 < words <= len(q.answer) and policy == "streaming":
            ahead.follow(program, " ".join(q.answer[:words]) + " ")
        if words < ANSWER_WORDS:
            heapq.heappush(events, (when + 1 / WORDS_PER_S, program, words + 1, q))
            continue
        final = q.after(ANSWER_WORDS)
        before, began = cache.stats(), clock.now_s
        scores, ids = lists.search(texts.vectors[final][None], [K], [corpus.nprobe])[0]
        assert (scores.tolist(), ids.tolist()) == expected[final], "a result differs from the CPU's"
        missed = cache.stats().missed_codes - before.missed_codes
        seconds = max(clock.now_s - began, missed * code_s)
        clock.now_s = began + seconds
        done += 1
        if done > warm:
            took.append(seconds)
        ahead.release(program)
        if waiting:
            heapq.heappush(events, (clock.now_s + 0.1 * rng.random(), program, 0, waiting.pop()))
    lists.accelerator = None
    stats = cache.stats()
    assert scanner.failure is None
    cache.close()
    visits = max(1, stats.hits + stats.misses)
    return {
        "policy": policy,
        "cap": cap,
        "programs": programs,
        "mean_ms": 1e3 * float(np.mean(took)),
        "p99_ms": 1e3 * float(np.quantile(took, 0.99)),
        "hits": stats.hits / visits,
        "copied_gb_a_search": stats.copied_bytes * scale / 1e9 / done,
        "wasted": stats.wasted_bytes / max(1, stats.copied_bytes),
        "unproven": scanner.unproven,
    }


def curves(corpus: Corpus, texts: Texts, caps: Sequence[float], programs: Sequence[int]) -> list[dict[str, Any]]:
    finals = [q.after(ANSWER_WORDS) for q in corpus.questions]
    texts.learn([q.after(n) for q in corpus.questions for n in (0, *WORDS)])
    expected = {}
    for final in finals:
        scores, ids = corpus.lists.search(texts.vectors[final][None], [K], [corpus.nprobe])[0]
        expected[final] = scores.tolist(), ids.tolist()
    out = []
    for many in programs:
        best = simulate(corpus, texts, expected, policy="resident", cap=1.0, programs=many)
        out.append(best)
        for cap in caps:
            demand = simulate(corpus, texts, expected, policy="demand", cap=cap, programs=many)
            out.append(demand)
            for policy in ("single", "streaming"):
                row = simulate(corpus, texts, expected, policy=policy, cap=cap, programs=many)
                cost = demand["mean_ms"] - best["mean_ms"]
                out.append(row | {"hidden": (demand["mean_ms"] - row["mean_ms"]) / cost})
    return out


# ------------------------------------------------------------------------------------------------ output
def show(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    def text(value: Any) -> str:
        return "" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)

    table = [list(columns), *([text(row.get(c)) for c in columns] for row in rows)]
    widths = [max(len(row[n]) for row in table) for n in range(len(columns))]
    for row in table:
        print("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--corpus", type=Path, help="passages, one JSON object with `text` a line")
    parser.add_argument("--passages", type=int, default=100_000, help="most passages of the larger corpus")
    parser.add_argument("--quick", action="store_true", help="pydocs alone, 40 questions")
    options = parser.parse_args()
    began = time.perf_counter()
    count = 40 if options.quick else options.queries
    caps, programs = ((0.1,), (1,)) if options.quick else ((0.05, 0.1, 0.2), (1, 4))
    makers: list[Callable[[], Corpus]] = [lambda: pydocs(count)]
    if not options.quick:
        makers.append(lambda: large(options.corpus, count, options.passages))
    report: dict[str, Any] = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "faiss": load_faiss().__version__,
        "seed": SEED,
        "simulated_machine": {
            "index_bytes": INDEX_BYTES,
            "link": LINK,
            "device_scan": DEVICE,
            "cpu_scan": CPU,
            "launch_s": LAUNCH_S,
            "words_per_s": WORDS_PER_S,
        },
        "corpora": [],
    }
    for make in makers:
        corpus = make()
        index(corpus)
        texts = Texts(corpus)
        size = len(corpus.vectors)
        print(f"{corpus.name}: {size:,} passages, {corpus.nlist} lists, {corpus.nprobe} probed ({corpus.about})\n")
        rates = hit_rates(corpus, texts)
        show(rates, ("search", "words", "budget", "lists", "results", "all results"))
        orders = settled(corpus, texts)
        show(orders, tuple(orders[0]))
        chances = measured_chances(corpus, texts)
        print(f"  probability by rank: {[[round(c, 2) for c in row] for row in chances]}\n")
        rows = curves(corpus, texts, caps, programs)
        columns = "policy cap programs mean_ms p99_ms hits hidden copied_gb_a_search wasted unproven".split()
        show(rows, columns)
        about = {"name": corpus.name, "about": corpus.about, "passages": size, "questions": len(corpus.questions)}
        about |= {"nlist": corpus.nlist, "nprobe": corpus.nprobe}
        report["corpora"].append(about | {"hit_rates": rates, "settled": orders, "chances": chances, "simulated": rows})
        print(
            f"  {time.perf_counter() - began:.0f} s so far, {time.process_time():.0f} of the processor\n",
            file=sys.stderr,
        )
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

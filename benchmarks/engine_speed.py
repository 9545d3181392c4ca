"""The engine beside transformers and llama.cpp on one machine: same weights, same requests, greedy, float32.

    python benchmarks/engine_speed.py [--json FILE] [--minutes 6] [--threads 1 2] [--works single decode shared]
                                      [--variants NAME ...] [--serve PYTHON] [--llama PYTHON]

A Qwen3 shape of 113 million random weights. "single": one request. "decode": 16 requests at once, prompts of 30 to 90
tokens. "shared": 16 at once, half of them begin with the same 512 tokens, as prompts of one RAG program do, the others
are those of "decode". "shared-long": the others have 512 tokens of their own.

`generate, one by one`: `model.generate` for each request (on 4 of 16, times 4). `generate, padded`: one left-padded
batch. `generate_batch`: transformers' own continuous batching with the settings that suit a CPU; its defaults are
several times slower. `serve`: `transformers serve --continuous-batching` with the same settings, over HTTP; `--serve`
names the Python whose environment has transformers[serving]. `llama.cpp`: see `llama_cpp_peer.py`; `--llama` names the
Python whose environment has llama-cpp-python. `engine`: ours, with an empty cache each time; `engine, bfloat16`: with
weights and cache in bfloat16, whose answers may differ. Prompts are new in every round, so nobody's cache helps.

Variants take turns until the minutes are over, one round at least after a warm-up; wall and CPU seconds are medians
with quartiles, CPU seconds those of the process that computes. `prefill_s` is the time to the last first token where a
variant can tell it apart, in CPU seconds. `equal` counts answers equal to those of `generate`. `limits` says what the
machine could do at best: the weights read from memory once a step at the measured bandwidth, the products at the
measured peak of a large one.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from flowc.backends.llm.paged.engine import Engine
from flowc.backends.llm.paged.model import PagedModel
from flowc.backends.llm.paged.sequence import Sequence as TokenSequence
from flowc.backends.llm.tiny import write_tiny_model

VOCAB, HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS, DIM = 16_384, 768, 2048, 14, 12, 4, 64
REQUESTS, SAMPLE = 16, 4
CPU_SETTINGS = {"block_size": 32, "max_batch_tokens": 256}


def write_model(folder: Path) -> None:
    """Writes the model, with a tokenizer of as many tokens, for every variant to read."""
    write_tiny_model(folder, layers=1, hidden=64, vocab=VOCAB)
    torch.manual_seed(7)
    config = transformers.Qwen3Config(
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=DIM,
        vocab_size=VOCAB,
        max_position_embeddings=4096,
        initializer_range=0.1,
        tie_word_embeddings=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)


def read_model(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return model.eval()


@dataclass(frozen=True, slots=True)
class Work:
    """Prompts, as tokens and as the text that gives them, and how many tokens each is continued by."""

    prompts: list[list[int]]
    texts: list[str]
    new: int

    def sample(self, count: int) -> Work:
        return Work(self.prompts[:count], self.texts[:count], self.new)


class Words:
    """Prompts of random words whose tokens are the same alone and in a text."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
        vocabulary = sorted(self.tokenizer.get_vocab())
        letters = [w[1:] for w in vocabulary if w.startswith("Ġ")]  # of tokens that begin a word
        self.words = [f" {w}" for w in letters if w.isalpha() and w.isascii()]
        assert len(self.words) > 1000, "prompts of few words would share prefixes"

    def text(self, rng: random.Random, tokens: int) -> str:
        text = ""
        while (missing := tokens - len(self.encode(text))) > 0:
            text += "".join(rng.choices(self.words, k=missing))
        return text

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False) if text else []
        return ids

    def work(self, name: str, seed: int) -> Work:
        rng = random.Random(f"{name}{seed}")
        if name == "single":
            texts, new = [self.text(rng, 64)], 32
        elif name == "decode":
            texts, new = [self.text(rng, rng.randint(30, 90)) for _ in range(REQUESTS)], 48
        else:
            prefix, new = self.text(rng, 512), 24
            texts = []
            for i in range(REQUESTS):
                own = self.text(rng, rng.randint(30, 90))
                texts.append(prefix + own if i % 2 else self.text(rng, 512) + own if name == "shared-long" else own)
        return Work([self.encode(t) for t in texts], texts, new)


@dataclass(slots=True)
class Answer:
    """What a variant wrote, how much of the work that was, and the CPU seconds to its first tokens if it knows."""

    tokens: list[list[int]] | list[str]
    prefill_s: float | None = None
    share: float = 1.0
    cpu_s: float | None = None  # where another process computes


@dataclass(slots=True)
class Variant:
    """A way to run work. `works` are those it is measured on."""

    run: Callable[[Work], Answer]
    works: Sequence[str] = ("single", "decode", "shared", "shared-long")
    around: Callable[[], Any] = field(default=lambda: ExitStack())


# -- transformers


class _FirstToken:
    """A stopping criterion that never stops, but notes when the first token was there."""

    def __init__(self) -> None:
        self.at: float | None = None

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        if self.at is None:
            self.at = time.process_time()
        return torch.zeros(len(input_ids), dtype=torch.bool)


def _generate(model: Any, ids: torch.Tensor, mask: torch.Tensor, new: int) -> tuple[torch.Tensor, float]:
    first, begin = _FirstToken(), time.process_time()
    criteria = transformers.StoppingCriteriaList([first])  # type: ignore[list-item]
    got = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=new, do_sample=False, stopping_criteria=criteria
    )
    assert first.at is not None
    return got, first.at - begin


def one_by_one(model: Any) -> Callable[[Work], Answer]:
    def run(work: Work) -> Answer:
        tokens, prefill = [], 0.0
        some = work.sample(SAMPLE)
        for prompt in some.prompts:
            ids = torch.tensor([prompt])
            got, first = _generate(model, ids, torch.ones_like(ids), work.new)
            tokens.append(got[0, len(prompt) :].tolist())
            prefill += first
        return Answer(tokens, prefill, len(some.prompts) / len(work.prompts))

    return run


def padded(model: Any) -> Callable[[Work], Answer]:
    def run(work: Work) -> Answer:
        width = max(map(len, work.prompts))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in work.prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in work.prompts])
        got, first = _generate(model, ids, mask, work.new)
        return Answer([row[width:].tolist() for row in got], first)

    return run


def continuous(model: Any) -> Callable[[Work], Answer]:
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    def run(work: Work) -> Answer:
        page = CPU_SETTINGS["block_size"]
        blocks = sum(-(-(len(p) + work.new) // page) + 1 for p in work.prompts)
        got = model.generate_batch(
            work.prompts,
            generation_config=transformers.GenerationConfig(
                max_new_tokens=work.new, do_sample=False, eos_token_id=-1, pad_token_id=0
            ),
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=page, num_blocks=blocks + 8, max_batch_tokens=CPU_SETTINGS["max_batch_tokens"]
            ),
        )
        by_prompt = {tuple(o.prompt_ids): list(o.generated_tokens) for o in got.values()}
        return Answer([by_prompt[tuple(p)] for p in work.prompts])

    return run


# -- peers in other processes


def _cpu_of(pid: int) -> float:
    """CPU seconds that a process has used, all its threads (Linux)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def _child(command: list[str], threads: int, **options: Any) -> Iterator[subprocess.Popen[str]]:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    child = subprocess.Popen(command, env=environment, text=True, **options)
    try:
        yield child
    finally:
        child.send_signal(signal.SIGCONT)
        child.terminate()
        child.wait(30)


@contextmanager
def _awake(child: subprocess.Popen[str]) -> Iterator[None]:
    """A peer runs only while it is measured: a server may poll while it waits."""
    child.send_signal(signal.SIGCONT)
    try:
        yield
    finally:
        child.send_signal(signal.SIGSTOP)


def serve(stack: ExitStack, python: str, folder: Path, threads: int) -> Variant:
    """`transformers serve` with continuous batching, started here."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    options += ["--continuous-batching", "--cb-num-blocks", "450"]
    for name, value in (("block-size", "block_size"), ("max-batch-tokens", "max_batch_tokens")):
        options += [f"--cb-{name}", str(CPU_SETTINGS[value])]
    command = [python, "-m", "transformers.cli.transformers", "serve", str(folder), *options]
    child = stack.enter_context(_child(command, threads, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
    root = f"http://127.0.0.1:{port}"
    for _ in range(240):
        try:
            urllib.request.urlopen(f"{root}/health", timeout=1).close()
            break
        except OSError:
            if child.poll() is not None:
                raise RuntimeError("transformers serve ended at once") from None
            time.sleep(0.25)

    def ask(text: str, new: int) -> str:
        body = {"model": str(folder), "prompt": text, "max_tokens": new, "temperature": 0}
        request = urllib.request.Request(
            f"{root}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=600) as reply:
            said: str = json.load(reply)["choices"][0]["text"]
        return said

    def run(work: Work) -> Answer:
        before = _cpu_of(child.pid)
        with ThreadPoolExecutor(len(work.texts)) as pool:
            texts = list(pool.map(lambda t: ask(t, work.new), work.texts))
        return Answer(texts, cpu_s=_cpu_of(child.pid) - before)

    return Variant(run, around=lambda: _awake(child))


def llama(stack: ExitStack, python: str, folder: Path, threads: int) -> Variant:
    """llama.cpp over its C interface, the requests side by side in one batch."""
    script = str(Path(__file__).with_name("llama_cpp_peer.py"))
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    child = stack.enter_context(_child([python, script, str(folder), str(threads)], threads, **pipes))
    assert child.stdin is not None
    assert child.stdout is not None
    into, out = child.stdin, child.stdout
    if not out.readline():
        raise RuntimeError("the llama.cpp peer did not start")

    def run(work: Work) -> Answer:
        into.write(json.dumps({"prompts": work.prompts, "new": work.new}) + "\n")
        into.flush()
        reply = json.loads(out.readline())
        return Answer(reply["tokens"], reply["prefill_cpu_s"], cpu_s=reply["cpu_s"])

    return Variant(run, around=lambda: _awake(child))


# -- ours


class Taker:
    """Counts the tokens of one request to its limit."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.tokens: list[int] = []

    def accept(self, sequence: TokenSequence, token: int) -> bool:
        self.tokens.append(token)
        return len(self.tokens) < self.limit

    def targets(self, sequence: TokenSequence) -> list[int]:
        raise AssertionError("nothing is scored here")

    def is_wanted(self, sequence: TokenSequence) -> bool:
        return True

    def ended(self, sequence: TokenSequence, error: Exception | None) -> None:
        if error is not None:
            raise error


def ours(model: Any) -> Callable[[Work], Answer]:
    paged = PagedModel(model, "benchmark")
    paged.pack(REQUESTS * 1024)
    assert paged.fused is not None

    def run(work: Work) -> Answer:
        blocks = sum(-(-(len(p) + work.new) // 16) for p in work.prompts) + 1
        engine = Engine(paged, blocks=blocks, max_step_tokens=256)
        takers = [Taker(work.new) for _ in work.prompts]
        engine.waiting += [
            TokenSequence(list(p), t, order=i) for i, (p, t) in enumerate(zip(work.prompts, takers, strict=True))
        ]
        begin, prefill = time.process_time(), None
        with torch.inference_mode():
            while engine.waiting or engine.running:
                engine.step()
                if prefill is None and all(t.tokens for t in takers):
                    prefill = time.process_time() - begin
        return Answer([t.tokens for t in takers], prefill)

    return run


# -- measuring


def quartiles(values: list[float]) -> list[float]:
    """First quartile, median, third quartile."""
    if len(values) < 2:
        return [round(values[0], 3)] * 3
    return [round(q, 3) for q in statistics.quantiles(values, n=4, method="inclusive")]


@dataclass(slots=True)
class Measured:
    """Times of one variant over one work."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    prefill: list[float] = field(default_factory=list)
    equal: int = 0
    compared: int = 0
    failed: str | None = None

    def row(self, tokens: int) -> dict[str, Any]:
        if self.failed is not None or not self.cpu:
            return {"failed": self.failed or "not run"}
        found: dict[str, Any] = {"wall_s": quartiles(self.wall), "cpu_s": quartiles(self.cpu)}
        cpu = found["cpu_s"][1]
        found["tokens_per_s"] = round(tokens / found["wall_s"][1], 1)
        found["tokens_per_cpu_s"] = round(tokens / cpu, 1)
        if self.prefill:
            found["prefill_cpu_s"] = quartiles(self.prefill)
            found["decode_tokens_per_cpu_s"] = round(tokens / max(1e-9, cpu - found["prefill_cpu_s"][1]), 1)
        return found | {"rounds": len(self.cpu), "equal": f"{self.equal} of {self.compared}"}


def measure(
    variants: dict[str, Variant], names: Sequence[str], words: Words, seconds: float
) -> dict[tuple[str, str], Measured]:
    """Every variant over every work, in turn, round by round until the time is up; one warm-up, one round at least."""
    found = {(n, v): Measured() for n in names for v, variant in variants.items() if n in variant.works}
    for variant in variants.values():
        warm = words.work("single", -1)
        with variant.around():
            variant.run(Work(warm.prompts * 2, warm.texts * 2, 4))
    begin, turn = time.monotonic(), 0
    while not turn or (time.monotonic() - begin) * (turn + 1) / turn < seconds:
        for name in names:
            work = words.work(name, turn)
            expected: list[list[int]] = []
            for label, variant in variants.items():
                into = found.get((name, label))
                if into is None or into.failed is not None:
                    continue
                with variant.around():
                    wall, cpu = time.perf_counter(), time.process_time()
                    try:
                        answer = variant.run(work)
                    except Exception as error:  # a peer that does not run here is named, not hidden
                        into.failed = f"{type(error).__name__}: {error}"[:300]
                        continue
                    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
                into.wall.append(wall / answer.share)
                into.cpu.append((cpu if answer.cpu_s is None else answer.cpu_s) / answer.share)
                if answer.prefill_s is not None:
                    into.prefill.append(answer.prefill_s / answer.share)
                tokens = [t if not isinstance(t, str) else _known(t, work.new, words, expected) for t in answer.tokens]
                expected = expected or tokens
                into.equal += sum(a == b for a, b in zip(tokens, expected, strict=False))
                into.compared += min(len(tokens), len(expected))
                print(
                    f"{turn} {name:12} {label:22} {into.wall[-1]:8.2f} s wall {into.cpu[-1]:8.2f} s CPU",
                    file=sys.stderr,
                )
        turn += 1
    return found


def _known(text: str, new: int, words: Words, expected: list[list[int]]) -> list[int]:
    """The expected answer whose text this is, or no answer."""
    return next(
        (e for e in expected if words.tokenizer.decode(e, skip_special_tokens=True).strip() == text.strip()), []
    )


def limits() -> dict[str, Any]:
    """The machine's memory bandwidth and peak product, and the least time that they allow."""

    def best(run: Callable[[], Any], repeat: int) -> float:
        times = []
        for _ in range(repeat):
            begin = time.perf_counter()
            run()
            times.append(time.perf_counter() - begin)
        return min(times)

    big, square = torch.ones(64 << 20), torch.ones(1536, 1536)
    bandwidth = big.numel() * 4 / best(big.sum, 5)
    peak = 2 * len(square) ** 3 / best(lambda: square @ square, 6)
    layer = HIDDEN * DIM * (2 * HEADS + 2 * KV_HEADS) + 3 * HIDDEN * INTERMEDIATE
    body, head = LAYERS * layer, HIDDEN * VOCAB
    step = max((body + head) * 4 / bandwidth, 2 * REQUESTS * (body + head) / peak)
    return {
        "read_gb_per_s": round(bandwidth / 1e9, 1),
        "peak_gflop_per_s": round(peak / 1e9, 1),
        "prefill_tokens_per_s": round(peak / (2 * body), 1),
        "decode_tokens_per_s_at_16": round(REQUESTS / step, 1),
        "decode_tokens_per_s_at_1": round(bandwidth / ((body + head) * 4), 1),
    }


def machine() -> dict[str, Any]:
    """Where and on what this was measured."""
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "load": [round(x, 1) for x in os.getloadavg()],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def compare(options: argparse.Namespace, folder: Path, threads: int, seconds: float) -> dict[str, Any]:
    """One table: all variants with so many threads."""
    torch.set_num_threads(threads)
    words = Words(folder)
    with ExitStack() as stack:
        variants: dict[str, Variant] = {"generate, one by one": Variant(one_by_one(read_model(folder)))}
        batched = ("decode", "shared", "shared-long")
        variants["generate, padded"] = Variant(padded(read_model(folder)), batched)
        variants["generate_batch"] = Variant(continuous(read_model(folder)), batched)
        if options.serve:
            variants["serve"] = serve(stack, options.serve, folder, threads)
        if options.llama:
            variants["llama.cpp"] = llama(stack, options.llama, folder, threads)
        variants["engine"] = Variant(ours(read_model(folder)))
        variants["engine, bfloat16"] = Variant(ours(read_model(folder, torch.bfloat16)))
        if options.variants:
            variants = {n: v for n, v in variants.items() if n in options.variants or n == "engine"}
        found = measure(variants, options.works, words, seconds)
    rows: list[dict[str, Any]] = []
    for name in options.works:
        work = words.work(name, 0)
        own = found[name, "engine"]
        for label in variants:
            if (name, label) not in found:
                continue
            row = {"work": name, "variant": label, **found[name, label].row(len(work.prompts) * work.new)}
            if "cpu_s" in row and own.cpu:
                row["engine_is_faster_by"] = round(row["cpu_s"][1] / statistics.median(own.cpu), 2)
            rows.append(row)
    return {"threads": threads, "limits": limits(), "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--minutes", type=float, default=6.0)
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--works", nargs="+", default=["single", "decode", "shared"])
    parser.add_argument("--variants", nargs="+", help="only these, besides the engine")
    parser.add_argument("--serve", help="Python with transformers[serving]")
    parser.add_argument("--llama", help="Python with llama-cpp-python, gguf and safetensors")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    before = machine()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "model"
        write_model(folder)
        seconds = 60 * options.minutes / len(options.threads)
        tables = [compare(options, folder, threads, seconds) for threads in options.threads]
    result = {"machine": before, "load_after": machine()["load"], "tables": tables}
    text = json.dumps(result, indent=1)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()

"""The kernels on a GPU: their tests, their agreement with the references, and what they reach beside torch.

    python benchmarks/gpu.py --json FILE [--seconds 480] [--rehearse]

Ends within `--seconds`: what there is no time for is named. Times are those of a captured CUDA graph of several calls,
so that Python's launching is not in them; the calls of a graph work on different layers or lists, together larger than
the device's cache; the median of the replays. Without a CUDA device it says so, writes that, and ends well.
`--rehearse` runs the same code on tiny shapes in Triton's interpreter and keeps no times: it shows that this file
works, and nothing about speed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
REHEARSE = "--rehearse" in sys.argv
os.environ["TRITON_INTERPRET"] = "1" if REHEARSE else "0"  # read when triton is imported
sys.path.insert(0, str(ROOT / "src"))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

Call = Callable[[int], object]  # one call of what is measured; the number chooses the layer it works on


@dataclass
class Report:
    """What is written at the end. Every entry of `measured` says what it is and in which unit."""

    deadline: float
    device: torch.device
    machine: dict[str, Any] = field(default_factory=dict)
    tests: dict[str, Any] = field(default_factory=dict)
    agreement: list[dict[str, Any]] = field(default_factory=list)
    measured: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def has_time(self, name: str, seconds: float) -> bool:
        """Whether there is time for this; it is noted where there is not."""
        if time.monotonic() + seconds < self.deadline:
            return True
        self.left_out.append(f"{name}: no time")
        return False

    def agrees(self, name: str, got: torch.Tensor, wanted: torch.Tensor, tolerance: float) -> None:
        """Notes the largest error, as a share of max(1, |wanted|)."""
        error = ((got.double() - wanted.double()).abs() / wanted.double().abs().clamp(min=1)).max().item()
        good = error <= tolerance  # false for NaN
        self.agreement.append({"name": name, "error": error, "tolerance": tolerance, "agrees": good})
        print(f"  {'agrees ' if good else 'DIFFERS'}  {name}: {error:.2e} of {tolerance:.0e}", flush=True)

    def measure(self, name: str, variants: dict[str, Call], *, calls: int, work: float, unit: str) -> None:
        """Notes for each variant how much of `work` (bytes or operations a call) it does a second, in `unit`.

        `unit` is "GB/s" or "TFLOP/s". A variant that does not run, for want of memory say, is noted with its error.
        """
        for variant, call in variants.items():
            if not self.has_time(f"{name}, {variant}", 10):
                continue
            entry: dict[str, Any] = {"name": name, "variant": variant}
            try:
                seconds, spread, graph = timed(call, calls, self.device)
            except (RuntimeError, torch.OutOfMemoryError) as e:
                entry["error"] = str(e).splitlines()[0][:200]
            else:
                if not REHEARSE:
                    scale = 1e9 if unit == "GB/s" else 1e12
                    entry |= {"us": seconds * 1e6, "spread_us": spread * 1e6, unit: work / seconds / scale}
                entry["graph"] = graph
            self.measured.append(entry)
            print(
                "  " + ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{v}" for k, v in entry.items()),
                flush=True,
            )


def timed(call: Call, calls: int, device: torch.device, repeat: int = 9) -> tuple[float, float, bool]:
    """Seconds a call: the median, the distance between the quartiles, and whether it ran as a graph."""
    if device.type != "cuda":
        began = time.perf_counter()
        call(0)
        return time.perf_counter() - began, 0.0, False
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiled and warm before anything is captured
        for i in range(min(3, calls)):
            call(i)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph: torch.cuda.CUDAGraph | None = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for i in range(calls):
                call(i)
    except RuntimeError:  # what waits for the device cannot be captured
        torch.cuda.synchronize()
        graph = None
    times = []
    for _ in range(repeat + 1):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        if graph is not None:
            graph.replay()
        else:
            for i in range(calls):
                call(i)
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1e3 / calls)
    quartiles = statistics.quantiles(times[1:], n=4)
    return quartiles[1], quartiles[2] - quartiles[0], graph is not None


# ------------------------------------------------------------------------------------------------ tests
def run_tests(report: Report) -> None:
    """The tests of the kernels, compiled, and of the engine; hypothesis draws shapes, and each is compiled."""
    missing = [name for name in ("pytest", "hypothesis", "pytest_timeout") if importlib.util.find_spec(name) is None]
    if missing:
        report.tests = {"ran": False, "reason": f"not installed: {', '.join(missing)}"}
    elif report.device.type != "cuda":
        report.tests = {"ran": False, "reason": "a rehearsal; `make test` runs them"}
    else:
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "--hypothesis-seed=0",
            "-m",
            "not slow",
        ]
        command += ["-W", "default", "tests/backends/kernels", "tests/backends/llm/paged/test_cuda.py"]
        began = time.monotonic()
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
        except subprocess.TimeoutExpired:
            report.tests = {"ran": False, "reason": "took more than 200 s"}
        else:
            report.tests = {
                "ran": True,
                "passed": done.returncode == 0,
                "seconds": round(time.monotonic() - began, 1),
                "tail": done.stdout.splitlines()[-30 if done.returncode else -1 :],
            }
    print(f"tests: {report.tests}", flush=True)


# ------------------------------------------------------------------------------------------------ attention
@dataclass
class Attention:
    """A pool filled at random and a step over it: sequences alike in how many tokens are cached and how many new."""

    query: torch.Tensor
    data: torch.Tensor
    blocks: list[torch.Tensor]
    new: list[int]
    lengths: list[int]
    batches: tuple[Any, ...]


def attention(
    batch: int, context: int, new: int, *, heads: int, kv_heads: int, dim: int, layers: int, dtype: Any, device: Any
) -> Attention:
    """A step with its plan, blocks of 16 in random order."""
    from flowc.backends.kernels import paged_attention as pa

    count = -(-context // 16)
    data = torch.empty(batch * count + 1, layers, 2, 16, kv_heads, dim, dtype=dtype, device=device).normal_()
    order = (torch.randperm(batch * count, device=device) + 1).view(batch, count)
    blocks = list(order.unbind())
    query = torch.randn(batch * new, heads, dim, device=device).to(dtype)
    rows, lengths = [new] * batch, [context] * batch
    splits = pa.split_count(context)
    batches = pa.plan(
        rows,
        lengths,
        blocks,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=dim,
        dtype=dtype,
        device=query.device,
        splits=splits,
    )
    return Attention(query, data, blocks, rows, lengths, batches)


def check_attention(report: Report, dtype: torch.dtype, tolerance: float) -> None:
    """Prefill over a prefix and decode, plain and with everything, against float64."""
    from flowc.backends.kernels import paged_attention as pa

    sinks = torch.randn(8, device=report.device)
    cases: list[tuple[str, dict[str, Any]]] = [
        ("plain", {}),
        ("window, softcap, sinks", {"window": 100, "softcap": 30.0, "sinks": sinks}),
    ]
    for dim in (64,) if REHEARSE else (64, 96, 128, 256):
        for new in (1, 40):
            step = attention(2, 150, new, heads=8, kv_heads=2, dim=dim, layers=2, dtype=dtype, device=report.device)
            for label, options in cases:
                got = pa.paged_attention(step.query, step.data, 1, step.batches, **options)
                wanted = pa.paged_attention_reference(
                    step.query, step.data, 1, step.new, step.lengths, step.blocks, **options
                )
                name = f"attention, {'decode' if new == 1 else 'prefill'}, {dtype}, dim {dim}, {label}"
                report.agrees(name, got, wanted, tolerance)


def measure_attention(report: Report, dtype: torch.dtype) -> None:
    """Decode by bytes of keys and values read, prefill by operations; heads as in Llama 3 8B."""
    from flowc.backends.kernels import paged_attention as pa

    shape: dict[str, Any] = {"heads": 32, "kv_heads": 8, "dim": 128, "dtype": dtype, "device": report.device}
    past_cache_bytes = 0 if REHEARSE else 2**28
    decodes = [(1, 1024), (1, 16384), (16, 1024), (64, 1024), (64, 8192)]
    prefills = [(1, 4096, 4096), (8, 512, 512), (8, 2560, 512)]
    if REHEARSE:
        decodes, prefills = [(1, 40)], [(1, 24, 8)]
        shape |= {"heads": 2, "kv_heads": 1, "dim": 16}
    for batch, context, new in [(b, c, 1) for b, c in decodes] + prefills:
        name = f"{'decode' if new == 1 else 'prefill'}: {batch} x {new} new of {context} tokens, {dtype}"
        if not report.has_time(name, 20):
            continue
        heads, kv_heads, dim = shape["heads"], shape["kv_heads"], shape["dim"]
        read_bytes = 2 * batch * context * kv_heads * dim * dtype.itemsize
        layers = max(2, -(-past_cache_bytes // read_bytes))
        step = attention(batch, context, new, layers=layers, **shape)
        key, value = (
            torch.randn(layers, batch, kv_heads, context, dim, device=report.device).to(dtype) for _ in range(2)
        )
        query = step.query.view(batch, new, heads, dim).transpose(1, 2).contiguous()
        hidden = context - new  # torch's causal mask is aligned to the top left: only right without a prefix
        variants: dict[str, Call] = {
            "flowc, paged": lambda i, s=step, n=layers: pa.paged_attention(s.query, s.data, i % n, s.batches)
        }
        if new == 1 or not hidden:
            variants["torch, contiguous cache"] = lambda i, q=query, k=key, v=value, causal=new > 1: (
                F.scaled_dot_product_attention(q, k[i % len(k)], v[i % len(v)], is_causal=causal, enable_gqa=True)
            )
        if new == 1:
            work, unit = float(read_bytes), "GB/s"
        else:
            pairs = batch * sum(range(hidden + 1, context + 1))
            work, unit = 4.0 * pairs * heads * dim, "TFLOP/s"
        report.measure(name, variants, calls=max(layers, 16 if new == 1 else 4), work=work, unit=unit)
        del step, key, value, query, variants


# ------------------------------------------------------------------------------------------------ copies
def check_and_measure_copies(report: Report, dtype: torch.dtype) -> None:
    """The device's own copy, then writes into the cache and copies of blocks beside torch's indexing."""
    from flowc.backends.kernels import block_copy, kv_write

    device = report.device
    size = 2**10 if REHEARSE else 2**29
    halves = torch.zeros(2, size, dtype=torch.int16, device=device)
    report.measure(
        "copy of 1 GiB",
        {"torch": lambda i: halves[i % 2].copy_(halves[1 - i % 2])},
        calls=4,
        work=4.0 * size,
        unit="GB/s",
    )
    tokens, blocks, moved, kv_heads, dim = (16, 8, 3, 2, 16) if REHEARSE else (8192, 1024, 256, 8, 128)
    layers = 2 if REHEARSE else 8
    data = torch.randn(blocks, layers, 2, 16, kv_heads, dim, device=device).to(dtype)
    key, value = (torch.randn(tokens, kv_heads, dim, device=device).to(dtype) for _ in range(2))
    place = torch.randperm(blocks * 16, device=device)[:tokens]
    block, offset = place // 16, place % 16
    expected = data.clone()
    kv_write.kv_write_reference(key, value, expected, 1, block, offset)
    kv_write.kv_write(key, value, data, 1, block, offset)
    report.agrees(f"kv_write, {dtype}", data, expected, 0.0)
    report.measure(
        f"kv_write of {tokens} tokens, {dtype}",
        {
            "flowc": lambda i: kv_write.kv_write(key, value, data, i % layers, block, offset),
            "torch": lambda i: kv_write.kv_write_reference(key, value, data, i % layers, block, offset),
        },
        calls=layers,
        work=4.0 * key.numel() * dtype.itemsize,
        unit="GB/s",
    )
    chosen = torch.randperm(blocks, device=device)[:moved]
    staged = block_copy.gather_blocks(data, chosen)
    report.agrees(f"gather_blocks, {dtype}", staged, data[chosen], 0.0)
    expected.copy_(data)
    order = chosen.flip(0)
    block_copy.scatter_blocks(staged, data, order)
    expected[order] = staged
    report.agrees(f"scatter_blocks, {dtype}", data, expected, 0.0)
    del expected
    work = 2.0 * staged.numel() * dtype.itemsize
    report.measure(
        f"gather of {moved} blocks of {staged[0].numel() * dtype.itemsize / 2**20:.2f} MiB",
        {
            "flowc": lambda _: block_copy.gather_blocks(data, chosen, staged),
            "torch": lambda _: torch.index_select(data, 0, chosen, out=staged),
        },
        calls=4,
        work=work,
        unit="GB/s",
    )


# ------------------------------------------------------------------------------------------------ scan
def check_and_measure_scan(report: Report, dtype: torch.dtype) -> None:
    """Agreement on a few lists; then lists of 240 vectors under 1 to 128 queries, beside a product with everything."""
    from flowc.backends.kernels import page_scan as ps

    device = report.device
    dim, page = (24, 32) if REHEARSE else (384, 64)
    lists = 12 if REHEARSE else 4096
    held = 2 if REHEARSE else 4  # pages a list
    total = lists * held
    if dtype == torch.int8:
        vectors = torch.randint(-127, 128, (total, page, dim), device=device).to(dtype)
    else:
        vectors = F.normalize(torch.randn(total, page, dim, device=device), dim=-1).to(dtype)
    pages = ps.Pages(
        vectors,
        torch.arange(total * page, device=device).view(total, page),
        torch.full((total,), page - 4, dtype=torch.int32, device=device),
        torch.full((total,), 1 / 127, device=device) if dtype == torch.int8 else None,
    )
    resident = {number: list(range(number * held, (number + 1) * held)) for number in range(lists)}
    queries = F.normalize(torch.randn(128, dim, device=device), dim=-1)
    for metric in ("ip", "l2"):
        kind: Any = metric
        work = ps.plan_scan([[0, 3, 5], [1]], resident, page_size=page, device=device)
        got, _ = ps.page_scan(queries, pages, work, 16, metric=kind)
        wanted, _ = ps.page_scan_reference(queries, pages, work, 16, metric=kind)
        report.agrees(f"page_scan, {dtype}, {metric}", got, wanted, 1e-5)
    for count, probed in [(2, 3)] if REHEARSE else [(1, 64), (32, 64), (128, 64)]:
        works = [
            ps.plan_scan(
                [torch.randperm(lists)[:probed].tolist() for _ in range(count)], resident, page_size=page, device=device
            )
            for _ in range(1 if REHEARSE else 8)
        ]
        asked = queries[:count].contiguous()
        launches = []
        for work in works:
            scores = torch.empty(len(work.query), 16, device=device)
            ids = torch.empty(len(work.query), 16, dtype=torch.int64, device=device)
            launches.append(ps.launch_of(asked, pages, work, 16, "ip", scores, ids))
        variants: dict[str, Call] = {
            "flowc, scan": lambda i, made=launches: made[i % len(made)].run(),
            "flowc, scan and merge": lambda i, w=works, q=asked: ps.page_scan(q, pages, w[i % len(w)], 16),
        }
        if dtype in (torch.float16, torch.bfloat16):  # reads every list, probed or not: another amount of work
            flat, half = vectors.view(-1, dim), asked.to(dtype)
            variants["torch, product with all and topk"] = lambda _, f=flat, h=half: torch.topk(h @ f.T, 16)
        name = f"page_scan of {probed} of {lists} lists for {count} queries, {dtype} (GB/s of the pages asked for)"
        size = float(count * probed * held * page * dim * dtype.itemsize)
        report.measure(name, variants, calls=8, work=size, unit="GB/s")


# ------------------------------------------------------------------------------------------------ all of it
def machine(device: torch.device) -> dict[str, Any]:
    """Hardware and versions."""
    triton_version = importlib.import_module("triton").__version__ if importlib.util.find_spec("triton") else None
    about: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton_version,
        "cuda": torch.version.cuda,
        "device": "none (interpreted)",
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        about |= {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "processors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
        }
        query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,clocks.max.mem,power.limit", "--format=csv"]
        try:
            said = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False).stdout
            about["nvidia_smi"] = re.split(r"\s*\n\s*", said.strip())
        except OSError:
            pass
    return about


def main() -> int:
    """0 when everything agreed, or when there is no device; 1 when a test failed or a kernel differed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where the results go")
    parser.add_argument("--seconds", type=float, default=480, help="end within this time")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes in the interpreter, no times")
    options = parser.parse_args()
    if not (REHEARSE or torch.cuda.is_available()):
        said = "no CUDA device here: nothing was run and nothing measured; `make test` runs the kernels interpreted"
        print(said)
        if options.json:
            options.json.write_text(json.dumps({"ran": False, "reason": said}, indent=1) + "\n", encoding="utf-8")
        return 0
    device = torch.device("cpu" if REHEARSE else "cuda")
    report = Report(time.monotonic() + options.seconds - 15, device)
    torch.manual_seed(0)
    report.machine = machine(device)
    print(report.machine, flush=True)
    # The interpreter is wrong for products of bfloat16, silently; a device is asked for both.
    dtypes = [(torch.float16, 2e-3)] if REHEARSE else [(torch.float16, 2e-3), (torch.bfloat16, 1.6e-2)]
    steps: list[tuple[str, Callable[[], None]]] = []
    for dtype, tolerance in dtypes:
        steps.append((f"agreement of attention, {dtype}", partial(check_attention, report, dtype, tolerance)))
    steps.append(("copies", partial(check_and_measure_copies, report, dtypes[-1][0])))
    steps.append(("attention", partial(measure_attention, report, dtypes[-1][0])))
    stored = (torch.float16, torch.int8, torch.float32, torch.bfloat16)
    steps += [(f"scan, {dtype}", partial(check_and_measure_scan, report, dtype)) for dtype in stored]
    steps.append(("tests", partial(run_tests, report)))
    errors = []
    for name, step in steps:
        if report.has_time(name, 205 if name == "tests" and not REHEARSE else 15):
            print(name, flush=True)
            try:
                step()
            except Exception as e:  # the others are worth having
                errors.append(f"{name}: {type(e).__name__}: {e}"[:500])
                print(f"  {errors[-1]}", flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    found = {name: getattr(report, name) for name in ("machine", "tests", "agreement", "measured", "left_out")}
    if options.json:
        whole = {"ran": True, "rehearsal": REHEARSE, **found, "errors": errors}
        options.json.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    differing = [entry["name"] for entry in report.agreement if not entry["agrees"]]
    print(
        f"{len(report.agreement)} comparisons, {len(differing)} differ; errors: {errors}; left out: {report.left_out}"
    )
    return 1 if differing or errors or report.tests.get("passed") is False else 0


if __name__ == "__main__":
    sys.exit(main())

"""What a node costs: whole programs of no-op nodes in flowc, asyncio by hand, LangGraph, Burr and Hamilton, in one run.

    python benchmarks/overhead.py [--json FILE] [--repeat N] [--quick]

Shapes: a chain of 100 nodes, a fan-out of 100, a loop of 100 turns. Microseconds a node: the median over interleaved
rounds, with the quartiles. Then: how long compiling takes, up to 20,000 nodes; and 64 programs at once whose 5 nodes
each wait 5 ms on an async tool. Peers that are not installed are left out and named. One core, nothing else running.

"flowc" is the default level: plain Python calls, fused. "flowc, unfused" are the same nodes as tools, a scheduler turn
each (a tool that declares nothing is ordered like any Python). Nodes of the fan-out get different arguments, or flowc
would call one of them once. "flowc, async body" is the very function of the asyncio column under the decorator.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import importlib.metadata
import importlib.util
import itertools
import json
import linecache
import os
import platform
import statistics
import sys
import time
import types
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

N = 100
Run = Callable[[], Any]


def module(name: str, source: str) -> types.ModuleType:
    """A module made from text whose source can be looked up."""
    filename = f"<benchmark {name}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    made = types.ModuleType(name)
    made.__file__ = filename
    sys.modules[name] = made
    exec(compile(source, filename, "exec"), made.__dict__)
    return made


def bodies(prefix: str, decorator: str, step: str, is_async: bool) -> str:
    """The three shapes as functions `chain`, `fan_out` and `loop` of one argument."""
    word, wait = ("async def", "await ") if is_async else ("def", "")
    chain = "\n".join(f"    x = {wait}{step}(x)" for _ in range(N))
    if is_async:
        fan = f"    return len(await asyncio.gather({', '.join(f'{step}({i})' for i in range(N))}))"
    else:
        lines = "\n".join(f"    v{i} = {step}({i})" for i in range(N))
        fan = f"{lines}\n    return len([{', '.join(f'v{i}' for i in range(N))}])"
    return f"""
{prefix}
{decorator}
{word} chain(x):
{chain}
    return x

{decorator}
{word} fan_out(x):
{fan}

{decorator}
{word} loop(x):
    for _ in range({N}):
        x = {wait}{step}(x)
    return x
"""


SYNC_STEP = "def step(x):\n    return x\n"
ASYNC_STEP = "async def step(x):\n    return x\n"


def flowc_runs(loop: asyncio.AbstractEventLoop) -> dict[str, dict[str, Run]]:
    head = "import asyncio\nfrom flowc import tool, workflow\n"
    fused = module("bench_fused", bodies(head + SYNC_STEP, "@workflow", "step", False))
    tools = module("bench_tools", bodies(head + "@tool\n" + SYNC_STEP, "@workflow", "step", False))
    body = module("bench_async", bodies(head + ASYNC_STEP, "@workflow", "step", True))

    def awaited(wf: Any) -> Run:
        return lambda: loop.run_until_complete(wf(1))

    found: dict[str, dict[str, Run]] = {"flowc": {}, "flowc, unfused": {}, "flowc, async body": {}}

    def called(wf: Any) -> Run:
        return lambda: wf(1)

    for shape in ("chain", "fan_out", "loop"):
        found["flowc"][shape] = called(getattr(fused, shape))
        found["flowc, unfused"][shape] = called(getattr(tools, shape))
        found["flowc, async body"][shape] = awaited(getattr(body, shape))
    return found


def asyncio_runs(loop: asyncio.AbstractEventLoop) -> dict[str, Run]:
    made = module("bench_asyncio", bodies("import asyncio\n" + ASYNC_STEP, "", "step", True))

    def awaited(fn: Callable[[int], Awaitable[Any]]) -> Run:
        return lambda: loop.run_until_complete(fn(1))

    return {shape: awaited(getattr(made, shape)) for shape in ("chain", "fan_out", "loop")}


def langgraph_runs() -> dict[str, Run]:
    from langgraph.graph import END, START, StateGraph
    from typing_extensions import TypedDict

    class State(TypedDict):
        x: int

    def node(state: State) -> dict[str, int]:
        return {}

    def chain() -> Any:
        g = StateGraph(State)
        for i in range(N):
            g.add_node(f"n{i}", node)
            g.add_edge(START if i == 0 else f"n{i - 1}", f"n{i}")
        g.add_edge(f"n{N - 1}", END)
        return g.compile()

    def fan_out() -> Any:
        g = StateGraph(State)
        for i in range(N):
            g.add_node(f"n{i}", node)
            g.add_edge(START, f"n{i}")
            g.add_edge(f"n{i}", END)
        return g.compile()

    def loop() -> Any:
        g = StateGraph(State)
        g.add_node("n", lambda s: {"x": s["x"] + 1})
        g.add_edge(START, "n")
        g.add_conditional_edges("n", lambda s: END if s["x"] >= N else "n", ["n", END])
        return g.compile()

    config = {"recursion_limit": 2 * N + 10}
    graphs = {"chain": chain(), "fan_out": fan_out(), "loop": loop()}
    return {shape: lambda g=g: g.invoke({"x": 0}, config) for shape, g in graphs.items()}


def burr_runs() -> dict[str, Run]:
    from burr.core import ApplicationBuilder, action, default, expr

    @action(reads=["x"], writes=["x"])
    def node(state: Any) -> Any:
        return state.update(x=state["x"] + 1)

    def build(names: list[str], transitions: list[Any]) -> Any:
        builder = ApplicationBuilder().with_actions(**dict.fromkeys(names, node)).with_transitions(*transitions)
        return builder.with_state(x=0).with_entrypoint(names[0]).build()

    chain_names = [f"n{i}" for i in range(N)]
    chain_steps = [(a, b, default) for a, b in itertools.pairwise(chain_names)]
    loop_steps = [("n", "n", expr(f"x < {N}")), ("n", "end", default)]

    def chain_setup() -> Any:
        return build(chain_names, chain_steps)

    def loop_setup() -> Any:
        return build(["n", "end"], loop_steps)

    # An application is used up by a run, so a round builds and runs one; what building costs is taken off.
    return {
        "chain": _less(lambda: chain_setup().run(halt_after=[chain_names[-1]]), chain_setup),
        "loop": _less(lambda: loop_setup().run(halt_after=["end"]), loop_setup),
    }


class _less:
    """A run whose set-up is timed beside it and subtracted."""

    def __init__(self, run: Run, setup: Run) -> None:
        self.run, self.setup = run, setup

    def __call__(self) -> Any:
        return self.run()


def hamilton_runs() -> dict[str, Run]:
    from hamilton import base, driver

    chain_source = "def n0(x: int) -> int:\n    return x\n" + "".join(
        f"def n{i}(n{i - 1}: int) -> int:\n    return n{i - 1}\n" for i in range(1, N)
    )
    fan_source = "".join(f"def n{i}(x: int) -> int:\n    return x\n" for i in range(N))
    made = {}
    for shape, source, outputs in (
        ("chain", chain_source, [f"n{N - 1}"]),
        ("fan_out", fan_source, [f"n{i}" for i in range(N)]),
    ):
        d = driver.Driver({}, module(f"bench_hamilton_{shape}", source), adapter=base.DefaultAdapter())
        made[shape] = lambda d=d, outputs=outputs: d.execute(outputs, inputs={"x": 1})
    return made


def measure(run: Run, repeat: int) -> list[float]:
    """Seconds of each call."""
    setup = run.setup if isinstance(run, _less) else None
    times = []
    for _ in range(repeat):
        taken = 0.0
        if setup is not None:
            start = time.perf_counter()
            setup()
            taken = time.perf_counter() - start
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start - taken)
    return times


def overhead(rounds: int, repeat: int) -> dict[str, dict[str, Any]]:
    """Microseconds a node, by contender and shape; rounds are interleaved, so that a slow moment hits everybody."""
    loop = asyncio.new_event_loop()
    contenders: dict[str, dict[str, Run]] = {**flowc_runs(loop), "asyncio by hand": asyncio_runs(loop)}
    missing = []
    for name, package, make in (
        ("LangGraph", "langgraph", langgraph_runs),
        ("Burr", "burr", burr_runs),
        ("Hamilton", "hamilton", hamilton_runs),
    ):
        if importlib.util.find_spec(package) is None:
            missing.append(name)
        else:
            contenders[name] = make()
    if missing:
        print(f"not installed, left out: {', '.join(missing)}", file=sys.stderr)
    samples: dict[tuple[str, str], list[float]] = {}
    for shapes in contenders.values():
        for run in shapes.values():
            for _ in range(3):
                run()  # warm: compiled, caches filled
    gc.collect()
    gc.freeze()
    for _ in range(rounds):
        for name, shapes in contenders.items():
            slow = name in ("LangGraph", "Burr", "Hamilton")
            for shape, run in shapes.items():
                samples.setdefault((name, shape), []).extend(measure(run, max(1, repeat // 20) if slow else repeat))
    loop.close()
    table: dict[str, dict[str, Any]] = {name: {} for name in contenders}
    for (name, shape), times in samples.items():
        q1, median, q3 = statistics.quantiles([t / N * 1e6 for t in times], n=4)
        table[name][shape] = {"us_per_node": median, "q1": q1, "q3": q3, "runs": len(times)}
    return table


def compile_times(sizes: list[int]) -> list[dict[str, Any]]:
    """Seconds from Python source to plan at -O2, for chains of operations and plain Python in turn."""
    found = []
    for size in sizes:
        lines = []
        for i in range(size // 4):
            lines += [
                f'    q{i} = f"about {{x}} in step {i}"',
                f"    d{i} = docs.search(q{i}, k=2)",
                f"    n{i} = len(d{i})",
                f'    x = llm.generate(f"{{d{i}}} {{n{i}}} {{q{i}}}", max_tokens=8)',
            ]
        text = (
            "from flowc import LLM, Index, workflow\ndocs = Index('d')\nllm = LLM()\n"
            "@workflow\ndef big(x: str) -> str:\n" + "\n".join(lines) + "\n    return x\n"
        )
        times, nodes = [], 0
        for turn in range(5 if size <= 2000 else 2):
            wf = module(f"bench_compile_{size}_{turn}", text).big
            gc.collect()
            start = time.perf_counter()
            wf.graph()
            captured = time.perf_counter() - start
            compiled = wf.compile(opt=2)
            times.append((time.perf_counter() - start, captured))
            nodes = sum(1 for _ in compiled.compilation.captured.body.ops)
        total, captured = statistics.median(t for t, _ in times), statistics.median(c for _, c in times)
        found.append(
            {
                "statements": size,
                "nodes": nodes,
                "seconds": total,
                "capture_s": captured,
                "us_per_node": total / nodes * 1e6,
            }
        )
    return found


def concurrency(rounds: int) -> dict[str, Any]:
    """64 programs of five nodes that each wait 5 ms on an async tool: wall time over the ideal 25 ms."""
    programs, nodes, wait_s = 64, 5, 0.005
    head = (
        "import asyncio\nfrom flowc import tool, workflow\n"
        f"@tool(reads=())\nasync def wait(x: int) -> int:\n    await asyncio.sleep({wait_s})\n    return x\n"
    )
    body = "".join("    x = await wait(x)\n" for _ in range(nodes))
    made = module(
        "bench_wait",
        f"{head}@workflow\nasync def program(x: int) -> int:\n{body}    return x\n"
        f"async def plain(x):\n{body.replace('wait(x)', 'wait.fn(x)')}    return x\n",
    )
    ideal = nodes * wait_s

    async def by_hand() -> Any:
        return await asyncio.gather(*(made.plain(i) for i in range(programs)))

    async def under_loop() -> Any:
        return await asyncio.gather(*(made.program(i) for i in range(programs)))

    contenders: dict[str, Run] = {
        "flowc .map": lambda: made.program.map(range(programs), concurrency=programs, progress=False),
        "flowc under asyncio": lambda: asyncio.run(under_loop()),
        "asyncio by hand": lambda: asyncio.run(by_hand()),
    }
    if importlib.util.find_spec("langgraph") is not None:
        from langgraph.graph import END, START, StateGraph
        from typing_extensions import TypedDict

        class State(TypedDict):
            x: int

        async def node(state: State) -> dict[str, int]:
            await asyncio.sleep(wait_s)
            return {}

        g = StateGraph(State)
        for i in range(nodes):
            g.add_node(f"n{i}", node)
            g.add_edge(START if i == 0 else f"n{i - 1}", f"n{i}")
        g.add_edge(f"n{nodes - 1}", END)
        app = g.compile()

        async def graphs() -> Any:
            return await asyncio.gather(*(app.ainvoke({"x": i}) for i in range(programs)))

        contenders["LangGraph"] = lambda: asyncio.run(graphs())
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for run in contenders.values():
        run()
    for _ in range(rounds):
        for name, run in contenders.items():
            samples[name] += measure(run, 1)
    return {
        name: {
            "seconds": statistics.median(t),
            "over_ideal": statistics.median(t) / ideal,
            "best_over_ideal": min(t) / ideal,
        }
        for name, t in samples.items()
    }


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "machine": f"{platform.machine()}, {os.cpu_count()} cores"}
    for package in ("flowc", "langgraph", "apache-burr", "apache-hamilton"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "source tree" if package == "flowc" else "not installed"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--repeat",
        type=int,
        default=60,
        help="runs a round of each flowc and asyncio shape; a twentieth for the slow peers",
    )
    parser.add_argument("--quick", action="store_true", help="few rounds, small compiles")
    args = parser.parse_args()
    rounds, repeat = (3, 20) if args.quick else (args.rounds, args.repeat)
    report: dict[str, Any] = {"versions": versions(), "load": os.getloadavg()}
    report["overhead"] = overhead(rounds, repeat)
    report["compile"] = compile_times([100, 1000] if args.quick else [250, 1000, 4000, 20000])
    report["concurrency"] = concurrency(5 if args.quick else 15)
    print(", ".join(f"{k} {v}" for k, v in report["versions"].items()))
    print(f"\n{'microseconds a node, median (quartiles)':42}{'chain':>22}{'fan-out':>22}{'loop':>22}")
    for name, shapes in report["overhead"].items():
        cells = []
        for shape in ("chain", "fan_out", "loop"):
            c = shapes.get(shape)
            cells.append(f"{c['us_per_node']:.2f} ({c['q1']:.2f}-{c['q3']:.2f})" if c else "-")
        print(f"{name:42}" + "".join(f"{c:>22}" for c in cells))
    print("\ncompile to a plan at -O2")
    for row in report["compile"]:
        print(
            f"  {row['nodes']:>6} nodes {row['seconds'] * 1e3:9.0f} ms "
            f"({row['capture_s'] * 1e3:.0f} ms of it capture), {row['us_per_node']:.0f} us a node"
        )
    print("\n64 programs x 5 waits of 5 ms, over the ideal 25 ms: median (best)")
    for name, row in report["concurrency"].items():
        print(f"  {name:24}{row['over_ideal']:.2f} ({row['best_over_ideal']:.2f})")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""The tree over two tiers: every transition of a block, the order of leaving, the engine under pressure."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from flowc.backends.llm.paged.copies import Costs, HandCopier, ThreadCopier  # noqa: E402
from flowc.backends.llm.paged.policies import POLICIES  # noqa: E402
from flowc.backends.llm.paged.pool import KVPool  # noqa: E402
from flowc.backends.llm.paged.prefix_tree import Node, PrefixTree, State  # noqa: E402
from tests.backends.llm.paged.test_exact import drive, engine_for, owner, reference, sequence  # noqa: E402

pytestmark = pytest.mark.models
SIZE = 2


def pool(blocks: int) -> KVPool:
    return KVPool(
        blocks + 1,
        layers=1,
        block_size=SIZE,
        kv_heads=1,
        head_dim=2,
        dtype=torch.float32,
        device=torch.device("cpu"),
        poison=True,
    )


class Stand:
    """A tree, and requests that only come and go."""

    def __init__(self, blocks: int = 8, host: int = 0, policy: str = "workflow", costs: Costs | None = None) -> None:
        self.copier = HandCopier()
        self.pool = pool(blocks)
        self.host = pool(host) if host else None
        copier = self.copier if host else None
        self.tree = PrefixTree(self.pool, POLICIES[policy](), self.host, copier, costs)
        self.mark = 0.0

    def check(self) -> None:
        owners = [0] * len(self.pool.references)
        self.tree.check(owners)
        assert owners[1:] == self.pool.references[1:]
        self.pool.check()

    def visit(self, text: str) -> int:
        """A request reads and fills the blocks of `text`; how many of them were on the device."""
        tokens = [ord(c) for c in text]
        path = self.tree.match(tokens, len(tokens))
        nodes = [n for n in path if n.block is not None]
        self.tree.hold(nodes)
        hits = len(nodes)
        for at in range(len(nodes) * SIZE, len(tokens) // SIZE * SIZE, SIZE):
            block = self.pool.allocate()
            if block is None and self.tree.evict(1):
                block = self.pool.allocate()
            if block is None:
                break
            self.mark += 1
            self.pool.data[block] = self.mark
            nodes.append(self.tree.insert(nodes[-1] if nodes else None, tuple(tokens[at : at + SIZE]), block))
            self.pool.release([block])
        self.tree.let_go(nodes)
        self.check()
        return hits

    def node(self, text: str) -> Node | None:
        path = self.tree.match([ord(c) for c in text], len(text))
        return path[-1] if len(path) == len(text) // SIZE else None

    def state(self, text: str) -> State | None:
        node = self.node(text)
        return node.state if node is not None else None

    def value(self, text: str) -> float:
        node = self.node(text)
        assert node is not None
        return float(self.pool.data[node.device_block].flatten()[0])

    def hint(self, key: str, text: str, steps: float) -> None:
        self.tree.hint(key, [ord(c) for c in text], steps)
        self.check()

    def evict(self, blocks: int = 1) -> int:
        freed = self.tree.evict(blocks)
        self.check()
        return freed

    def copy(self, blocks: int = 100) -> None:
        self.copier.advance(blocks)
        self.tree.poll()
        self.check()


def order(stand: Stand, texts: Sequence[str]) -> list[str]:
    """The order in which the blocks of `texts` go."""
    left, gone = list(texts), []
    while left:
        assert stand.evict() == 1
        now = [t for t in left if stand.state(t) is None]
        assert len(now) == 1
        gone += now
        left.remove(now[0])
    return gone


def test_what_nobody_announced_goes_first_then_the_farthest() -> None:
    stand = Stand()
    for text in ("aa", "bb", "cc", "dd"):
        stand.visit(text)
    stand.hint("p1", "aa", 5)
    stand.hint("p1 too", "bb", 1)
    stand.hint("p2", "cc", 3)
    assert order(stand, ["aa", "bb", "cc", "dd"]) == ["dd", "aa", "cc", "bb"]


def test_of_equal_steps_the_earlier_announcement_is_nearer() -> None:
    stand = Stand()
    for text in ("aa", "bb", "cc"):
        stand.hint(text, text, 2)
        stand.visit(text)
    assert order(stand, ["aa", "bb", "cc"]) == ["cc", "bb", "aa"]


def test_the_nearest_program_counts_and_a_release_is_heard() -> None:
    stand = Stand()
    for text in ("aa", "bb"):
        stand.visit(text)
    stand.hint("p", "aa", 9)
    stand.hint("q", "aa", 1)
    stand.hint("p", "bb", 4)
    assert stand.node("aa").steps == 1  # type: ignore[union-attr]
    stand.tree.release("q")
    stand.check()
    assert stand.node("aa").steps == float("inf"), "p said something else since"  # type: ignore[union-attr]
    assert order(stand, ["aa", "bb"]) == ["aa", "bb"]


def test_steps_come_from_below_and_wait_for_blocks_that_are_not_there_yet() -> None:
    stand = Stand()
    stand.hint("p", "aabbccx", 2)
    stand.visit("aabb")
    assert stand.node("aabb").steps == 2  # type: ignore[union-attr]
    stand.visit("aabbcc")
    stand.visit("aabbdd")
    steps = {t: n.steps for t in ("aa", "aabb", "aabbcc", "aabbdd") if (n := stand.node(t)) is not None}
    assert steps == {"aa": 2, "aabb": 2, "aabbcc": 2, "aabbdd": float("inf")}
    assert stand.evict() == 1
    assert stand.state("aabbdd") is None
    assert stand.evict() == 1
    assert stand.state("aabbcc") is None
    assert stand.node("aabb").steps == 2, "the announcement outlives the block"  # type: ignore[union-attr]
    stand.visit("aabbcc")
    assert stand.node("aabbcc").steps == 2  # type: ignore[union-attr]


def test_a_pin_holds_until_its_time_and_gives_way_when_nothing_else_is_left() -> None:
    stand = Stand()
    for text in ("aa", "bb", "cc"):
        stand.visit(text)
    stand.tree.pin([97, 97], until=10.0)
    stand.tree.pin([98, 98], until=20.0)
    stand.tree.advance(15.0)  # the first has run out, and is the oldest again
    assert order(stand, ["aa", "bb", "cc"]) == ["aa", "cc", "bb"]


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("lru", ["aa", "cc", "bb", "dd"]),
        ("lfu", ["cc", "dd", "bb", "aa"]),
        ("slru", ["cc", "dd", "aa", "bb"]),
        ("pgdsf", ["cc", "dd", "bb", "aa"]),
    ],
)
def test_each_policy_has_its_order(policy: str, expected: list[str]) -> None:
    stand = Stand(policy=policy)
    for text in ("aa", "aa", "aa", "cc", "bb", "bb", "dd"):
        stand.visit(text)
    assert order(stand, ["aa", "bb", "cc", "dd"]) == expected


def test_what_is_dropped_goes_first_but_not_what_others_have_used() -> None:
    stand = Stand()
    for text in ("aa", "bb", "cc", "bb"):
        stand.visit(text)
    for text in ("bb", "cc"):
        stand.tree.drop(stand.tree.match([ord(c) for c in text], 2), 1)
    assert order(stand, ["aa", "bb", "cc"]) == ["cc", "aa", "bb"]
    stand.visit("cc")  # used after all: it counts again
    stand.visit("dd")
    stand.tree.drop(stand.tree.match([ord("d")] * 2, 2), 1)
    assert order(stand, ["cc", "dd"]) == ["dd", "cc"]


def test_pgdsf_forgets_old_glory() -> None:
    stand = Stand(blocks=2, policy="pgdsf")
    for text in ["aa"] * 4 + [f"{c}{c}" for c in "bcdefghi"]:
        stand.visit(text)
    assert stand.state("aa") is None


def test_a_block_goes_to_the_host_and_comes_back_the_same() -> None:
    stand = Stand(blocks=3, host=4)
    stand.visit("aabbcc")
    before = stand.value("aabb"), stand.value("aabbcc")
    assert stand.evict() == 0, "nothing is free before the copy has ended"
    assert [stand.state(t) for t in ("aa", "aabb", "aabbcc")] == [State.OFFLOADING] * 3
    assert stand.visit("aa") == 1, "an offloading block can be read"
    stand.copy(1)
    assert stand.state("aabbcc") is State.OFFLOADING, "a job is done when all of it is"
    stand.copy()
    assert [stand.state(t) for t in ("aa", "aabb", "aabbcc")] == [State.HOST] * 3
    assert stand.pool.free == 3
    path = stand.tree.match([ord(c) for c in "aabbcc"], 6)
    job = stand.tree.load(path)
    assert job is not None
    stand.check()
    assert stand.state("aabbcc") is State.LOADING
    assert stand.evict() == 0, "a loading block cannot go"
    stand.copy(2)
    stand.copy()
    assert stand.state("aabbcc") is State.DEVICE
    assert (stand.value("aabb"), stand.value("aabbcc")) == before
    assert stand.evict(3) == 3, "the host has them still: no second copy"
    assert stand.state("aabbcc") is State.HOST


def test_an_offloading_block_that_is_wanted_again_stays() -> None:
    stand = Stand(blocks=2, host=2)
    stand.visit("aa")
    stand.evict()
    node = stand.node("aa")
    assert node is not None
    stand.tree.hold([node])
    stand.copy()
    assert stand.state("aa") is State.DEVICE
    stand.tree.let_go([node])
    stand.check()
    assert stand.evict() == 1, "and has a copy by now"


def test_a_cancelled_load_keeps_what_has_arrived() -> None:
    stand = Stand(blocks=3, host=4)
    stand.visit("aabbcc")
    stand.evict()
    stand.copy()
    job = stand.tree.load(stand.tree.match([ord(c) for c in "aabbcc"], 6))
    assert job is not None
    stand.copy(1)
    job.is_cancelled = True
    stand.copy(1)
    assert [stand.state(t) for t in ("aa", "aabb", "aabbcc")] == [State.DEVICE, State.HOST, State.HOST]
    assert stand.pool.free == 2
    assert not stand.tree.is_loading


def test_a_block_that_is_computed_while_it_loads_is_the_computed_one() -> None:
    stand = Stand(blocks=4, host=4)
    stand.visit("aa")
    stand.evict()
    stand.copy()
    assert stand.tree.load(stand.tree.match([97, 97], 2)) is not None
    assert stand.visit("aa") == 0
    computed = stand.value("aa")
    stand.copy()
    assert stand.value("aa") == computed
    assert stand.pool.free == 3, "what was loaded in vain is free"


def test_a_child_of_an_offloading_block_keeps_it_on_the_device() -> None:
    stand = Stand(blocks=4, host=4)
    stand.visit("aa")
    stand.evict()
    stand.visit("aabb")
    stand.copy()
    assert stand.state("aa") is State.DEVICE
    stand.evict()
    stand.copy()
    assert [stand.state(t) for t in ("aa", "aabb")] == [State.HOST, State.HOST]


def test_a_full_host_keeps_what_is_worth_more() -> None:
    stand = Stand(blocks=4, host=1)
    stand.hint("p", "aa", 1)
    for text in ("aa", "bb"):
        stand.visit(text)
    stand.hint("q", "bb", 7)
    assert stand.evict() == 0
    stand.copy()
    assert stand.state("bb") is State.HOST, "the farther one"
    assert stand.evict() == 0
    stand.copy()
    assert (stand.state("aa"), stand.state("bb")) == (State.HOST, None), "the nearer one takes its place"
    stand.visit("cc")
    assert stand.evict() == 1, "of which nothing is known: it takes nobody's place"
    assert (stand.state("aa"), stand.state("cc")) == (State.HOST, None)


def test_a_prefetch_pushes_nobody_out_who_is_wanted_sooner() -> None:
    stand = Stand(blocks=1, host=4)
    stand.visit("aa")
    stand.hint("p", "aa", 3)
    stand.evict()
    stand.copy()
    stand.visit("bb")
    stand.hint("q", "bb", 1)
    path = stand.tree.match([97, 97], 2)
    assert stand.tree.load(path, farther_than=3) is None
    stand.check()
    stand.hint("q", "bb", 8)
    assert stand.tree.load(path, farther_than=3) is None, "first it must leave"
    stand.copy()
    assert stand.tree.load(path, farther_than=3) is not None
    stand.copy()
    assert (stand.state("aa"), stand.state("bb")) == (State.DEVICE, State.HOST)


def test_loading_must_pay() -> None:
    costs = Costs()
    assert costs.loading_pays(1, 16)
    costs.note_load(4, 0.4)
    costs.note_prefill(100, 0.1)
    assert not costs.loading_pays(1, 16)
    for _ in range(40):
        costs.note_load(4, 0.004)
    assert costs.loading_pays(1, 16)


@pytest.mark.parametrize("seed", range(12))
def test_any_play_keeps_the_invariants(seed: int) -> None:
    """Requests, copies, cancellations, hints and pins in any order; a freed block is NaN, so a stale one would show."""
    rng = random.Random(seed)
    stand = Stand(blocks=rng.choice([3, 6]), host=rng.choice([2, 5, 9]), policy=rng.choice(sorted(POLICIES)))
    jobs = []
    for _ in range(300):
        text = "".join(rng.choice("ab") * 2 for _ in range(rng.randint(1, 4)))
        what = rng.randrange(8)
        if what <= 2:
            stand.visit(text)
        elif what == 3:
            stand.copy(rng.randint(1, 3))
        elif what == 4:
            stand.hint(rng.choice("pqr"), text, rng.randint(0, 5))
        elif what == 5:
            stand.tree.release(rng.choice("pqr"))
        elif what == 6:
            path = stand.tree.match([ord(c) for c in text], len(text))
            job = stand.tree.load(path, farther_than=rng.choice([-1, 2]))
            if job is not None:
                jobs.append(job)
        elif jobs:
            rng.choice(jobs).is_cancelled = True
        stand.check()
        for node in stand.tree.nodes():
            if node.block is not None:
                assert not torch.isnan(stand.pool.data[node.block]).any()
    while stand.copier.is_busy:
        stand.copy()
    assert not stand.tree.is_loading
    assert not stand.tree.is_offloading
    assert stand.pool.free + stand.tree.size == stand.pool.usable


@pytest.mark.parametrize("seed", range(6))
def test_pressure_to_the_host_and_back_changes_no_token(seed: int) -> None:
    model, prompts, expected = reference("qwen3")
    rng = random.Random(seed)
    jobs = [i for i in range(len(prompts)) for _ in range(3)]
    rng.shuffle(jobs)
    sequences = [sequence(prompts[i]) for i in jobs]
    arrivals: list[list[Any]] = [[] for _ in range(30)]
    for s in sequences:
        arrivals[rng.randrange(30)].append(s)
    copier = HandCopier()
    engine = engine_for(
        model,
        "qwen3",
        block_size=4,
        blocks=rng.choice([26, 34]),
        host_blocks=rng.choice([10, 60]),
        max_step_tokens=rng.choice([8, 32]),
        max_sequences=6,
        policy=rng.choice(["workflow", "lru"]),
        costs=Costs(load_s=1e-6, token_s=1.0),
        copier=copier,
        poison=True,
    )
    step = engine.step

    def stepped() -> bool:
        engine.hint(rng.randrange(3), rng.choice(prompts), rng.randrange(4))
        if rng.random() < 0.1:
            engine.release(rng.randrange(3))
        copier.advance(rng.randint(0, 3))
        return step()

    engine.step = stepped  # type: ignore[method-assign]
    drive(engine, arrivals)
    assert [owner(s).tokens for s in sequences] == [expected[i] for i in jobs]
    assert engine.stats.offloaded_blocks > 0
    assert engine.stats.loaded_blocks > 0


def test_a_request_whose_prefix_loads_is_skipped_and_the_others_go_on() -> None:
    model, prompts, expected = reference("llama")
    copier = HandCopier()
    engine = engine_for(
        model, "llama", block_size=4, host_blocks=64, copier=copier, costs=Costs(load_s=1e-6, token_s=1.0), poison=True
    )
    drive(engine, [[sequence(prompts[3])]])
    assert engine.tree.evict(8) == 0
    copier.advance(100)
    engine.tree.poll()
    engine.check()
    first, second = sequence(prompts[3]), sequence(prompts[1])
    engine.waiting += [first, second]
    with torch.inference_mode():
        for _ in range(20):
            engine.step()
            engine.check()
    assert owner(second).tokens == expected[1], "it was not held up"
    assert owner(first).tokens == []
    assert engine.stats.waits_for_load > 0
    computed = engine.stats.prefill_tokens
    copier.advance(100)
    drive(engine, [])
    assert owner(first).tokens == expected[3]
    assert engine.stats.prefill_tokens - computed < 8


def test_a_prefix_that_is_cheaper_to_compute_is_not_loaded() -> None:
    model, prompts, expected = reference("llama")
    copier = HandCopier()
    engine = engine_for(
        model, "llama", block_size=4, host_blocks=64, copier=copier, costs=Costs(load_s=10.0, token_s=1e-9)
    )
    engine.costs.note_prefill = lambda tokens, seconds: None  # type: ignore[method-assign]
    drive(engine, [[sequence(prompts[3])]])
    engine.tree.evict(8)
    copier.advance(100)
    again = sequence(prompts[3])
    drive(engine, [[again]])
    assert owner(again).tokens == expected[3]
    assert engine.stats.loaded_blocks == 0


def test_an_announced_prefix_is_there_when_it_is_read_unless_the_branch_is_not_taken() -> None:
    model, prompts, _ = reference("llama")
    copier = HandCopier()
    engine = engine_for(
        model, "llama", block_size=4, host_blocks=64, copier=copier, costs=Costs(load_s=1e-6, token_s=1.0)
    )
    drive(engine, [[sequence(prompts[3])]])
    engine.tree.evict(8)
    copier.advance(100)
    engine.step()
    for is_taken in (False, True):
        engine.hint("agent", prompts[3], 3)
        engine.step()
        assert not engine.tree.is_loading, "too early"
        engine.hint("agent", prompts[3], 1)
        engine.step()
        engine.check()
        assert engine.tree.is_loading
        if not is_taken:
            engine.release("agent")
            engine.step()
        while copier.is_busy:
            copier.advance(1)
            engine.step()
            engine.check()
        assert (engine.stats.loaded_blocks > 0) == is_taken


def test_the_copying_thread_moves_blocks_for_a_running_engine() -> None:
    model, prompts, expected = reference("llama")
    engine = engine_for(
        model, "llama", block_size=4, blocks=26, host_blocks=80, costs=Costs(load_s=1e-6, token_s=1.0), poison=True
    )
    jobs = [i for _ in range(4) for i in range(len(prompts))]
    sequences = [sequence(prompts[i]) for i in jobs]
    for s in sequences:
        engine.submit([s])
    for s in sequences:
        assert owner(s).done.wait(60)
    engine.close()
    engine.check()
    assert [owner(s).tokens for s in sequences] == [expected[i] for i in jobs]
    assert engine.stats.offloaded_blocks > 0
    assert isinstance(engine._copier, ThreadCopier)

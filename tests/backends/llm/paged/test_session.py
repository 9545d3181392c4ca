"""Sessions: what is decoded after pauses, forks and rollbacks is what a plain request with the same tokens gets."""

from __future__ import annotations

import copy
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from flowc.backends.llm.paged.engine import Engine  # noqa: E402
from flowc.backends.llm.paged.model import PagedModel  # noqa: E402
from flowc.backends.llm.paged.session import Session  # noqa: E402
from flowc.ir.errors import ResourceError  # noqa: E402
from tests.backends.llm.paged.echo import echo, echo_engine  # noqa: E402
from tests.backends.llm.paged.test_exact import drive, engine_for, owner, reference, sequence  # noqa: E402

pytestmark = pytest.mark.models


def go(engine: Engine, *sessions: Session) -> list[list[int]]:
    drive(engine, [])
    return [s.wait(0) for s in sessions]


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_stages_pauses_forks_and_rollbacks_are_token_exact(name: str) -> None:
    model, prompts, _ = reference(name)
    oracle = copy.deepcopy(model)

    def plain(tokens: list[int], count: int) -> list[int]:
        ids = torch.tensor([tokens])
        with torch.inference_mode():
            got = oracle.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False
            )
        answer: list[int] = got[0, len(tokens) :].tolist()
        return answer

    engine = engine_for(model, name, block_size=4, blocks=200, max_step_tokens=16, poison=True)
    first, second = prompts[3], prompts[2]
    session = Session(engine, first[:10])
    drive(engine, [])
    session.extend(first[10:])
    drive(engine, [])
    computed = engine.stats.prefill_tokens
    assert computed == len(first) - 1
    session.decode(6)
    twins = [session.fork() for _ in range(2)]  # of a session that decodes by now: they rest where it stands
    assert go(engine, session) == [plain(first, 6)]
    assert engine.stats.prefill_tokens == computed + 1
    for twin, more in zip(twins, (second, second[::-1]), strict=True):
        twin.extend(more)
        twin.decode(5)
    session.decode(4)
    got = go(engine, session, *twins)
    assert got[0] == plain(first, 10)[6:]
    assert got[1] == plain(first + second, 5)
    assert got[2] == plain(first + second[::-1], 5)
    for count in (0, 1, 2, 3, 4, 7, len(second)):
        rest = twins[0].tokens[: len(twins[0].tokens) - count]
        twins[0].rollback(count)
        engine.check()
        assert twins[0].tokens == rest
        twins[0].decode(3)
        assert go(engine, twins[0]) == [plain(rest, 3)]
        twins[0].rollback(3)
        twins[0].extend([5, 6])
        twins[0].decode(2)
        assert go(engine, twins[0]) == [plain([*rest, 5, 6], 2)]
    for s in (session, *twins):
        s.cancel()
        s.cancel()
    engine.check()
    assert engine.pool.free + engine.tree.size == engine.pool.usable


def test_copies_kept_for_decoding_go_back_too() -> None:
    """Rolled back to its first token a session finds the rest in the tree: what it decoded must be forgotten."""
    model, prompts, expected = reference("llama")
    paged = PagedModel(copy.deepcopy(model), "packed")
    assert paged.pack(1000)
    engine = Engine(paged, blocks=64, block_size=4)
    drive(engine, [[sequence(prompts[5])]])
    session = Session(engine, prompts[5][:1])
    session.decode(60)
    drive(engine, [])
    session.rollback(60)
    session.extend(prompts[5][1:])
    session.decode(len(expected[5]))
    assert go(engine, session) == [expected[5]]


def test_a_fork_copies_only_the_block_that_it_writes() -> None:
    engine = echo_engine()
    session = Session(engine, range(11))  # two blocks and half of one
    drive(engine, [])
    before = engine.pool.free
    twins = [session.fork() for _ in range(3)]
    assert engine.pool.free == before
    for t in twins:
        t.decode(1)
    drive(engine, [])
    assert engine.pool.free == before - 3
    session.decode(1)
    assert go(engine, session, *twins) == [echo(range(11), 1)] * 4
    assert engine.pool.free == before - 3, "the last one writes in place"


def test_a_rollback_into_a_full_block_leaves_the_cached_one_as_it_is() -> None:
    engine = echo_engine()
    session = Session(engine, range(9))
    drive(engine, [])
    session.rollback(3)
    session.extend([40, 41, 42])
    session.decode(2)
    assert go(engine, session) == [echo([*range(6), 40, 41, 42], 2)]
    s = sequence(list(range(9)), 3)
    drive(engine, [[s]])
    assert owner(s).tokens == echo(range(9), 3)
    assert engine.stats.reused_tokens == 8


def test_a_paused_session_keeps_its_blocks_until_others_need_them() -> None:
    engine = echo_engine(blocks=12)
    session = Session(engine, range(14))
    session.decode(10)
    with torch.inference_mode():
        for _ in range(4):
            engine.step()
    so_far = session.pause()
    assert 0 < len(so_far) < 10
    steps = engine.stats.steps
    drive(engine, [])
    assert engine.stats.steps == steps
    with pytest.raises(TimeoutError):
        session.wait(0)
    session.resume()
    with torch.inference_mode():
        engine.step()
    assert engine.stats.recomputed_tokens == 0
    session.pause()
    other = sequence(list(range(20, 50)), 8)
    drive(engine, [[other]])
    assert owner(other).tokens == echo(range(20, 50), 8)
    assert engine.stats.preemptions == 0
    session.resume()
    session.resume()
    assert go(engine, session) == [echo(range(14), 10)]
    assert engine.stats.recomputed_tokens > 0


def test_what_a_session_is_told_and_tells() -> None:
    engine = echo_engine(blocks=12)
    heard: list[int] = []
    expected = echo([1, 2, 3], 8)
    session = Session(engine, [1, 2, 3])
    session.decode(8, ends=expected[3:4], on_token=heard.append)
    with pytest.raises(RuntimeError, match="decodes"):
        session.decode(1)
    with pytest.raises(RuntimeError, match="decodes"):
        session.extend([1])
    assert go(engine, session) == [expected[: expected.index(expected[3]) + 1]]
    assert heard == session.wait()
    with pytest.raises(ValueError, match="cannot take"):
        session.rollback(len(session.tokens))
    with pytest.raises(ResourceError, match="do not fit"):
        session.extend(range(44))
    with pytest.raises(ResourceError, match="do not fit"):
        Session(engine, range(9), most_tokens=8)
    with pytest.raises(ValueError, match="at least one"):
        Session(engine, [])
    chosen = Session(engine, [4, 5], choose=lambda logits: int(logits.argmin()))
    chosen.decode(2)
    assert go(engine, chosen) == [[0, 0]]
    session.cancel()
    with pytest.raises(ResourceError, match="cancelled"):
        session.decode(1)
    with pytest.raises(ResourceError, match="cancelled"):
        session.wait()


def test_sessions_on_a_running_engine() -> None:
    engine = echo_engine()
    engine.start()
    session = Session(engine, range(20))
    session.decode(30)
    twin = session.fork()
    taken = len(twin.tokens) - 20
    assert twin.tokens[20:] == echo(range(20), 30)[:taken]
    twin.extend([7, 7])
    twin.decode(5)
    assert twin.wait(30) == echo([*range(20), *echo(range(20), taken), 7, 7], 5)
    assert session.wait(30) == echo(range(20), 30)
    waiting: Any = Session(engine, range(5))
    engine.close()
    with pytest.raises(ResourceError, match="closed"):
        waiting.wait(30)
    with pytest.raises(ResourceError, match="closed"):
        session.extend([1])

"""Any schedule gives the answers of a lone request, keeps the pool's invariants after every step, and leaks nothing.

The model is `Echo`: one wrong block changes its answers. Smaller, under real models: `test_exact`, `test_tiers`.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from flowc.backends.llm.paged.copies import Costs, HandCopier  # noqa: E402
from flowc.backends.llm.paged.engine import Engine  # noqa: E402
from flowc.backends.llm.paged.policies import POLICIES  # noqa: E402
from flowc.backends.llm.paged.pool import KVPool  # noqa: E402
from flowc.backends.llm.paged.sequence import Sequence  # noqa: E402
from flowc.backends.llm.paged.session import Session  # noqa: E402
from flowc.runtime.protocols import Ticket  # noqa: E402
from tests.backends.llm.paged.echo import VOCAB, echo, echo_engine  # noqa: E402
from tests.backends.llm.paged.test_exact import Greedy, engine_for, owner, reference  # noqa: E402

pytestmark = pytest.mark.models
SYSTEM = [3] * 7 + list(range(10, 31))  # what prompts share, in part or as a whole; no multiple of a block


@dataclass
class Scored:
    """Asks for the log-probability of the tokens after a prompt."""

    option: list[int]
    is_cancelled: bool = False
    error: Exception | None = None
    has_ended: bool = False

    def accept(self, sequence: Sequence, token: int) -> bool:
        raise AssertionError

    def targets(self, sequence: Sequence) -> list[int]:
        return self.option

    def is_wanted(self, sequence: Sequence) -> bool:
        return not self.is_cancelled

    def ended(self, sequence: Sequence, error: Exception | None) -> None:
        assert not self.has_ended, "told twice"
        self.has_ended, self.error = True, error


def prompt(kind: int, length: int) -> list[int]:
    """A prompt that begins with none, a part or all of what others begin with."""
    shared = SYSTEM[: (0, 6, len(SYSTEM))[kind % 3]]
    return shared + [(kind * 7 + i * i) % VOCAB for i in range(1 + length % 20)]


def score(tokens: list[int], option: list[int]) -> float:
    """The log-probability of `option` after `tokens`: `Echo` says one token with logit 1, all others with 0."""
    total = 0.0
    for i, token in enumerate(option):
        (said,) = echo(tokens + option[:i], 1)
        logits = torch.nn.functional.one_hot(torch.tensor(said), VOCAB).float()
        total += float(torch.log_softmax(logits, 0)[token])
    return total


@dataclass
class Play:
    """An engine, and everything that may happen to it between two steps, by number."""

    engine: Engine
    copier: HandCopier
    tickets: list[Ticket] = field(default_factory=lambda: [Ticket(i, float(i % 2)) for i in range(3)])
    asked: list[tuple[Sequence, list[int], int]] = field(default_factory=list)
    scored: list[tuple[Sequence, list[int], list[int]]] = field(default_factory=list)
    sessions: list[tuple[Session, list[int]]] = field(default_factory=list)  # and what it is expected to say now
    cancelled: int = 0

    def act(self, what: int, a: int, b: int) -> None:
        engine = self.engine
        ticket = self.tickets[b % 3] if a % 4 else None
        match what % 12:
            case 0 | 1:
                tokens, new = prompt(a, b), 1 + (a + b) % 9
                s = Sequence(list(tokens), Greedy(new), engine._next_order(), ticket, limit=new)
                engine.waiting.append(s)
                self.asked.append((s, tokens, new))
            case 2:
                tokens, option = prompt(a, b), [(a + i) % VOCAB for i in range(1 + b % 12)]
                s = Sequence(tokens + option[:-1], Scored(option), engine._next_order(), ticket, scored=len(tokens))
                engine.waiting.append(s)
                self.scored.append((s, tokens, option))
            case 3:
                everybody = [s for s, *_ in (*self.asked, *self.scored) if not s.is_finished]
                if everybody:
                    asker: Any = everybody[a % len(everybody)].owner
                    asker.is_cancelled = True
                    self.cancelled += 1
            case 4:
                self.tickets[a % 3].priority = float(b % 5)
            case 5:
                tokens = prompt(a, b)
                if b % 2:
                    engine.hint(a % 3, tokens, b % 4)
                else:
                    engine.prefill(a % 3, tokens, ticket)
            case 6 if b % 2:
                engine.release(a % 3)
            case 6:
                engine.pin(prompt(a, b), 0.001)
            case 8:
                if len(self.sessions) < 4:
                    self.sessions.append((Session(engine, prompt(a, b), ticket), []))
            case 7 | 9 | 10:
                if self.sessions:
                    self.steer(a % len(self.sessions), b)
            case _:
                self.copier.advance(1 + b % 4)
        engine.check()

    def steer(self, which: int, how: int) -> None:
        session, _ = self.sessions[which]
        is_over = session._sequence.is_finished
        if is_over or how % 7 == 6:
            session.cancel()
            self.sessions.pop(which)
            return
        decodes = session._sequence.until is None
        match how % 7:
            case 0 if not decodes and len(session.tokens) < 60:
                session.extend(prompt(how, how)[:9])
                self.sessions[which] = session, []
            case 1 | 2 if not decodes:
                self.sessions[which] = session, echo(session.tokens, 1 + how % 5)
                session.decode(1 + how % 5)
            case 3:
                session.pause()
            case 4:
                session.resume()
            case 5 if len(self.sessions) < 4:
                twin = session.fork()
                if how % 2:
                    twin.extend([how % VOCAB])
                self.sessions.append((twin, echo(twin.tokens, 3)))
                twin.decode(3)
            case _:
                session.rollback(min(how % 11, len(session.tokens) - 1))
                self.sessions[which] = session, session._decoded

    def step(self) -> None:
        with torch.inference_mode():
            self.engine.step()
        self.engine.check()

    def end(self) -> None:
        """Runs to the end, compares every answer and looks for blocks that nobody owns."""
        for session, _ in self.sessions:
            if not session._sequence.is_finished:
                session.resume()
        for _ in range(3000):
            if not (self.engine.waiting or self.engine.running or self.engine._commands):
                break
            self.copier.advance(3)
            self.step()
        else:
            raise AssertionError("the engine did not come to an end")
        for s, tokens, new in self.asked:
            said, expected = owner(s).tokens, echo(tokens, new)
            assert owner(s).has_ended
            if owner(s).is_cancelled or owner(s).error is not None:
                assert said == expected[: len(said)]
            else:
                assert said == expected
        for s, tokens, option in self.scored:
            assert isinstance(s.owner, Scored)
            assert s.owner.has_ended
            if not s.owner.is_cancelled and s.owner.error is None:
                assert s.log_probability == pytest.approx(score(tokens, option), abs=1e-4)
        for session, expected in self.sessions:
            if session._error is None:
                assert session.wait(0) == expected
            session.cancel()
        for key in range(3):
            self.engine.release(key)
        while self.copier.is_busy:
            self.copier.advance(10)
            self.step()
        self.step()
        assert self.engine.pool.free + self.engine.tree.size == self.engine.pool.usable
        assert self.engine.tree.evictable == self.engine.tree.size
        assert not any(n.keepers or n.hints for n in self.engine.tree.nodes())


def play(**options: Any) -> Play:
    copier = HandCopier()
    return Play(echo_engine(copier=copier, costs=Costs(load_s=1e-6, token_s=1.0), **options), copier)


OPTIONS = st.fixed_dictionaries(
    {
        "block_size": st.sampled_from([4, 16]),
        "max_step_tokens": st.sampled_from([1, 7, 64]),
        "blocks": st.sampled_from([18, 26, 60]),
        "host_blocks": st.sampled_from([0, 8, 80]),
        "max_sequences": st.sampled_from([2, 8]),
        "policy": st.sampled_from(sorted(POLICIES)),
        "dedup": st.booleans(),
        "prefetch_steps": st.sampled_from([None, 1.0]),
        "batch_invariant": st.booleans(),
    }
)
NUMBER = st.integers(0, 59)


@settings(max_examples=100)
@given(OPTIONS, st.lists(st.tuples(NUMBER, NUMBER, NUMBER, st.integers(0, 2)), max_size=60))
def test_any_schedule(options: dict[str, Any], acts: list[tuple[int, int, int, int]]) -> None:
    game = play(**options)
    for what, a, b, steps in acts:
        game.act(what, a, b)
        for _ in range(steps):
            game.step()
    game.end()


def test_everything_that_can_happen_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long plays by a fixed seed; hypothesis looks for short ones that fail, these show that nothing is left out."""
    seen: dict[str, int] = {"copied for a fork": 0}
    copy = KVPool.copy

    def counted(pool: KVPool, source: int, target: int) -> None:
        seen["copied for a fork"] += 1
        copy(pool, source, target)

    monkeypatch.setattr(KVPool, "copy", counted)
    for seed in range(8):
        rng = random.Random(seed)
        blocks, host_blocks, budget = rng.choice([24, 60]), rng.choice([8, 80]), rng.choice([5, 40])
        game = play(blocks=blocks, block_size=4, host_blocks=host_blocks, max_step_tokens=budget)
        for _ in range(200):
            game.act(rng.randrange(60), rng.randrange(60), rng.randrange(60))
            loading = game.engine.tree.is_loading and any(s.is_finished for s, *_ in game.asked)
            seen["cancelled, a load under way"] = seen.get("cancelled, a load under way", 0) + loading
            for _ in range(rng.randrange(8)):
                game.step()
        game.end()
        for name in game.engine.stats.__slots__:
            seen[name] = seen.get(name, 0) + getattr(game.engine.stats, name)
        seen["cancelled"] = seen.get("cancelled", 0) + game.cancelled
    assert all(seen.values()), seen


def test_a_score_is_the_same_after_a_preemption() -> None:
    game = play(blocks=9, block_size=4, max_step_tokens=4)
    game.act(2, 0, 11)
    first = game.scored[0][0]
    for _ in range(8):
        game.step()
        if first.computed > len(game.scored[0][1]) + 2:
            break
    assert first.log_probability < 0, "in the middle of its option"
    game.engine._preempt(first)
    game.end()


def test_what_is_only_scored_leaves_nothing_behind_but_its_prompt() -> None:
    engine = echo_engine(max_step_tokens=64)
    tokens, options = prompt(2, 5), [[7 + i] * 9 for i in range(4)]
    scored = [Sequence(tokens + o[:-1], Scored(o), i, scored=len(tokens)) for i, o in enumerate(options)]
    engine.waiting += scored
    with torch.inference_mode():
        for _ in range(10):
            engine.step()
            engine.check()
            owned = engine.pool.usable - engine.pool.free
            private = sum(len(s.blocks) - len(s.nodes) for s in engine.running)
            assert owned == engine.tree.size + private, "an option's blocks go with its last token"
    assert all(s.is_finished for s in scored)
    assert engine.tree.size == len(tokens) // 4
    assert engine.stats.prefill_tokens == len(tokens) // 4 * 4 + 4 * (len(tokens) % 4 + 8), "the prompt once"


def test_ten_thousand_requests_leave_no_block_behind() -> None:
    """Through a pool that holds twenty at a time; every third shares a prefix, every seventh is cancelled."""
    rng = random.Random(1)
    engine = echo_engine(blocks=20 * 4 + 1, max_sequences=32, max_step_tokens=128)
    pending = 10_000
    asked: list[tuple[Sequence, list[int]]] = []
    most = 0
    with torch.inference_mode():
        while pending or engine.waiting or engine.running:
            while pending and len(engine.waiting) < 20:
                tokens = (SYSTEM[:8] if pending % 3 == 0 else []) + [rng.randrange(VOCAB) for _ in range(4)]
                s = Sequence(list(tokens), Greedy(3), engine._next_order(), limit=3)
                engine.waiting.append(s)
                asked.append((s, tokens))
                pending -= 1
                if pending % 7 == 0:
                    owner(s).is_cancelled = rng.random() < 0.5
            engine.step()
            most = max(most, engine.pool.usable - engine.pool.free)
            if pending % 50 == 0:
                engine.check()
    engine.check()
    assert len(engine.pool.data) == 20 * 4 + 1
    assert most <= engine.pool.usable
    assert engine.pool.free + engine.tree.size == engine.pool.usable
    for s, tokens in asked:
        assert owner(s).has_ended
        assert owner(s).tokens == ([] if owner(s).is_cancelled else echo(tokens, 3))
    engine.tree.evict(engine.tree.size)
    assert engine.pool.free == engine.pool.usable


def test_a_thousand_requests_through_a_real_model() -> None:
    model, prompts, expected = reference("llama")
    engine = engine_for(model, "llama", blocks=20 * 3 + 1, max_sequences=24, max_step_tokens=256)
    jobs = [(i % 3, 1 + i % 2) for i in range(1000)]  # the short prompts
    asked = [Sequence(list(prompts[which]), Greedy(new), i, limit=new) for i, (which, new) in enumerate(jobs)]
    coming = iter(asked)
    with torch.inference_mode():
        for n in range(2000):
            engine.waiting += islice(coming, max(0, 30 - len(engine.waiting)))
            if not (engine.waiting or engine.running):
                break
            engine.step()
            if n % 20 == 0:
                engine.check()
    engine.check()
    assert [owner(s).tokens for s in asked] == [expected[which][:new] for which, new in jobs]
    assert engine.pool.free + engine.tree.size == engine.pool.usable

"""The batch-invariant mode: a request's logits are the same bits whoever is beside it and whatever is cached."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from flowc.backends.llm.factory import open_llm  # noqa: E402
from flowc.backends.llm.paged.backend import PagedBackend  # noqa: E402
from flowc.backends.llm.paged.engine import Engine, greedy  # noqa: E402
from flowc.backends.llm.paged.model import PagedModel  # noqa: E402
from flowc.backends.llm.paged.sequence import Sequence  # noqa: E402
from flowc.backends.llm.tiny import write_tiny_model  # noqa: E402
from flowc.runtime.protocols import ChooseRequest, GenerateRequest  # noqa: E402
from tests.backends.llm.paged.test_exact import VOCAB, Greedy, drive, owner, reference  # noqa: E402
from tests.backends.llm.paged.test_schedules import Scored  # noqa: E402

pytestmark = pytest.mark.models
NEW = 9


class Recorded:
    """An engine that notes every row of logits it decodes from."""

    def __init__(self, paged: PagedModel, **options: Any) -> None:
        self.rows: dict[int, list[Any]] = {}
        settings = {"blocks": 200, "block_size": 4, "max_step_tokens": 64, "batch_invariant": True, **options}
        self.engine = Engine(paged, pick=self.pick, **settings)

    def pick(self, sequences: list[Sequence], logits: Any) -> list[int]:
        for s, row in zip(sequences, logits, strict=True):
            self.rows.setdefault(id(s), []).append(row.clone())
        return greedy(sequences, logits)

    def logits(self, s: Sequence) -> Any:
        assert owner(s).has_ended
        assert owner(s).error is None
        return torch.stack(self.rows[id(s)][-NEW:])


def asked(prompt: list[int]) -> Sequence:
    return Sequence(list(prompt), Greedy(NEW), limit=NEW)


def shake(engine: Engine, rng: random.Random) -> None:
    """Has running sequences preempted and cached blocks dropped between some steps."""
    step = engine.step

    def shaken() -> bool:
        if engine.running and rng.random() < 0.1:
            engine._preempt(rng.choice(engine.running))
            engine.tree.evict(rng.randrange(20))
        return step()

    engine.step = shaken  # type: ignore[method-assign]


def paged(name: str, *, packed: bool) -> PagedModel:
    model = PagedModel(copy.deepcopy(reference(name)[0]), name)
    if packed:
        model.pack(400)
    return model


@pytest.mark.parametrize(
    ("name", "packed"), [("llama", False), ("llama", True), ("gemma2", False), ("qwen3_moe", False)]
)
def test_logits_are_the_same_bits_in_any_company(name: str, packed: bool) -> None:
    _, prompts, expected = reference(name)
    model = paged(name, packed=packed)
    target = prompts[6]  # two blocks and more of it are what two other prompts begin with
    alone = Recorded(model)
    s = asked(target)
    drive(alone.engine, [[s]])
    bits = alone.logits(s)
    assert owner(s).tokens == expected[6][:NEW]
    rng = random.Random(2)
    for budget in (3, 64):
        crowd = Recorded(model, max_step_tokens=budget, blocks=60, max_sequences=3)
        shake(crowd.engine, rng)
        arrivals: list[list[Sequence]] = [[] for _ in range(12)]
        for p in [*prompts[:6], target[:37], [*target, *expected[6][:3], 5]]:
            arrivals[rng.randrange(12)].append(asked(p))
        targets = [asked(target) for _ in range(3)]
        for t in targets:
            arrivals[rng.randrange(12)].append(t)
        drive(crowd.engine, arrivals)
        assert crowd.engine.stats.reused_tokens > 0
        assert crowd.engine.stats.preemptions > 0
        for t in targets:
            assert torch.equal(crowd.logits(t), bits)


def test_without_it_they_are_not() -> None:
    """What the test above would miss if company never mattered."""
    _, prompts, _ = reference("llama")
    model = paged("llama", packed=False)
    found = []
    for others in ([], prompts[:5]):
        recorded = Recorded(model, batch_invariant=False)
        s = asked(prompts[6])
        drive(recorded.engine, [[s, *map(asked, others)]])
        found.append(recorded.logits(s))
    assert not torch.equal(*found)
    assert torch.allclose(*found, atol=1e-4)


def test_what_an_answer_left_in_the_cache_changes_nothing() -> None:
    """Decoded tokens are computed one by one, a prompt's by the block: a prompt that contains an answer computes it."""
    _, prompts, expected = reference("llama")
    model = paged("llama", packed=False)
    longer = [*prompts[4], *expected[4], *([7] * 6)]
    fresh = Recorded(model)
    first = asked(longer)
    drive(fresh.engine, [[first]])
    used = Recorded(model)
    drive(used.engine, [[asked(prompts[4])]])
    second = asked(longer)
    drive(used.engine, [[second]])
    assert used.engine.stats.reused_tokens > 0
    assert torch.equal(fresh.logits(first), used.logits(second))


def test_scores_are_the_same_bits() -> None:
    _, prompts, _ = reference("llama")
    model = paged("llama", packed=False)
    option = [(3 * i) % VOCAB for i in range(11)]
    scores = []
    for others, budget in (([], 64), (prompts, 3)):
        engine = Recorded(model, max_step_tokens=budget).engine
        s = Sequence(prompts[5] + option[:-1], Scored(option), scored=len(prompts[5]))
        drive(engine, [[asked(p) for p in others], [s]])
        scores.append(s.log_probability)
    assert scores[0] == scores[1] < 0


def test_it_is_an_option_of_the_backend(tmp_path: Any) -> None:
    folder = write_tiny_model(tmp_path / "tiny", context=512)
    backend = open_llm("engine", model=folder, device="cpu", batch_invariant=True)
    assert isinstance(backend, PagedBackend)
    assert backend.engine.batch_invariant
    requests = [GenerateRequest(f"What is {i}?", max_tokens=6, temperature=1.0, seed=i) for i in range(4)]
    together = list(backend.generate(requests))
    assert together == [backend.generate([r])[0] for r in requests]
    assert len(backend.choose([ChooseRequest("Is it? ", (" yes", " no"))])) == 1
    backend.close()

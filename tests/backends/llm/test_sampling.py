"""What is drawn, by which rules, and what is said of its probability; the same on every local backend."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from flowc.backends.llm.sampling import sample_tokens, uniform  # noqa: E402
from flowc.ir.errors import InputError  # noqa: E402
from flowc.runtime.protocols import GenerateRequest, Generation  # noqa: E402

if TYPE_CHECKING:
    from flowc.backends.llm.local import LocalBackend

pytestmark = pytest.mark.models
LOGITS = torch.log(torch.tensor([0.1, 0.5, 0.05, 0.35]))


def sample(draws: list[float], temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0, min_p: float = 0.0) -> Any:
    n = len(draws)
    return sample_tokens(LOGITS.repeat(n, 1), [temperature] * n, [top_p] * n, [top_k] * n, [min_p] * n, draws)


def test_sampling_follows_the_probabilities() -> None:
    drawn = sample([uniform(5, n) for n in range(4000)])
    for token, p in enumerate([0.1, 0.5, 0.05, 0.35]):
        assert abs(drawn.count(token) / 4000 - p) < 4 * (p * (1 - p) / 4000) ** 0.5
    some = [uniform(5, n) for n in range(300)]
    assert set(sample(some, top_p=0.8)) == {1, 3}
    assert set(sample(some, top_k=1)) == {1}
    assert set(sample(some, min_p=0.15)) == {0, 1, 3}, "0.05 is less than 0.15 of 0.5"
    assert set(sample(some, min_p=0.9)) == {1}
    assert set(sample(some, min_p=0.15, top_k=2)) == {1, 3}
    assert set(sample(some, temperature=9.0, min_p=0.6)) == {0, 1, 2, 3}, "min_p goes by the tempered probabilities"
    assert sample([0.999999], temperature=1e-4) == [1]
    assert all(0 <= uniform(s, n) < 1 for s in (0, 1, 2**64 - 1) for n in range(100))


def test_every_row_follows_its_own_rules() -> None:
    rules = [1.0, 1e-4, 1.0, 9.0, 1.0], [1.0, 1.0, 0.4, 1.0, 1.0], [0, 0, 0, 3, 0], [0.0, 0.0, 0.0, 0.0, 0.5]
    assert sample_tokens(LOGITS.repeat(5, 1), *rules, [0.999] * 5) == [2, 1, 1, 0, 3]


def asked(number: int, **options: Any) -> GenerateRequest:
    given = {"temperature": 1.0, "min_p": 0.02, "seed": number, "max_tokens": 10} | options
    return GenerateRequest(f"Number {number}:", **given)


def test_a_seed_gives_its_text_in_any_company(either: LocalBackend) -> None:
    target = asked(7)
    (alone,) = either.generate([target])
    crowd = [asked(n, max_tokens=3 + n) for n in range(6)]
    together = either.generate([*crowd[:3], target, *crowd[3:], target])
    assert together[3] == together[7] == alone
    assert len({r.text for r in together if isinstance(r, Generation)}) > 5


def test_a_min_p_outside_its_range_fails_alone(either: LocalBackend) -> None:
    bad, good = either.generate([asked(1, min_p=1.5), asked(1)])
    assert isinstance(bad, InputError)
    assert "min_p" in bad.message
    assert isinstance(good, Generation)


def test_log_probabilities_are_the_models_own(either: LocalBackend, folder: Path) -> None:
    """Before temperature and cut-offs, one for each token that was written."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    requests = [
        GenerateRequest("What is a generator?", max_tokens=8, logprobs=True),
        GenerateRequest("Hi", max_tokens=9, temperature=1.3, top_k=3, seed=2, logprobs=True),
        GenerateRequest("Hi", max_tokens=5),
    ]
    results = either.generate(requests)
    for request, result in zip(requests[:2], results[:2], strict=True):
        assert isinstance(result, Generation)
        assert result.logprobs is not None
        assert len(result.logprobs) == result.completion_tokens
        prompt = tokenizer(request.prompt)["input_ids"]
        written = tokenizer(result.text, add_special_tokens=False)["input_ids"]
        with torch.inference_mode():
            table = torch.log_softmax(model(input_ids=torch.tensor([prompt + written])).logits[0], dim=-1)
        expected = [float(table[len(prompt) - 1 + i, token]) for i, token in enumerate(written)]
        assert len(expected) == result.completion_tokens, "the text is cut into other tokens: choose another prompt"
        assert all(math.isclose(a, b, abs_tol=1e-3) for a, b in zip(result.logprobs, expected, strict=True))
    assert isinstance(results[2], Generation)
    assert results[2].logprobs is None

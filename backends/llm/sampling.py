"""The next tokens of a batch whose rows want different things: greedy rows in one operation, sampled ones in one more.

What is drawn depends on a row's seed and position alone, so that batch mates, pauses and restarts change nothing.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence

import torch

from .rows import Row

__all__ = ["pick", "sample_tokens", "uniform"]


def uniform(seed: int, position: int) -> float:
    """The number in [0, 1) that request `seed` draws for its token at `position`.

    Counter-based: it depends on nothing else, so batch mates, pauses and restarts cannot change what is sampled.
    """
    digest = hashlib.blake2b(struct.pack("<QQ", seed & (2**64 - 1), position), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / 2**53


def sample_tokens(
    logits: torch.Tensor,
    temperature: Sequence[float],
    top_p: Sequence[float],
    top_k: Sequence[int],
    min_p: Sequence[float],
    draws: Sequence[float],
) -> list[int]:
    """The tokens that `draws` pick from logits of shape (rows, vocab), by inverse transform, each row by its own rules.

    A row's logits are divided by its temperature, cut to its `top_k` likeliest tokens (0: all), then to the smallest
    set of likeliest tokens whose probabilities reach `top_p` (Holtzman et al., "The Curious Case of Neural Text
    Degeneration", 2020, section 3.1), and to those at least `min_p` times as probable as the likeliest (Nguyen et al.,
    "Turning Up the Heat: Min-p Sampling", 2025, section 3). They are taken likeliest first, the lower id among equals.
    """
    vocab = logits.shape[-1]
    scale = torch.tensor(temperature, dtype=torch.float64).unsqueeze(1)
    values, order = torch.sort(logits.double().cpu() / scale, dim=-1, descending=True, stable=True)
    most = torch.tensor([k or vocab for k in top_k]).unsqueeze(1)
    values.masked_fill_(torch.arange(vocab) >= most, -torch.inf)
    probabilities = torch.softmax(values, dim=-1)
    cumulative = probabilities.cumsum(-1)
    allowed = torch.tensor(top_p, dtype=torch.float64).unsqueeze(1)
    kept = (cumulative - probabilities < allowed).sum(-1, keepdim=True)
    least = torch.tensor(min_p, dtype=torch.float64).unsqueeze(1) * probabilities[:, :1]
    kept = torch.minimum(kept, (probabilities >= least).sum(-1, keepdim=True))
    kept = torch.minimum(kept, most)  # the cut tokens follow with probability 0 and must not count
    reach = cumulative.gather(1, kept - 1)
    at = torch.searchsorted(cumulative, torch.tensor(draws, dtype=torch.float64).unsqueeze(1) * reach, right=True)
    tokens: list[int] = order.gather(1, torch.minimum(at, kept - 1)).squeeze(1).tolist()
    return tokens


def pick(rows: Sequence[Row], logits: torch.Tensor) -> list[int]:
    """The next token of every row, from logits of shape (rows, vocab); notes log-probabilities that are asked for."""
    free = logits
    for i, row in enumerate(rows):
        allowed = row.guide.allowed() if row.guide is not None and not row.forced else None
        if allowed is not None:
            free = logits.clone() if free is logits else free
            free[i].masked_fill_(~torch.from_numpy(allowed).to(free.device), -torch.inf)
    tokens: list[int] = free.argmax(-1).tolist()
    sampled = [i for i, row in enumerate(rows) if row.request.temperature > 0 and not row.forced]
    if sampled:
        asked = [rows[i].request for i in sampled]
        found = sample_tokens(
            free[sampled].float(),
            [r.temperature for r in asked],
            [r.top_p for r in asked],
            [r.top_k for r in asked],
            [r.min_p for r in asked],
            [uniform(rows[i].seed, len(rows[i].tokens)) for i in sampled],
        )
        for i, token in zip(sampled, found, strict=True):
            tokens[i] = token
    for i, row in enumerate(rows):
        if row.forced:
            tokens[i] = row.forced.popleft()
        if row.request.logprobs:
            row.logprobs.append(float(torch.log_softmax(logits[i].float(), dim=-1)[tokens[i]]))
    return tokens

"""A stand-in for a model whose every answer depends on every cached token: it finds a wrong block where logits may not.

The "key" of a token is a running hash of all tokens up to it, taken on from the key of the token before, as the cache
has it. The next token comes from the sum of all keys in the sequence's blocks. So a block that is stale, of another
prefix, half copied or poisoned changes what is answered, and plain Python knows what should be.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from flowc.backends.llm.paged.attention import Layout
from flowc.backends.llm.paged.engine import Engine
from flowc.backends.llm.paged.pool import KVPool

VOCAB = 50
_PRIME = 1_000_003


def _after(key: int, token: int) -> int:
    return (key * 31 + token + 1) % _PRIME


def _said(total: int) -> int:
    return total % _PRIME % VOCAB


def echo(prompt: Sequence[int], count: int) -> list[int]:
    """The `count` tokens that follow a prompt."""
    key = total = 0
    for token in prompt:
        key = _after(key, token)
        total += key
    out: list[int] = []
    for _ in range(count):
        out.append(_said(total))
        key = _after(key, out[-1])
        total += key
    return out


class Echo:
    """What `Engine` needs of a `PagedModel`."""

    name = "echo"
    device = torch.device("cpu")

    def forget(self, key: object) -> None:
        """Nothing is kept beside the pool."""

    def new_pool(self, blocks: int, block_size: int, *, on_host: bool = False, poison: bool = False) -> KVPool:
        return KVPool(
            blocks,
            layers=1,
            block_size=block_size,
            kv_heads=1,
            head_dim=1,
            dtype=torch.float64,
            device=self.device,
            poison=poison,
        )

    def forward(
        self, tokens: Sequence[int], positions: Sequence[int], layout: Layout, rows: Sequence[int]
    ) -> torch.Tensor:
        cells = layout.pool.data[:, 0, 0, :, 0, 0]
        said: list[int] = []
        for span in layout.spans:
            start = span.length - (span.rows.stop - span.rows.start)
            cached = cells[span.blocks].flatten()[:start].tolist()
            key, total = int(cached[-1]) if cached else 0, int(sum(cached))  # of a NaN there is no int: it raises
            keys: list[float] = []
            for at in range(span.rows.start, span.rows.stop):
                assert positions[at] == start + len(keys)
                key = _after(key, tokens[at])
                keys.append(float(key))
                total += key
                said.append(_said(total))
            cells[layout.block[span.rows], layout.offset[span.rows]] = torch.tensor(keys, dtype=torch.float64)
        return torch.nn.functional.one_hot(torch.tensor([said[r] for r in rows]), VOCAB).double()


def echo_engine(**options: Any) -> Engine:
    """An engine over the stand-in, with freed blocks poisoned."""
    model: Any = Echo()
    return Engine(model, **{"blocks": 40, "block_size": 4, "max_step_tokens": 16, "poison": True, **options})

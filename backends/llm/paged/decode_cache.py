"""Keys and values of decoding sequences in one piece each, so that a CPU attends to them without gathering blocks.

Gathering a sequence's blocks in every layer of every step costs more than attending to them. So a sequence that
decodes keeps a copy in one piece: filled once from its blocks, then one column a step. The blocks stay the truth: the
copies may be dropped at any time, take at most as many tokens as the pool holds, and who finds no room is gathered.

Products are numpy's: its BLAS multiplies matrices of a few rows twice to four times as fast as torch's does on a CPU
(measured at 3 rows, 100 to 1,000 columns). For that the keys lie transposed.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from .pool import KVPool

Floats = npt.NDArray[np.float32]
STEP = 64  # tokens by which a copy grows
SKEW = 16  # floats between the columns of keys beyond a round number, which would share cache lines' places


@dataclass(slots=True)
class Copy:
    """One sequence's keys (layers, kv_heads, dim, room) and values (layers, kv_heads, room, dim).

    The first `covered` tokens are in it.
    """

    keys: Floats
    values: Floats
    covered: int = 0

    @property
    def room(self) -> int:
        return int(self.values.shape[2])


class DecodeCache:
    """The copies of the sequences that decode, by whatever names a sequence; at most `most_tokens` in all."""

    def __init__(self, most_tokens: int) -> None:
        self.most_tokens = most_tokens
        self.tokens = 0
        self._copies: dict[Hashable, Copy] = {}

    def ready(self, key: Hashable, pool: KVPool, blocks: torch.Tensor, start: int) -> Copy | None:
        """The copy of a sequence with its first `start` tokens in it and room for one more; None where none fits.

        `blocks` hold the sequence. Tokens from `start` on are forgotten: they are about to be computed anew.
        """
        copy = self._copies.get(key)
        if copy is None or copy.room <= start:
            copy = self._grown(key, copy, pool, start + 1)
            if copy is None:
                return None
        copy.covered = min(copy.covered, start)
        if copy.covered < start:
            size = pool.block_size
            first = copy.covered // size
            new = pool.data[blocks[first : -(-start // size)]].float()  # (blocks, layers, 2, size, kv_heads, dim)
            there = slice(first * size, start)
            both = new.permute(1, 2, 4, 0, 3, 5).flatten(3, 4)[:, :, :, : start - first * size].numpy()
            copy.keys[:, :, :, there] = both[:, 0].swapaxes(2, 3)
            copy.values[:, :, there] = both[:, 1]
            copy.covered = start
        return copy

    def forget_after(self, key: Hashable, tokens: int) -> None:
        """What a sequence has beyond its first `tokens` is being computed anew, elsewhere than here."""
        copy = self._copies.get(key)
        if copy is not None:
            copy.covered = min(copy.covered, tokens)

    def drop(self, key: Hashable) -> None:
        """Gives the memory of a sequence's copy back, if it has one."""
        copy = self._copies.pop(key, None)
        if copy is not None:
            self.tokens -= copy.room

    def _grown(self, key: Hashable, old: Copy | None, pool: KVPool, tokens: int) -> Copy | None:
        room = -(-(tokens + tokens // 4) // STEP) * STEP
        if self.tokens - (old.room if old else 0) + room > self.most_tokens:
            self.drop(key)
            return None
        _, layers, _, _, kv_heads, dim = pool.data.shape
        keys = np.empty((layers, kv_heads, dim, room + SKEW), np.float32)[..., :room]
        copy = Copy(keys, np.empty((layers, kv_heads, room, dim), np.float32))
        if old is not None:
            copy.covered = old.covered
            copy.keys[..., : old.covered] = old.keys[..., : old.covered]
            copy.values[:, :, : old.covered] = old.values[:, :, : old.covered]
        self.drop(key)
        self._copies[key] = copy
        self.tokens += room
        return copy


class DecodeAttention:
    """One step's attention of single new tokens, each over its sequence's copy; layer by layer.

    `rows[i]` of the step's packed tokens belongs to `copies[i]`. Queries must come with the scale applied.
    """

    def __init__(self, rows: list[int], copies: list[Copy], heads: int) -> None:
        self.rows, self.copies = rows, copies
        kv_heads, dim = copies[0].values.shape[1], copies[0].values.shape[3]
        self._group = (kv_heads, heads // kv_heads, dim)
        longest = max(c.covered for c in copies) + 1
        self._scores = np.full((len(copies), *self._group[:2], longest), -np.inf, np.float32)
        self._scores_torch = torch.from_numpy(self._scores)

    def __call__(self, layer: int, queries: Floats, keys: Floats, values: Floats, out: Floats) -> None:
        """Writes rows of `out` (tokens, heads * dim), of queries (tokens, heads, dim), keys, values (tokens, kv_heads,
        dim) of the step's tokens; new keys and values go into the copies."""
        for row, copy, scores in zip(self.rows, self.copies, self._scores, strict=True):
            at = copy.covered
            own = copy.keys[layer]
            own[:, :, at] = keys[row]
            copy.values[layer, :, at] = values[row]
            np.matmul(queries[row].reshape(self._group), own[:, :, : at + 1], out=scores[:, :, : at + 1])
        weights: Floats = torch.softmax(self._scores_torch, dim=-1).numpy()
        for row, copy, weight in zip(self.rows, self.copies, weights, strict=True):
            end = copy.covered + 1
            np.matmul(weight[:, :, :end], copy.values[layer, :, :end], out=out[row].reshape(self._group))

    def done(self) -> None:
        """After the last layer: the new tokens are in the copies."""
        for copy in self.copies:
            copy.covered += 1

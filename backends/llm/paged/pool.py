"""The KV cache as blocks: one tensor, block first, with reference counts.

Layout `[blocks, layers, 2, block_size, kv_heads, head_dim]`: a block is one contiguous piece of memory over all layers,
so that moving it between tiers is one copy (vLLM's offloading connector found 4-5x in that alone). Block 0 is never
handed out: rows that must write somewhere write there.

Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention", SOSP 2023, section 4.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


class KVPool:
    """Blocks of keys and values for `layers` layers. `free` blocks can be allocated, the others have `references`.

    `pin` makes host memory that a GPU copies from and to without a detour. `poison` fills free blocks with NaN, so that
    a read of one shows: for tests.
    """

    __slots__ = ("_free", "block_size", "data", "poison", "references")

    def __init__(
        self,
        blocks: int,
        *,
        layers: int,
        block_size: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        pin: bool = False,
        poison: bool = False,
    ) -> None:
        assert blocks >= 2, "a pool needs its trash block and one more"
        self.block_size = block_size
        self.poison = poison
        shape = (blocks, layers, 2, block_size, kv_heads, head_dim)
        self.data = torch.zeros(shape, dtype=dtype, device=device, pin_memory=pin)
        if poison:
            self.data[1:] = torch.nan
        self.references = [0] * blocks
        self._free = list(range(blocks - 1, 0, -1))

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def usable(self) -> int:
        """How many blocks there are in all, the trash block aside."""
        return len(self.references) - 1

    def allocate(self) -> int | None:
        """A free block with one reference, or None."""
        if not self._free:
            return None
        block = self._free.pop()
        self.references[block] = 1
        return block

    def share(self, block: int) -> None:
        """One more owner."""
        assert self.references[block] > 0
        self.references[block] += 1

    def copy(self, source: int, target: int) -> None:
        """The keys and values of one block in another: a fork's, before it writes."""
        self.data[target].copy_(self.data[source])

    def release(self, blocks: Sequence[int]) -> None:
        """One owner less of each; a block without owners is free."""
        for block in blocks:
            self.references[block] -= 1
            assert self.references[block] >= 0, f"block {block} was released once too often"
            if self.references[block] == 0:
                self._free.append(block)
                if self.poison:
                    self.data[block] = torch.nan

    def check(self) -> None:
        """Every block is either free or owned, never both. For tests, after each step."""
        free = set(self._free)
        assert len(free) == len(self._free), "a block is free twice"
        assert 0 not in free, "the trash block was handed out"
        for block, count in enumerate(self.references):
            assert (count == 0) == (block in free) or block == 0, (
                f"block {block}: {count} owners, free: {block in free}"
            )

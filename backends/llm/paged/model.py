"""A transformers model that runs packed steps over the paged cache, and the check that it really does.

An architecture that does not call the attention interface, keeps a recurrent state, or lets neighbours change each
other's positions would give wrong text without a word. So a model is refused unless its configuration is known to be
safe and a probe step shows every layer calling the interface once.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from flowc.ir.errors import ResourceError

from . import attention
from .attention import Layout, Span
from .fused import FusedModel, fused
from .packed import pack_linears
from .pool import KVPool

_SAFE_LAYERS = {"full_attention", "sliding_attention"}


@dataclass(frozen=True, slots=True)
class Shape:
    """What the pool must hold of a model."""

    layers: int
    kv_heads: int
    head_dim: int


class NotPagedError(ResourceError):
    """The engine would run this architecture wrongly. Plain generation runs it."""


class PagedModel:
    """A causal language model under paged attention: `forward` runs one packed step.

    Raises `NotPagedError` for a model that must not run so, which is then left as it was.
    """

    def __init__(self, model: Any, name: str) -> None:
        self.model = model
        self.name = name
        self.fused: FusedModel | None = None
        self.config = model.config.get_text_config(decoder=True)
        reason = why_not_paged(self.config, model)
        if reason:
            raise self._refused(reason)
        attention.register()
        before = model.config._attn_implementation
        model.set_attn_implementation(attention.NAME)
        self.device = next(model.parameters()).device
        self.dtype = next(model.parameters()).dtype
        try:
            self.shape = self._probe()
        except BaseException:
            model.set_attn_implementation(before)  # whoever runs it instead finds it as it was
            raise

    def pack(self, decode_tokens: int) -> int:
        """Packs the linear weights for the CPU (see `packed`) and says how many: 0 where that cannot be.

        A plain decoder is put together anew for this (see `fused`), if that gives its own logits; copies of sequences
        that decode then take up to `decode_tokens` tokens. Before the first step only: cached keys lie otherwise after.
        """
        with torch.inference_mode():
            candidate = fused(self.model, decode_tokens)
            if candidate is None or not self._agrees(candidate):
                return pack_linears(self.model)
        self.fused = candidate
        return 4 * self.shape.layers + 1

    def forget(self, key: Hashable) -> None:
        """Drops what is kept from step to step for a sequence that is done."""
        if self.fused is not None:
            self.fused.decode.drop(key)

    def new_pool(self, blocks: int, block_size: int, *, on_host: bool = False, poison: bool = False) -> KVPool:
        """A pool of this model's shape, next to the model or on the host."""
        device = torch.device("cpu") if on_host else self.device
        return KVPool(
            blocks,
            layers=self.shape.layers,
            block_size=block_size,
            kv_heads=self.shape.kv_heads,
            head_dim=self.shape.head_dim,
            dtype=self.dtype,
            device=device,
            pin=on_host and self.device.type == "cuda",
            poison=poison,
        )

    def forward(
        self, tokens: Sequence[int], positions: Sequence[int], layout: Layout, rows: Sequence[int]
    ) -> torch.Tensor:
        """Logits, of shape (len(rows), vocab), of the tokens at `rows`; keys and values of all go into the cache."""
        if self.fused is not None:
            return self.fused.forward(tokens, positions, layout, rows)
        with attention.use(layout):
            out = self.model(
                input_ids=torch.tensor([list(tokens)], device=self.device),
                position_ids=torch.tensor([list(positions)], device=self.device),
                use_cache=False,
                logits_to_keep=torch.tensor(list(rows), device=self.device),
            )
        logits: torch.Tensor = out.logits[0]
        return logits

    def _probe(self) -> Shape:
        """Runs three tokens and looks: every layer must have attended exactly once, all with keys of one shape."""
        config = self.config
        layers = config.num_hidden_layers
        kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        for name in ("qk_nope_head_dim", "v_head_dim"):  # latent attention, expanded: keys and values differ in width
            if getattr(config, name, None):
                head_dim = max(
                    head_dim,
                    getattr(config, "qk_nope_head_dim", 0) + getattr(config, "qk_rope_head_dim", 0),
                    config.v_head_dim,
                )
        pool = KVPool(
            2, layers=layers, block_size=4, kv_heads=kv_heads, head_dim=head_dim, dtype=self.dtype, device=self.device
        )
        index = torch.tensor([1, 1, 1], device=self.device)
        layout = Layout(pool, index, torch.arange(3, device=self.device), [Span(slice(0, 3), 3, index[:1])])
        try:
            with torch.inference_mode():
                self.forward([0, 0, 0], [0, 1, 2], layout, [2])
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as e:
            what = next(iter(str(e).splitlines()), "")
            raise self._refused(f"its attention does not fit the paged cache ({type(e).__name__}: {what})") from e
        if sorted(layout.seen_layers) != list(range(layers)):
            raise self._refused(
                f"{len(set(layout.seen_layers))} of its {layers} layers use transformers' attention interface"
            )
        return Shape(layers, kv_heads, head_dim)

    def _agrees(self, candidate: FusedModel) -> bool:
        """Does `candidate` give the model's own logits, for a prompt, its continuation, and tokens one by one?"""
        tokens = [(7 * i + 1) % self.config.vocab_size for i in range(24)]
        steps = [(0, 13, None), (13, 21, None), (21, 22, None), (22, 23, "probe"), (23, 24, "probe")]
        found: list[list[torch.Tensor]] = []
        for forward in (self.forward, candidate.forward):
            pool = self.new_pool(7, 4)
            blocks = torch.tensor([4, 2, 6, 1, 5, 3])
            tables: list[torch.Tensor] = []
            for start, end, key in steps:
                at = torch.arange(start, end)
                span = Span(slice(0, end - start), end, blocks[: -(-end // 4)], key)
                layout = Layout(pool, blocks[at // 4], at % 4, [span])
                tables.append(forward(tokens[start:end], range(start, end), layout, range(end - start)).float())
            found.append(tables)
        candidate.decode.drop("probe")
        tolerance = 1e-4 if self.dtype == torch.float32 else 0.05
        return all(float((a - b).norm() / a.norm()) <= tolerance for a, b in zip(*found, strict=True))

    def _refused(self, reason: str) -> NotPagedError:
        return NotPagedError(
            f"the paged engine cannot run {self.name}: {reason}",
            code="F067",
            hint='use backend = "hf", which runs it through plain transformers generation',
        )


def why_not_paged(config: Any, model: Any) -> str:
    """The reason in the configuration why packed, paged steps would change the model's answers; "" if there is none."""
    if getattr(model, "_is_stateful", False):
        return "it keeps a recurrent state, which pages cannot hold"
    other = set(getattr(config, "layer_types", None) or ()) - _SAFE_LAYERS
    if other:
        return f"it has layers of type {', '.join(sorted(other))}"
    if getattr(config, "attention_chunk_size", None):
        return "its chunked attention reaches the layers only through a mask"
    if getattr(config, "alibi", False) or config.model_type in ("bloom", "falcon", "mpt"):
        return "its positions (ALiBi) reach the layers only through a mask"
    if getattr(config, "num_kv_shared_layers", 0):
        return "some of its layers share the keys of others"
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    for part in (rope, *(p for p in rope.values() if isinstance(p, dict))):
        if part.get("rope_type", part.get("type")) in ("dynamic", "longrope"):
            return "its rotary embedding depends on the longest sequence of a step"
    return ""

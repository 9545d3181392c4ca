"""A step of a plain decoder on the CPU in as few operations as torch allows.

For the Llama family (Llama, Mistral, Qwen2, Qwen3 without sliding windows) the modules of transformers are put together
anew: queries, keys and values are one product, SiLU, gating and residual sums are done while a product is written,
the rotary embedding is one complex multiplication (the rows of the query and key weights are reordered so that what
turns together lies together, which no scalar product notices), the cache takes a step's tokens of all layers at once.
Weights lie packed (see `packed`). Sequences that decode attend through `DecodeCache`.

Whether this gives the model's own logits is tried at load time (`PagedModel`); where it does not, the model's own
modules run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from .attention import Layout, Span
from .decode_cache import DecodeAttention, DecodeCache
from .packed import can_pack, pack

FAMILIES = {"llama", "mistral", "qwen2", "qwen3"}
LEAST_ROWS = 4  # oneDNN streams a packed weight up to 1.8 times as fast for 4 rows as for 1


@dataclass(frozen=True, slots=True)
class Linear:
    """A product with a packed weight, and what may be done while its result is written."""

    weight: Any  # packed
    bias: torch.Tensor | None

    def __call__(self, x: torch.Tensor, unary: str = "none") -> torch.Tensor:
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, unary, [], "")
        return out

    def with_other(self, x: torch.Tensor, other: torch.Tensor, binary: str) -> torch.Tensor:
        """The product plus ("add") or times ("mul") `other`."""
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, other, self.weight, self.bias, binary)
        return out


@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer's weights."""

    input_norm: torch.Tensor
    qkv: Linear
    qk_norm: torch.Tensor | None  # (heads + kv_heads, dim)
    o: Linear
    post_norm: torch.Tensor
    gate: Linear
    up: Linear
    down: Linear


class FusedModel:
    """Runs packed steps of a plain decoder; `fused` makes one. Its pool's keys have their elements reordered."""

    def __init__(self, model: Any, decode_tokens: int) -> None:
        config = model.config
        inner = model.model
        attention = inner.layers[0].self_attn
        self.heads: int = config.num_attention_heads
        self.kv_heads: int = config.num_key_value_heads
        self.dim: int = attention.head_dim
        self.eps: float = config.rms_norm_eps
        self.embedding: torch.Tensor = inner.embed_tokens.weight.detach()
        self.rotary: Any = inner.rotary_emb
        self.layers = [self._layer(layer) for layer in inner.layers]
        self.norm: torch.Tensor = inner.norm.weight.detach()
        self.head = _packed(model.lm_head.weight, model.lm_head.bias)
        self.decode = DecodeCache(decode_tokens)

    def _layer(self, layer: Any) -> Layer:
        a, mlp = layer.self_attn, layer.mlp
        turned = self._turned(a.q_proj.weight) * a.scaling, self._turned(a.k_proj.weight)
        bias = None
        if a.q_proj.bias is not None:
            bias = torch.cat([self._turned(a.q_proj.bias) * a.scaling, self._turned(a.k_proj.bias), a.v_proj.bias])
        norm = None
        if hasattr(a, "q_norm"):  # the norm takes a scale away, so it goes behind it
            turned = self._turned(a.q_proj.weight), turned[1]
            q, k = self._turned(a.q_norm.weight) * a.scaling, self._turned(a.k_norm.weight)
            norm = torch.cat([q.expand(self.heads, -1), k.expand(self.kv_heads, -1)])
        return Layer(
            layer.input_layernorm.weight.detach(),
            _packed(torch.cat([*turned, a.v_proj.weight]), bias),
            norm,
            _packed(a.o_proj.weight, a.o_proj.bias),
            layer.post_attention_layernorm.weight.detach(),
            _packed(mlp.gate_proj.weight, mlp.gate_proj.bias),
            _packed(mlp.up_proj.weight, mlp.up_proj.bias),
            _packed(mlp.down_proj.weight, mlp.down_proj.bias),
        )

    def _turned(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows of heads with element i beside element i + dim / 2: what the rotary embedding turns together."""
        halves = rows.detach().reshape(-1, 2, self.dim // 2, *rows.shape[1:])
        return halves.transpose(1, 2).reshape(rows.shape)

    def forward(
        self, tokens: Sequence[int], positions: Sequence[int], layout: Layout, rows: Sequence[int]
    ) -> torch.Tensor:
        """Logits, of shape (len(rows), vocab), of the tokens at `rows`; keys and values of all go into the cache."""
        count = len(tokens)
        idle = [0] * max(0, LEAST_ROWS - count)
        x = F.embedding(torch.tensor([*tokens, *idle]), self.embedding)
        cos, sin = self.rotary(x.unsqueeze(0), torch.tensor([[*positions, *idle]]))
        half = self.dim // 2
        turn = torch.complex(cos[0, :, :half].float(), sin[0, :, :half].float()).unsqueeze(1)
        decoding, others = self._split(layout)
        new = x.new_empty(count, len(self.layers), 2, self.kv_heads, self.dim)
        out = torch.zeros(len(x), self.heads * self.dim)
        heads, both = self.heads, self.heads + self.kv_heads
        for at, layer in enumerate(self.layers):
            h = F.rms_norm(x, (x.shape[1],), layer.input_norm, self.eps)
            qkv = layer.qkv(h).view(len(x), -1, self.dim)
            qk, v = qkv[:, :both], qkv[:, both:]
            if layer.qk_norm is not None:
                qk = F.rms_norm(qk, (self.dim,), None, self.eps) * layer.qk_norm
            pairs = torch.view_as_complex(qk.float().view(len(x), -1, half, 2))
            qk = torch.view_as_real(pairs * turn).flatten(2)
            new[:, at, 0] = qk[:count, heads:]
            new[:, at, 1] = v[:count]
            if decoding is not None:
                parts = qk.numpy()
                decoding(at, parts[:, :heads], parts[:, heads:], v.float().numpy(), out.numpy())
            for span, mask in others:
                self._attend(layout, at, span, mask, qk[:, :heads], new, out)
            x = layer.o.with_other(out.to(x.dtype), x, "add")
            h = F.rms_norm(x, (x.shape[1],), layer.post_norm, self.eps)
            x = layer.down.with_other(layer.up.with_other(h, layer.gate(h, "swish"), "mul"), x, "add")
        layout.pool.data[layout.block, :, :, layout.offset] = new
        if decoding is not None:
            decoding.done()
        x = x[[*rows, *[0] * max(0, LEAST_ROWS - len(rows))]]
        return self.head(F.rms_norm(x, (x.shape[1],), self.norm, self.eps))[: len(rows)]

    def _split(self, layout: Layout) -> tuple[DecodeAttention | None, list[tuple[Span, torch.Tensor | None]]]:
        """The single tokens that attend over copies, and the other spans, each with its mask."""
        rows, copies, others = [], [], []
        for span in layout.spans:
            new = span.rows.stop - span.rows.start
            start = span.length - new
            copy = None
            if span.key is not None:
                if new == 1 and start:
                    copy = self.decode.ready(span.key, layout.pool, span.blocks, start)
                else:
                    self.decode.forget_after(span.key, start)
            if copy is not None:
                rows.append(span.rows.start)
                copies.append(copy)
                continue
            mask = None
            if start and new > 1:
                seen = torch.arange(span.length) <= torch.arange(start, span.length).unsqueeze(1)
                mask = torch.zeros(seen.shape).masked_fill_(~seen, -torch.inf)
                mask = mask.repeat(self.heads // self.kv_heads, 1)
            others.append((span, mask))
        return (DecodeAttention(rows, copies, self.heads) if copies else None), others

    def _attend(
        self,
        layout: Layout,
        layer: int,
        span: Span,
        mask: torch.Tensor | None,
        queries: torch.Tensor,
        new: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        """A span that is not in the decode cache: over its gathered blocks, and its own new keys and values."""
        count = span.rows.stop - span.rows.start
        start, size, group = span.length - count, layout.pool.block_size, self.heads // self.kv_heads
        q = queries[span.rows].transpose(0, 1)  # (heads, count, dim)
        kv = new[span.rows, layer]
        if start:
            past = layout.pool.data[span.blocks[: -(-start // size)], layer].transpose(1, 2).flatten(0, 1)
            kv = torch.cat([past[:start], kv])
        k, v = kv.float().permute(1, 2, 0, 3).unsqueeze(1)  # (1, kv_heads, length, dim) each
        if start:  # a group of query heads shares its keys: rows of one product
            got = F.scaled_dot_product_attention(q.reshape(1, *k.shape[1:2], group * count, -1), k, v, mask, scale=1.0)
        else:
            got = F.scaled_dot_product_attention(q.unsqueeze(0), k, v, is_causal=True, scale=1.0, enable_gqa=True)
        out[span.rows].view(count, self.heads, self.dim).copy_(got.reshape(self.heads, count, -1).transpose(0, 1))


def _packed(weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
    return Linear(pack(weight), None if bias is None else bias.detach())


def fused(model: Any, decode_tokens: int) -> FusedModel | None:
    """The model with its layers put together anew, or None where it is not of a family that this file knows.

    Copies of decoding sequences take at most `decode_tokens` tokens in all.
    """
    config = model.config
    known = (
        config.model_type in FAMILIES
        and getattr(config, "hidden_act", None) == "silu"
        and getattr(config, "sliding_window", None) is None
        and getattr(config, "partial_rotary_factor", 1.0) == 1.0
        and all(can_pack(p) for p in model.parameters())
    )
    return FusedModel(model, decode_tokens) if known else None

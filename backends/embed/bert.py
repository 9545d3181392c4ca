"""The forward pass of BERT-family sentence encoders in numpy: no torch to import, so a query vector 0.3 s after start.

Source: Devlin et al., "BERT", 2019, and Reimers and Gurevych, "Sentence-BERT", 2019 (mean pooling, then unit norm).
The arithmetic is the float32 arithmetic of the `transformers` model (post-norm, absolute positions, erf GELU) and
agrees with it to about 1e-6; a test holds it to that. Sequences are packed, never padded: linear layers see one matrix
of all tokens, attention sees one sequence at a time.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from flowc.ir.errors import ResourceError

__all__ = ["BertEncoder", "can_encode", "read_config"]

F32 = npt.NDArray[np.float32]


def can_encode(config: dict[str, Any]) -> bool:
    """Whether a model's config.json describes an encoder that this file computes exactly."""
    return (
        config.get("model_type") == "bert"
        and config.get("hidden_act") == "gelu"
        and config.get("position_embedding_type", "absolute") == "absolute"
        and not config.get("is_decoder", False)
    )


class BertEncoder:
    """Token ids to token states, float32. Thread-safe: nothing is changed after construction."""

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        from safetensors import SafetensorError, safe_open

        self.dim = int(config["hidden_size"])
        self.max_positions = int(config["max_position_embeddings"])
        self._heads = int(config["num_attention_heads"])
        self._eps = np.float32(config.get("layer_norm_eps", 1e-12))
        try:
            with safe_open(str(folder / "model.safetensors"), framework="numpy") as store:
                names = set(store.keys())
                prefix = "bert." if "bert.embeddings.word_embeddings.weight" in names else ""

                def load(name: str) -> F32:
                    return np.ascontiguousarray(store.get_tensor(prefix + name), dtype=np.float32)

                self._words = load("embeddings.word_embeddings.weight")
                self._positions = load("embeddings.position_embeddings.weight")
                # one segment only, so its embedding is part of every position's
                self._positions += load("embeddings.token_type_embeddings.weight")[0]
                self._norm = load("embeddings.LayerNorm.weight"), load("embeddings.LayerNorm.bias")
                self._layers = [
                    self._layer(load, f"encoder.layer.{n}.") for n in range(int(config["num_hidden_layers"]))
                ]
        except (OSError, SafetensorError, KeyError) as e:
            raise ResourceError(
                f"the weights in {folder} cannot be read: {e}",
                code="F065",
                hint="copy the model directory again: model.safetensors is missing, cut short or of another model",
            ) from e

    def _layer(self, load: Any, at: str) -> tuple[F32, ...]:
        # query, key and value as one matrix: one pass over the tokens instead of three; 1/sqrt(head) goes into query
        scale = np.float32(1.0 / math.sqrt(self.dim // self._heads))
        own = at + "attention.self."
        weight = np.concatenate([load(f"{own}{n}.weight") * (scale if n == "query" else 1) for n in _QKV])
        bias = np.concatenate([load(f"{own}{n}.bias") * (scale if n == "query" else 1) for n in _QKV])
        return (
            np.ascontiguousarray(weight.T),
            bias,
            np.ascontiguousarray(load(at + "attention.output.dense.weight").T),
            load(at + "attention.output.dense.bias"),
            load(at + "attention.output.LayerNorm.weight"),
            load(at + "attention.output.LayerNorm.bias"),
            np.ascontiguousarray(load(at + "intermediate.dense.weight").T),
            load(at + "intermediate.dense.bias"),
            np.ascontiguousarray(load(at + "output.dense.weight").T),
            load(at + "output.dense.bias"),
            load(at + "output.LayerNorm.weight"),
            load(at + "output.LayerNorm.bias"),
        )

    def encode(self, sequences: Sequence[Sequence[int]]) -> list[F32]:
        """The last layer's states of every sequence, each of shape (len(sequence), dim)."""
        lengths = [len(s) for s in sequences]
        edges = np.concatenate([[0], np.cumsum(lengths)]).tolist()
        ids = np.concatenate([np.asarray(s, dtype=np.int64) for s in sequences])
        x = self._words[ids] + np.concatenate([self._positions[:n] for n in lengths])
        x = self._layer_norm(x, *self._norm)
        size = self.dim // self._heads
        for wqkv, bqkv, wo, bo, g1, b1, w1, c1, w2, c2, g2, b2 in self._layers:
            qkv = x @ wqkv
            qkv += bqkv
            mixed = np.empty_like(x)
            for start, end in itertools.pairwise(edges):
                part = qkv[start:end].reshape(end - start, 3, self._heads, size)
                q, k, v = (part[:, i].transpose(1, 0, 2) for i in range(3))  # (heads, tokens, size)
                attention = q @ k.transpose(0, 2, 1)
                attention -= attention.max(axis=-1, keepdims=True)
                np.exp(attention, out=attention)
                attention /= attention.sum(axis=-1, keepdims=True)
                mixed[start:end] = (attention @ v).transpose(1, 0, 2).reshape(end - start, self.dim)
            out = mixed @ wo
            out += bo
            out += x
            x = self._layer_norm(out, g1, b1)
            hidden = x @ w1
            hidden += c1
            out = _gelu(hidden) @ w2
            out += c2
            out += x
            x = self._layer_norm(out, g2, b2)
        return [x[start:end] for start, end in itertools.pairwise(edges)]

    def _layer_norm(self, x: F32, weight: F32, bias: F32) -> F32:
        x = x - x.mean(axis=-1, keepdims=True)
        x /= np.sqrt(np.einsum("ij,ij->i", x, x)[:, None] / np.float32(self.dim) + self._eps)
        x *= weight
        x += bias
        return x


_QKV = ("query", "key", "value")

# erf(x) = sign(x) * (1 - exp(-x^2) * P(t)), t = 1 / (1 + p |x|): Abramowitz and Stegun, 7.1.26, error below 1.5e-7.
_ERF = tuple(np.float32(c) for c in (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592))
_ERF_P = np.float32(0.3275911)
_GELU_BLOCK = 64  # rows at a time: the dozen passes below then stay inside the cache (64 x 1536 floats, 0.4 MB)


def _gelu(x: F32) -> F32:
    """x * Phi(x) with the erf form of the normal distribution, computed in place."""
    for start in range(0, len(x), _GELU_BLOCK):
        part = x[start : start + _GELU_BLOCK]
        z = np.abs(part)
        z *= np.float32(math.sqrt(0.5))
        t = z * _ERF_P
        t += np.float32(1)
        np.reciprocal(t, out=t)
        tail = t * _ERF[0]
        for c in _ERF[1:]:
            tail += c
            tail *= t
        np.square(z, out=z)
        np.negative(z, out=z)
        np.exp(z, out=z)
        tail *= z  # 1 - erf(|x| / sqrt 2)
        # x * Phi(x) = relu(x) - |x| / 2 * tail: no cancellation on the negative side
        np.abs(part, out=z)
        z *= np.float32(0.5)
        tail *= z
        np.maximum(part, np.float32(0), out=part)
        part -= tail
    return x


def read_config(folder: Path) -> dict[str, Any]:
    """The model's config.json. Raises `ResourceError` F064 if there is no folder, F065 if it holds no whole model."""
    if not folder.is_dir():
        raise ResourceError(
            f"no model at {folder}", code="F064", hint="name a directory that holds config.json and model.safetensors"
        )
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
    except FileNotFoundError as e:
        raise ResourceError(
            f"{folder} is not a model: it has no config.json",
            code="F065",
            hint="name a directory that holds config.json, tokenizer.json and model.safetensors",
        ) from e
    except (OSError, ValueError) as e:
        raise ResourceError(f"{folder / 'config.json'} cannot be read: {e}", code="F065", hint="copy it again") from e
    if not isinstance(config, dict):
        raise ResourceError(f"{folder / 'config.json'} is not an object", code="F065", hint="copy it again")
    return config

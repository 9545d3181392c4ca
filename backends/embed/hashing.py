"""A model-free embedder: hashed words under a signed random projection. It matches words, it does not know meanings.

Source: Weinberger et al., "Feature Hashing for Large Scale Multitask Learning", 2009 (hashed features), and Achlioptas,
"Database-friendly random projections", 2003 (signs for a projection that keeps inner products).

It needs numpy only, starts at once and computes in integers, so its vectors are the same bits on every machine: what
tests need, and a stand-in where no model may be installed. For real questions without a model, a BM25 index finds more.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from flowc.ir.errors import ConfigError

__all__ = ["HashingEmbedder", "stem"]

_WORD = re.compile(r"\w+", re.UNICODE)
# Words that carry no topic. They would take part in every inner product.
_STOP = frozenset(
    "a about after all also an and any are as at be because been before being both but by can could did do does doing "
    "for from had has have having he her here his how i if in into is it its just like may me might more most must my "
    "no nor not of on one only or other our out over own s same she should so some such t than that the their them "
    "then there these they this those through to too under up use used using very was we were what when where which "
    "while who why will with would you your".split()
)
_UNIT = 64  # weights are whole multiples of 1/64: sums are exact in any order


class HashingEmbedder:
    """Unit vectors from the words of a text: each word (without its plural s) and each pair of neighbours is a feature.

    A feature's weight is 1 + log(count), a pair's half of it; its direction is `dim` signs drawn from its hash and
    `seed`. A text without words gets the unit vector of the feature "". Vectors are functions of the text alone.
    """

    def __init__(self, dim: int = 384, *, seed: int = 0, cache_size: int = 100_000) -> None:
        if not 8 <= dim <= 4096 or dim % 8:
            raise ConfigError(f"dim must be a multiple of 8 between 8 and 4096, found {dim}")
        if not 0 <= seed < 2**64:
            raise ConfigError(f"seed must be between 0 and 2**64 - 1, found {seed}")
        self.dim = dim
        self.seed = seed
        self.spec = "hashing" if dim == 384 else f"hashing:{dim}"
        self.fingerprint = f"hashing-1/{dim}/seed{seed}"
        self._signs: dict[str, npt.NDArray[np.int64]] = {}
        self._cache_size = cache_size

    def embed(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Vectors of shape (len(texts), dim)."""
        out = np.empty((len(texts), self.dim), dtype=np.float32)
        for row, text in enumerate(texts):
            out[row] = self._vector(text)
        return out

    def embed_many(
        self, texts: Sequence[str], progress: Callable[[int, int], None] | None = None
    ) -> npt.NDArray[np.float32]:
        """The same vectors as `embed`, with progress after every thousand texts."""
        parts = []
        for start in range(0, len(texts), 1000):
            parts.append(self.embed(texts[start : start + 1000]))
            if progress is not None:
                progress(min(start + 1000, len(texts)), len(texts))
        return np.concatenate(parts) if parts else np.empty((0, self.dim), dtype=np.float32)

    def close(self) -> None:
        self._signs.clear()

    def _vector(self, text: str) -> npt.NDArray[np.float32]:
        words = [stem(w) for w in _WORD.findall(text.lower()) if w not in _STOP]
        counts: dict[str, float] = {w: 1 + math.log(n) for w, n in Counter(words).items()}
        for pair, n in Counter(itertools.pairwise(words)).items():
            counts[" ".join(pair)] = (1 + math.log(n)) / 2
        total = np.zeros(self.dim, dtype=np.int64)
        for feature, weight in (counts or {"": 1.0}).items():
            total += round(weight * _UNIT) * self._direction(feature)
        if not total.any():  # two features that cancel, in a handful of dimensions
            total = self._direction(" ".join(counts))
        values = total.astype(np.float64)
        return np.asarray(values / math.sqrt(int(total @ total)), dtype=np.float32)

    def _direction(self, feature: str) -> npt.NDArray[np.int64]:
        signs = self._signs.get(feature)
        if signs is None:
            digest = hashlib.shake_128(
                feature.encode("utf-8", "surrogatepass") + b"\0" + self.seed.to_bytes(8, "little")
            ).digest(self.dim // 8)
            bits = np.unpackbits(np.frombuffer(digest, dtype=np.uint8))
            signs = bits.astype(np.int64) * 2 - 1
            if len(self._signs) < self._cache_size:
                self._signs[feature] = signs
        return signs


def stem(word: str) -> str:
    """The word without a plural s (Harman, "How effective is suffixing?", 1991: the S-stemmer)."""
    if len(word) > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")):
        return word[:-1]
    return word

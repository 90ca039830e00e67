"""What an adapter does to a linear: factors that multiply out to a change of its weight. No mlx.

Between the files (`reading.py`) and a model (`lora.py`) or a checkpoint (`fuse.py`). A weight is
[out, in] and a change is of its shape:

- `LowRank`: `scale * b @ a` (Hu et al. 2021, https://arxiv.org/abs/2106.09685)
- `Kronecker`, LoKr: `scale * kron(w1, w2)`; `Hadamard`, LoHa: `scale * (b1 @ a1) * (b2 @ a2)`
  (Yeh et al. 2023, "LyCORIS", https://arxiv.org/abs/2309.14859)
- `Dense`: the change itself

With a `Magnitude` the changed weight gets rows, or columns, of other lengths: DoRA (Liu et al.
2024, https://arxiv.org/abs/2402.09353). All numbers are float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

SMALL_RANK = 8  # up to here a Hadamard product is no more work as a LoRA of the rank's square
TINY = np.float32(1e-30)  # the least length of a row that is divided by


@dataclass(frozen=True)
class LowRank:
    """One module's adapter: the weight grows by `scale * b @ a`."""

    a: np.ndarray = field(repr=False)  # float32 [rank, in]
    b: np.ndarray = field(repr=False)  # float32 [out, rank]
    scale: float = 1.0
    dtype: str = "F32"  # that the file stores both in, as safetensors calls it

    @property
    def rank(self) -> int:
        return int(self.a.shape[0])

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in] of the weight."""
        return int(self.b.shape[0]), int(self.a.shape[1])

    def product(self) -> np.ndarray:
        """The change, float32 [out, in]."""
        return np.float32(self.scale) * (self.b @ self.a)


@dataclass(frozen=True)
class Kronecker:
    """LoKr: `scale * kron(w1, w2)`, or `kron(w1, w2 @ w2_in)` where that is stored in two."""

    w1: np.ndarray = field(repr=False)  # float32 [p, q]
    w2: np.ndarray = field(repr=False)  # float32 [m, n], or [m, rank]
    w2_in: np.ndarray | None = field(repr=False, default=None)  # float32 [rank, n]
    scale: float = 1.0

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in] of the weight."""
        last = self.w2 if self.w2_in is None else self.w2_in
        return self.w1.shape[0] * self.w2.shape[0], self.w1.shape[1] * last.shape[1]

    def product(self) -> np.ndarray:
        """The change, float32 [out, in]."""
        w2 = self.w2 if self.w2_in is None else self.w2 @ self.w2_in
        w1 = np.float32(self.scale) * self.w1
        # As np.kron, in one pass over the result.
        return (w1[:, None, :, None] * w2[None, :, None, :]).reshape(self.shape)


@dataclass(frozen=True)
class Hadamard:
    """LoHa: `scale * (b1 @ a1) * (b2 @ a2)`, entry by entry."""

    b1: np.ndarray = field(repr=False)  # float32 [out, rank]
    a1: np.ndarray = field(repr=False)  # float32 [rank, in]
    b2: np.ndarray = field(repr=False)
    a2: np.ndarray = field(repr=False)
    scale: float = 1.0

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in] of the weight."""
        return int(self.b1.shape[0]), int(self.a1.shape[1])

    def product(self) -> np.ndarray:
        """The change, float32 [out, in]."""
        return (np.float32(self.scale) * (self.b1 @ self.a1)) * (self.b2 @ self.a2)

    def low_rank(self) -> LowRank | None:
        """The same as a `LowRank` of all pairs of ranks; None where that would be a large one."""
        ranks = self.a1.shape[0], self.a2.shape[0]
        if max(ranks) > SMALL_RANK:
            return None
        out, into = self.shape
        b = (self.b1[:, :, None] * self.b2[:, None, :]).reshape(out, -1)
        a = (self.a1[:, None, :] * self.a2[None, :, :]).reshape(-1, into)
        return LowRank(a, b, self.scale)


@dataclass(frozen=True)
class Dense:
    """The change itself, as a difference of two weights."""

    values: np.ndarray = field(repr=False)  # float32 [out, in]
    scale: float = 1.0

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in] of the weight."""
        return int(self.values.shape[0]), int(self.values.shape[1])

    def product(self) -> np.ndarray:
        """The change, float32 [out, in]; a new array, as of every term."""
        return np.float32(self.scale) * self.values


Term = LowRank | Kronecker | Hadamard | Dense


@dataclass(frozen=True)
class Magnitude:
    """DoRA: how long each row of the changed weight is, or each column."""

    lengths: np.ndarray = field(repr=False)  # float32 [out], or [in]
    of_inputs: bool = False  # columns: what LyCORIS writes without `wd_on_out`

    def factors(self, changed: np.ndarray) -> np.ndarray:
        """What each row, or column, of the changed weight is multiplied by; float32."""
        norms = np.linalg.norm(changed, axis=0 if self.of_inputs else 1)
        return (self.lengths / np.maximum(norms, TINY)).astype(np.float32)


@dataclass(frozen=True)
class Piece:
    """A term, and the linear's outputs that it is about."""

    rows: np.ndarray  # int64: output k of the term is output rows[k] of the linear
    term: Term
    magnitude: Magnitude | None = None
    source: str = ""  # what the file calls it

    @property
    def index(self) -> slice | np.ndarray:
        """`rows`, as a slice where they follow on each other: that costs no copy."""
        start, count = int(self.rows[0]), len(self.rows)
        follows = bool((self.rows == np.arange(start, start + count)).all())
        return slice(start, start + count) if follows else self.rows

    def change_of(self, weight: np.ndarray) -> np.ndarray:
        """What it adds to its rows of a linear's whole weight, float32: a new array."""
        product = self.term.product()
        if self.magnitude is None:
            return product
        old = weight[self.index]
        product += old
        factors = self.magnitude.factors(product)
        product *= factors[None, :] if self.magnitude.of_inputs else factors[:, None]
        product -= old
        return product

    def factors(self, weight: np.ndarray) -> np.ndarray:
        """What its magnitude multiplies each row, or column, of the changed weight by."""
        assert self.magnitude is not None
        return self.magnitude.factors(weight[self.index] + self.term.product())

    def is_whole(self, outputs: int) -> bool:
        """Whether the term's outputs are the linear's, in order."""
        return len(self.rows) == outputs and bool((self.rows == np.arange(outputs)).all())

    def product(self, outputs: int) -> np.ndarray:
        """The change of all of the linear's outputs."""
        product = self.term.product()
        if self.is_whole(outputs):
            return product
        whole = np.zeros((outputs, product.shape[1]), np.float32)
        whole[self.rows] = product
        return whole


@dataclass(frozen=True)
class Change:
    """All that one file does to one linear."""

    outputs: int
    pieces: tuple[Piece, ...]  # of outputs apart from each other
    bias: np.ndarray | None = None  # float32 [out], added to the bias

    @property
    def is_low_rank(self) -> bool:
        """Whether it is plain LoRA: nothing but `joined`."""
        plain = all(
            isinstance(piece.term, LowRank) and piece.magnitude is None for piece in self.pieces
        )
        return plain and self.bias is None and bool(self.pieces)

    @property
    def has_magnitude(self) -> bool:
        """Whether it depends on the weight that it changes."""
        return any(piece.magnitude is not None for piece in self.pieces)

    def with_inputs(self, count: int) -> Change:
        """The same on a linear that has got more inputs, `count` in all: it leaves those alone."""
        pieces = (replace(piece, term=_with_inputs(piece.term, count)) for piece in self.pieces)
        return replace(self, pieces=tuple(pieces))

    def joined(self) -> LowRank:
        """The low-rank pieces as one adapter of the whole linear: ranks add up, side by side."""
        return joined(self.outputs, self.pieces)

    def add_to(self, weight: np.ndarray, strength: float) -> None:
        """Changes a weight, float32 [out, in], by the strength, in place.

        A strength moves the weight in a line towards what the adapter makes of it, DoRA's too.
        """
        for piece in self.pieces:
            change = piece.change_of(weight)
            change *= np.float32(strength)
            weight[piece.index] += change


def _with_inputs(term: Term, count: int) -> Term:
    missing = ((0, 0), (0, count - term.shape[1]))
    if not missing[1][1]:
        return term
    if isinstance(term, LowRank):
        return replace(term, a=np.pad(term.a, missing))
    return Dense(np.pad(term.product(), missing))


def joined(outputs: int, pieces: Sequence[Piece]) -> LowRank:
    """One `LowRank` of a whole linear from those of its outputs."""
    terms = [piece.term for piece in pieces if isinstance(piece.term, LowRank)]
    if len(terms) == 1 and pieces[0].is_whole(outputs):
        return terms[0]
    dtypes = {term.dtype for term in terms}
    a = np.concatenate([term.a for term in terms])
    b = np.zeros((outputs, a.shape[0]), dtype=np.float32)
    rank = 0
    for piece, term in zip(pieces, terms, strict=True):
        b[piece.rows, rank : rank + term.rank] = np.float32(term.scale) * term.b
        rank += term.rank
    return LowRank(a, b, dtype=dtypes.pop() if len(dtypes) == 1 else "F32")


def stack(parts: Sequence[LowRank]) -> LowRank:
    """Several adapters of one module as one of scale 1: ranks side by side."""
    return LowRank(
        np.concatenate([low.a for low in parts]),
        np.concatenate([low.scale * low.b for low in parts], axis=1),
    )

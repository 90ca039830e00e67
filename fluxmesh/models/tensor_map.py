"""What tensors a model holds, their shapes, and where each lies in a file: the same for any family.

A model's modules carry one set of names, and a file may store their tensors in pieces: the fused
query, key and value apart, the halves of a modulation in the other order. All of that is *data*
here: a `ModelTensor` is a tensor of the model, and its `pieces` are ranges of rows of the tensors
in a file that, stacked, make it. The weight loader, the checkpoint verifier, the LoRA reader and
the tests read the same tables; each family makes its own (`flux1/tensor_maps.py`).

Shapes are PyTorch's (convolutions are out, in, height, width). Imports no mlx.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

COMFY_PREFIX = "model.diffusion_model."  # before BFL's names in single files of some trainers
GROUP_SIZES = (64, 32)  # columns that share a scale where a matrix is quantized

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Rows:
    """Rows `start` to `stop` (exclusive, along axis 0) of the tensor called `key`."""

    key: str
    start: int
    stop: int

    @property
    def count(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class ModelTensor:
    """A tensor of the model: its shape, and the rows of a diffusers file that make it."""

    shape: Shape
    pieces: tuple[Rows, ...]


Tensors = dict[str, ModelTensor]


Spelling = tuple[str, str]  # a part of one of our names, and what a tool writes in its place


@dataclass(frozen=True)
class ComponentNames:
    """A component of a model, and what adapters call its modules (`adapters/targets.py`)."""

    component: str  # "transformer"
    tensors: Tensors
    prefixes: tuple[str, ...]  # that name the component before a module, in dots or underscores
    spellings: tuple[Spelling, ...] = ()
    extra: Mapping[str, tuple[Rows, ...]] = field(default_factory=dict)
    """Names that no spelling gives: each with the rows of the linear that it means."""
    written: Mapping[str, str] = field(default_factory=dict)
    """By format of `adapters/formats.py`: what it writes before a module. The denoiser's is the
    format's own; a format that is missing has no place for the component."""
    absent: frozenset[str] = frozenset()
    """Modules that other models of the family have: what adapts them is left out."""
    wider: Mapping[str, int] = field(default_factory=dict)
    """Linears that an adapter may give more inputs, and how many there are then in all."""


class TensorTable:
    """Collects targets; every `add` is one linear, norm or convolution."""

    def __init__(self) -> None:
        self.tensors: Tensors = {}

    def tensor(self, name: str, shape: Shape, pieces: list[Rows]) -> None:
        self.tensors[name] = ModelTensor(shape, tuple(pieces))

    def same(self, name: str, key: str, shape: Shape) -> None:
        """One tensor of the file is one of the model."""
        self.tensor(name, shape, [Rows(key, 0, shape[0])])

    def linear(self, name: str, key: str, out: int, into: int, bias: bool = True) -> None:
        self.stacked(name, [(key, out)], into, bias)

    def stacked(
        self, name: str, parts: list[tuple[str, int]], into: int, bias: bool = True
    ) -> None:
        """A linear whose rows are those of several of the file's linears, one below the other."""
        out = sum(rows for _, rows in parts)
        for leaf, shape in (("weight", (out, into)), ("bias", (out,)))[: 2 if bias else 1]:
            self.tensor(
                f"{name}.{leaf}", shape, [Rows(f"{key}.{leaf}", 0, rows) for key, rows in parts]
            )

    def conv(self, name: str, key: str, out: int, into: int, kernel: int) -> None:
        self.same(f"{name}.weight", f"{key}.weight", (out, into, kernel, kernel))
        self.same(f"{name}.bias", f"{key}.bias", (out,))

    def query_key_norms(self, name: str, key: str, theirs: tuple[str, str], width: int) -> None:
        """The norms of a head's queries and keys, `width` channels each."""
        for mine, other in zip(("query_norm", "key_norm"), theirs, strict=True):
            self.same(f"{name}.{mine}.scale", f"{key}.{other}.weight", (width,))

    def swapped(self, name: str, key: str, half: int, into: int, bias: bool = True) -> None:
        """A linear of twice `half` outputs, whose halves the file has the other way round."""
        shapes: dict[str, Shape] = {"weight": (2 * half, into)}
        if bias:
            shapes["bias"] = (2 * half,)
        for leaf, shape in shapes.items():
            rows = [Rows(f"{key}.{leaf}", half, 2 * half), Rows(f"{key}.{leaf}", 0, half)]
            self.tensor(f"{name}.{leaf}", shape, rows)

    def norm(self, name: str, key: str, width: int) -> None:
        self.same(f"{name}.weight", f"{key}.weight", (width,))
        self.same(f"{name}.bias", f"{key}.bias", (width,))


def column_group(name: str, shape: Shape, matrices: tuple[str, ...]) -> int | None:
    """Columns that share a scale when tensor `name` is quantized: the largest group that divides a
    row. None where it is kept whole: it is no matrix, or begins as none of `matrices` does."""
    if len(shape) != 2 or not name.endswith(".weight") or not name.startswith(matrices):
        return None
    return next((size for size in GROUP_SIZES if shape[1] % size == 0), None)


def in_bfl_file(tensors: Tensors) -> Tensors:
    """The same targets, when the file stores them whole and by the model's own names."""
    return {
        name: ModelTensor(target.shape, (Rows(name, 0, target.shape[0]),))
        for name, target in tensors.items()
    }


def to_diffusers(tensors: Tensors) -> dict[str, tuple[Rows, ...]]:
    """The other direction: each tensor of a diffusers file as rows of the model's tensors."""
    parts_by_key: dict[str, list[tuple[int, Rows]]] = {}
    for name, target in tensors.items():
        offset = 0
        for piece in target.pieces:
            parts_by_key.setdefault(piece.key, []).append(
                (piece.start, Rows(name, offset, offset + piece.count))
            )
            offset += piece.count
    return {
        key: tuple(rows for _, rows in sorted(parts, key=lambda part: part[0]))
        for key, parts in parts_by_key.items()
    }


def pieces_between(pieces: tuple[Rows, ...], start: int, stop: int) -> Iterator[Rows]:
    """The parts of the stacked `pieces` that make rows `start` to `stop` of the target."""
    offset = 0
    for piece in pieces:
        low, high = max(start, offset), min(stop, offset + piece.count)
        if low < high:
            yield Rows(piece.key, piece.start + low - offset, piece.start + high - offset)
        offset += piece.count


def same_but_for_ones(shape: Shape, other: Shape) -> bool:
    """Whether two shapes hold the same numbers, a 1x1 convolution being a linear."""
    return _strip(shape) == _strip(other)


def _strip(shape: Shape) -> Shape:
    size = len(shape)
    while size > 1 and shape[size - 1] == 1:
        size -= 1
    return tuple(shape[:size])


def parameter_count(tensors: Mapping[str, ModelTensor]) -> int:
    """Numbers that the model holds."""
    total = 0
    for target in tensors.values():
        size = 1
        for side in target.shape:
            size *= side
        total += size
    return total

"""MLX's affine quantization in a file: `weight` (uint32), `scales` and `biases` of one linear.

A row's numbers lie as a stream of 2 to 8 bits each, lowest bits first, in uint32 words; 32, 64 or
128 of them share a scale and a bias: `number = scale * code + bias`
(https://ml-explore.github.io/mlx/build/html/python/_autosummary/mlx.core.quantize.html). mlx-lm,
mflux and fluxmesh write it. Bits and group size follow from shapes once the columns are known; of
a file alone, they may be ambiguous, and its metadata says. Imports no mlx.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fluxmesh.errors import WeightsError
from fluxmesh.storage.safetensors import FLOATS, Entry, Header

BITS = (4, 8, 3, 5, 6, 2)
GROUPS = (64, 32, 128)  # the usual one first
LEAVES = ("weight", "scales", "biases")
# Under which a writer's metadata says how many bits: mflux, and whoever copies a config's words.
_BITS_KEYS, _GROUP_KEYS = ("quantization_level", "bits", "q_bits"), ("group_size", "q_group_size")


@dataclass(frozen=True)
class Packing:
    """Bits of a number, and how many numbers of a row share a scale and a bias."""

    bits: int
    group: int

    def width(self, columns: int) -> int:
        """uint32 words of a row."""
        return columns * self.bits // 32


@dataclass(frozen=True)
class Triple:
    """The three tensors of a linear, [rows, words], [rows, groups] and [rows, groups]."""

    weight: Entry
    scales: Entry
    biases: Entry

    @property
    def entries(self) -> tuple[Entry, Entry, Entry]:
        return self.weight, self.scales, self.biases

    def packing(self, columns: int) -> Packing | None:
        """What makes so many columns of the row's words; None where nothing does."""
        groups, words = self.scales.shape[1], self.weight.shape[1]
        for bits in BITS:
            for group in GROUPS:
                if columns == groups * group and words * 32 == columns * bits:
                    return Packing(bits, group)
        return None

    def likely_packing(self, metadata: Mapping[str, str]) -> Packing | None:
        """What the shapes allow where columns are not known: as the metadata says, else usual."""
        groups, words = self.scales.shape[1], self.weight.shape[1]
        bits_said, group_said = (_said(metadata, keys) for keys in (_BITS_KEYS, _GROUP_KEYS))
        allowed = [
            Packing(bits, group)
            for group in GROUPS
            for bits in BITS
            if groups * group * bits == words * 32
        ]
        allowed.sort(key=lambda p: (p.bits != bits_said, p.group != group_said))
        return allowed[0] if allowed else None


def triple_of(header: Header, key: str) -> Triple | None:
    """The triple whose weight is called `key`; None where that is no packed matrix.

    Raises `WeightsError` for one whose scales or biases are missing or do not fit.
    """
    weight = header.entries.get(key)
    if weight is None or weight.dtype != "U32" or not key.endswith(".weight"):
        return None
    module = key.removesuffix(".weight")
    scales, biases = (header.entries.get(f"{module}.{leaf}") for leaf in LEAVES[1:])
    if scales is None or biases is None:
        raise WeightsError(
            f"{weight.path} stores {key} in whole numbers and lacks {module}.scales or .biases "
            "(MLX's mxfp4 and nvfp4 have no biases); fluxmesh reads MLX's affine form, so name a "
            "model that was saved in it."
        )
    fits = len(weight.shape) == 2 and scales.shape == biases.shape
    if not fits or len(scales.shape) != 2 or scales.shape[0] != weight.shape[0]:
        raise WeightsError(
            f"{weight.path}: {key} has shape {weight.shape} and its scales {scales.shape}, which "
            "are of no quantized matrix; the file is damaged."
        )
    if scales.dtype not in FLOATS or biases.dtype not in FLOATS:
        raise WeightsError(
            f"{weight.path}: the scales of {key} have dtype {scales.dtype}; fluxmesh reads MLX's "
            "affine form, whose scales are floats."
        )
    return Triple(weight, scales, biases)


def shape_of(header: Header, key: str) -> tuple[int, ...]:
    """The shape of the matrix that a tensor stands for; its own, where it is not packed.

    Raises as `triple_of`.
    """
    triple = triple_of(header, key)
    packing = triple.likely_packing(header.metadata) if triple is not None else None
    if triple is None or packing is None:
        return header.entries[key].shape
    return triple.weight.shape[0], triple.scales.shape[1] * packing.group


def bits_of(header: Header) -> int | None:
    """Bits of the matrices of a file, the most frequent; None where none is packed."""
    counts: dict[int, int] = {}
    for key in header.entries:
        triple = triple_of(header, key)
        packing = triple.likely_packing(header.metadata) if triple is not None else None
        if packing is not None:
            counts[packing.bits] = counts.get(packing.bits, 0) + 1
    return max(counts, key=lambda bits: counts[bits]) if counts else None


def to_float32(
    words: np.ndarray, scales: np.ndarray, biases: np.ndarray, packing: Packing
) -> np.ndarray:
    """Rows as float32 [rows, columns]: uint32 words, float32 scales and biases [rows, groups]."""
    rows, bits = len(words), packing.bits
    stream = np.ascontiguousarray(words, dtype="<u4").view(np.uint8).reshape(rows, -1)
    if bits == 8:
        codes = stream
    else:
        places = np.unpackbits(stream, axis=1, bitorder="little").reshape(rows, -1, bits)
        codes = np.packbits(places, axis=2, bitorder="little")[:, :, 0]
    groups = codes.reshape(rows, -1, packing.group)
    values = scales[:, :, None] * groups + biases[:, :, None]
    return values.reshape(rows, -1)


def _said(metadata: Mapping[str, str], keys: tuple[str, ...]) -> int | None:
    for key in keys:
        value = metadata.get(key)
        if isinstance(value, str) and value.isdecimal():
            return int(value)
    return None

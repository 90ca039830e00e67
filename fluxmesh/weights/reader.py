"""A checkpoint's models as tables of stored tensors, checked before a byte of them is read.

`ComponentReader` joins a component's files with the table of what its model holds
(`tensor_maps.py` of its family): it says which tensor is missing or of the wrong shape, and reads
any rows of any tensor, however the file splits it and in whatever form it stores the numbers
(`storage/numbers/`). Matrices in MLX's quantized form stay in it where the model's layers take it:
each comes as `weight`, `scales` and `biases`. Imports no mlx.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

import numpy as np

from fluxmesh.errors import WeightsError
from fluxmesh.models import tensor_map
from fluxmesh.models.files.configs import LEAST
from fluxmesh.models.tensor_map import ModelTensor, Rows, Tensors
from fluxmesh.storage.numbers import finite, foreign
from fluxmesh.storage.numbers.affine import LEAVES, Packing
from fluxmesh.storage.numbers.rearranged import ChannelsLastSource, ZeroSource
from fluxmesh.storage.numbers.tensor_source import (
    CHUNK,
    AffineSource,
    PackedSource,
    PlainSource,
    TensorSource,
    source_of,
)
from fluxmesh.storage.safetensors import NUMPY, Header, read_each_into
from fluxmesh.storage.tensor_files import read_headers
from fluxmesh.weights.checkpoint import Checkpoint


@dataclass(frozen=True)
class Stored:
    """Rows of a model's tensor as the file has them; `dtype` is the file's name for theirs."""

    values: np.ndarray
    dtype: str


def table_of(checkpoint: Checkpoint, component: str) -> Tensors:
    """What the files of a component must hold, unquantized.

    Raises `WeightsError` for absurd sizes.
    """
    _check_sizes(checkpoint)
    return checkpoint.architecture.tensors_in(component)


class ComponentReader:
    """Reads one component of a checkpoint by the model's own names."""

    def __init__(
        self, checkpoint: Checkpoint, component: str, header: Header | None = None
    ) -> None:
        """Reads headers alone; `header` is that of files that are not here yet.

        Raises `WeightsError` naming the file and the tensor.
        """
        self.checkpoint, self.component = checkpoint, component
        part = checkpoint.components[component]
        family = checkpoint.family
        self._spellings = family.folder.spellings
        self._left_out: Collection[str] = ()
        table = table_of(checkpoint, component)
        if part.layout in ("bfl", "fluxmesh"):
            table = tensor_map.in_bfl_file(table)
        elif part.layout == "mflux" and family.mflux is not None:
            table = family.mflux.renamed(component, table)
            self._left_out = family.mflux.left_out
        self.header = header or read_headers(part.files)
        foreign.refuse(self.header)
        self.nbytes = 0 if header else part.nbytes
        self.targets: Tensors = {}
        self.packings: dict[str, Packing] = {}  # of the linears that stay quantized, by module
        self._sources: dict[str, TensorSource] = {}
        for name, target in table.items():
            self._add(name, target)

    @property
    def bits(self) -> int | None:
        """Bits that the component's matrices are stored in and stay in; None for plain ones."""
        counts = [packing.bits for packing in self.packings.values()]
        return max(set(counts), key=counts.count) if counts else None

    @property
    def looked_up(self) -> frozenset[str]:
        """Tensors that no model holds (`Architecture.looked_up_in`)."""
        return self.checkpoint.architecture.looked_up_in(self.component)

    def group_size(self, name: str, shape: tuple[int, ...]) -> int | None:
        """Columns that share a scale where the tensor is quantized; None where it is whole."""
        return self.checkpoint.architecture.group_size(self.component, name, shape)

    def rows(
        self, name: str, start: int = 0, stop: int | None = None, dtype: str | None = None
    ) -> Stored:
        """Rows `start` to `stop` of the model's tensor `name`, and not a byte more.

        PyTorch's axis order. A shard of a model is made of such calls. `dtype`, F32 say, is what
        they are wanted in; None is `dtype(name)`. Raises `WeightsError` where the file can't be
        read.
        """
        target = self.targets[name]
        stop = target.shape[0] if stop is None else stop
        dtype = dtype or self.dtype(name, start, stop)
        out = np.empty((stop - start, *target.shape[1:]), dtype=NUMPY[dtype])
        self.rows_into(out, name, start)
        return Stored(out, dtype)

    def rows_into(self, out: np.ndarray, name: str, start: int = 0) -> None:
        """As `rows`, into `out`: contiguous, as many rows as are wanted, of NumPy's `dtype`."""
        self.spans_into(out, name, ((start, start + len(out)),))

    def spans_into(self, out: np.ndarray, name: str, spans: Iterable[tuple[int, int]]) -> None:
        """As `rows_into`, the rows of several spans, from and to, one after another."""
        reads = []
        offset = 0
        for start, stop in spans:
            for piece, source in self._pieces(name, start, stop):
                rows = out[offset : offset + piece.count]
                offset += piece.count
                if source.is_plain and NUMPY[source.dtype] == out.dtype:
                    reads.append((rows, source.entry, piece.start))
                else:
                    source.read_into(rows, piece.start)
        read_each_into(reads, finite.glance)

    def check_rows(self, name: str, start: int, stop: int) -> None:
        """Reads rows and looks at every number. Raises `WeightsError` for NaN and infinity."""
        for piece, source in self._pieces(name, start, stop):
            dtype = source.dtype if source.is_plain else "F32"
            out = np.empty((piece.count, *source.shape[1:]), dtype=NUMPY[dtype])
            if source.is_plain:
                read_each_into([(out, source.entry, piece.start)], finite.check)
            else:
                source.read_into(out, piece.start)

    def dtype(
        self, name: str, start: int = 0, stop: int | None = None, wanted: str | None = None
    ) -> str:
        """What safetensors calls the dtype that these rows are best read in.

        Of plain numbers, the file's own: their bytes are read as they are. What must be computed
        comes in `wanted`, if it is given.
        """
        stop = self.targets[name].shape[0] if stop is None else stop
        sources = [source for _, source in self._pieces(name, start, stop)]
        dtypes = {source.dtype for source in sources}
        if wanted is not None and not (len(dtypes) == 1 and all(s.is_plain for s in sources)):
            return wanted
        return dtypes.pop() if len(dtypes) == 1 else "F32"

    def _pieces(self, name: str, start: int, stop: int) -> list[tuple[Rows, TensorSource]]:
        pieces = tensor_map.pieces_between(self.targets[name].pieces, start, stop)
        return [(piece, self._sources[piece.key]) for piece in pieces]

    def stored_bytes(self, name: str) -> int:
        """Bytes that the tensor takes in the file."""
        total = 0
        for piece in self.targets[name].pieces:
            source = self._sources[piece.key]
            total += source.nbytes * piece.count // max(source.shape[0], 1)
        return total

    def _add(self, name: str, target: ModelTensor) -> None:
        """Finds a tensor's pieces in the files and checks them."""
        ends = _rows_by_key(target)
        packings = set()
        for piece in target.pieces:
            expected = (ends[piece.key], *target.shape[1:])
            source = self._source(piece.key, expected)
            if not tensor_map.same_but_for_ones(source.shape, expected):
                raise WeightsError(
                    f"{source.entry.path}: {source.entry.key} has shape {source.shape} where the "
                    f"model's config asks for {expected}; the file belongs to another model, or is "
                    "damaged."
                )
            self._sources[piece.key] = source
            packings.add(source.packing if isinstance(source, AffineSource) else None)
        packing = packings.pop() if len(packings) == 1 else None
        if packing is not None and self.group_size(name, target.shape) is not None:
            self._add_packed(name, target, packing)
        else:
            self.targets[name] = target

    def _source(self, key: str, expected: tuple[int, ...]) -> TensorSource:
        """The tensor of the file in PyTorch's order of axes."""
        if self.checkpoint.components[self.component].layout != "mflux":
            return source_of(self.header, self._spelled(key), expected)
        if key in self._left_out and key not in self.header.entries:
            return ZeroSource(next(iter(self.header.entries.values())), expected)
        return ChannelsLastSource.of(source_of(self.header, self._spelled(key), expected))

    def _add_packed(self, name: str, target: ModelTensor, packing: Packing) -> None:
        """Keeps a matrix in MLX's quantized form: three tensors of as many rows in its place."""
        stored_bits = self.checkpoint.bits_of(self.component)
        module = name.removesuffix(".weight")
        pieces: dict[str, list[Rows]] = {leaf: [] for leaf in LEAVES}
        for piece in target.pieces:
            source = self._sources.pop(piece.key)
            assert isinstance(source, AffineSource)
            if stored_bits and packing.bits != stored_bits:
                raise WeightsError(
                    f"{source.entry.path}: {source.entry.key} has shape {source.entry.shape}, "
                    f"which is {packing.bits} bits a number where the model says {stored_bits}; "
                    "quantize it again."
                )
            for leaf, entry in zip(LEAVES, source.triple.entries, strict=True):
                key = f"{piece.key.removesuffix('.weight')}.{leaf}"
                kind = PackedSource if leaf == "weight" else PlainSource
                self._sources[key] = kind(entry, entry.shape)
                pieces[leaf].append(Rows(key, piece.start, piece.stop))
        rows, columns = target.shape
        widths = (packing.width(columns), columns // packing.group, columns // packing.group)
        for leaf, width in zip(LEAVES, widths, strict=True):
            self.targets[f"{module}.{leaf}"] = ModelTensor((rows, width), tuple(pieces[leaf]))
        self.packings[module] = packing

    def _spelled(self, key: str) -> str:
        """The name that a tensor has in the file."""
        prefix = self.checkpoint.components[self.component].prefix
        for spelling in (f"{prefix}{name}" for name in self._spellings(key)):
            if spelling in self.header.entries:
                return spelling
        raise WeightsError(
            f"{self._where()} lacks {key}, which the model needs; the file is incomplete or of "
            "another model."
        )

    def _where(self) -> str:
        files = self.checkpoint.components[self.component].files
        return str(files[0]) if len(files) == 1 else str(files[0].parent)


def _rows_by_key(target: ModelTensor) -> dict[str, int]:
    """Rows that each tensor of the file must have: no target leaves any row of it unused."""
    ends: dict[str, int] = {}
    for piece in target.pieces:
        ends[piece.key] = max(ends.get(piece.key, 0), piece.stop)
    return ends


def verify(checkpoint: Checkpoint) -> None:
    """Checks every component's files against its config, reading headers alone.

    Raises `WeightsError` naming the first file and tensor that is truncated, corrupt, missing or
    of the wrong shape or dtype.
    """
    for component in checkpoint.components:
        ComponentReader(checkpoint, component)


def stored_bits(checkpoint: Checkpoint) -> int | None:
    """Bits that a checkpoint, or any component of it, is quantized to; None for a plain one.

    Reads headers alone. Raises as `verify`.
    """
    if checkpoint.bits:
        return checkpoint.bits
    bits = (ComponentReader(checkpoint, component).bits for component in checkpoint.components)
    return next(filter(None, bits), None)


def first_not_finite(
    checkpoint: Checkpoint, progress: Callable[[int, int], None] = lambda done, total: None
) -> WeightsError | None:
    """The error of the first tensor that holds NaN or infinity, looking at every number.

    For who got NaN from a step: loading looks at a part of large tensors only. Reads all files;
    `progress` hears (bytes read, bytes in all).
    """
    readers = [ComponentReader(checkpoint, component) for component in checkpoint.components]
    total = sum(reader.stored_bytes(name) for reader in readers for name in reader.targets)
    done = 0
    for reader in readers:
        for name, target in reader.targets.items():
            step = max(1, CHUNK // max(1, math.prod(target.shape[1:])))
            for start in range(0, target.shape[0], step):
                stop = min(start + step, target.shape[0])
                try:
                    reader.check_rows(name, start, stop)
                except WeightsError as error:
                    return error
                progress(done + reader.stored_bytes(name) * stop // target.shape[0], total)
            done += reader.stored_bytes(name)
    return None


def _check_sizes(checkpoint: Checkpoint) -> None:
    """Sizes that no FLUX has would make tables without end, or models that can't compute."""
    model = checkpoint.architecture
    for part, config in model.configs.items():
        for field in dataclasses.fields(config):
            value = getattr(config, field.name)
            low, high = field.metadata.get(LEAST, 1), _most(field.name)
            numbers = value if isinstance(value, tuple) else (value,)
            if not numbers or not all(
                low <= number <= high for number in numbers if type(number) is int
            ):
                raise WeightsError(
                    f"The {part} config of {checkpoint.name} says {field.name} is {value}; "
                    "the checkpoint is damaged."
                )
    for rule, holds in model.rules.items():
        if not holds:
            raise WeightsError(f"{checkpoint.name} is damaged: in its configs, {rule}.")


def _most(field: str) -> int:
    """What a whole number of a config may be at most: few are numbers of layers."""
    return 512 if "depth" in field or "layers" in field or "blocks" in field else 2**24

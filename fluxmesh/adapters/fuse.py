"""Writes a checkpoint with adapters fused into it: a diffusers folder that needs them no more.

Any unquantized checkpoint goes in; its transformer is written in diffusers' names and in the dtype
that it is stored in, each sum taken in float32 and rounded once. What no adapter touches is copied.
The folder appears under its name only when it is whole (`writer.py`).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from fluxmesh.adapters.changes import Change, LowRank, stack
from fluxmesh.adapters.find import find_adapter
from fluxmesh.adapters.reading import AdapterFile, adapted, open_adapter
from fluxmesh.adapters.targets import targets_of
from fluxmesh.errors import AdapterError, UsageError
from fluxmesh.machine.awake import kept_awake
from fluxmesh.models.tensor_map import Rows, to_diffusers
from fluxmesh.storage import bfloat16
from fluxmesh.storage.hashing import sha256_of
from fluxmesh.storage.safetensors import write_tensors
from fluxmesh.storage.writable import check_new, check_room
from fluxmesh.weights.checkpoint import Checkpoint
from fluxmesh.weights.reader import ComponentReader, Stored, stored_bits, table_of, verify
from fluxmesh.weights.writer import (
    SHARD_BYTES,
    config_of,
    new_folder,
    write_json,
    write_surroundings,
)

OnBytes = Callable[[int, int], None]  # bytes done, and in all
Paths = Sequence[tuple[str | Path, float]]  # adapters with their strengths
STEMS = {"transformer": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}


@kept_awake()
def fuse_checkpoint(
    source: Checkpoint, folder: Path, adapters: Paths, on_bytes: OnBytes | None = None
) -> list[str]:
    """Writes `source` into the new `folder` with adapters, by their strengths, in its weights.

    Returns sentences that say what of the adapters is left out.

    `on_bytes` hears (bytes read, bytes in all). Raises `UsageError` for a quantized source,
    `OutputError` where `folder` exists or can't be written, `WeightsError` for a broken source,
    and `AdapterError` or `ModelNotFoundError` for an adapter that is not one of this model.
    """
    if stored_bits(source):
        raise UsageError(
            f"{source.name} is quantized, so that fusing would round it twice; fuse into the model "
            "that it was made from, and quantize the result with `fluxmesh models quantize`."
        )
    check_new(folder)
    verify(source)
    targets = targets_of(source.architecture)
    files = [(find_adapter(path), strength) for path, strength in adapters]
    opened = [(open_adapter(file, targets), strength) for file, strength in files]
    for file, _ in opened:
        file.check_values()
    tell = on_bytes or (lambda done, total: None)
    total = sum(part.nbytes for part in source.components.values())
    check_room(folder, total)
    with new_folder(folder) as partial:
        done = 0
        for name in source.components:
            (partial / name).mkdir()
            changes = _Changes(ComponentReader(source, name), opened)
            if changes.is_any or source.components[name].layout != "diffusers":
                steps = _write_component(source, name, partial / name, changes)
            else:
                steps = _copy_component(source, name, partial / name)
            for step in steps:
                done += step
                tell(min(done, total), total)  # fp8 is written in twice its bytes
        fused = [
            {"name": file.name, "sha256": sha256_of(file), "scale": strength}
            for file, strength in files
        ]
        write_surroundings(_adapted(source, opened), partial, {"fused": fused})
    return [note for file, _ in opened for note in file.notes]


def _adapted(source: Checkpoint, opened: Sequence[tuple[AdapterFile, float]]) -> Checkpoint:
    """The checkpoint as the adapters make it, its files not yet written."""
    model = adapted(source.architecture, [file for file, _ in opened])
    return replace(source, architecture=model)


def _copy_component(source: Checkpoint, name: str, folder: Path) -> Iterator[int]:
    """A folder's files as they are, with config and index. Yields bytes as they are done."""
    files = source.components[name].files
    for file in files:
        shutil.copyfile(file, folder / file.name)
        yield file.stat().st_size
    for other in files[0].parent.glob("*.json"):  # the config, and an index of shards
        shutil.copyfile(other, folder / other.name)


def _write_component(
    source: Checkpoint, name: str, folder: Path, changes: _Changes
) -> Iterator[int]:
    """The component in diffusers' names, in files of about SHARD_BYTES. Yields bytes as done."""
    reader, model = changes.reader, source.architecture
    form = source.family.folder
    shards = _shards(reader)
    stem = STEMS.get(name, "model")
    weight_map: dict[str, str] = {}
    for number, keys in enumerate(shards, start=1):
        many = f"-{number:05}-of-{len(shards):05}" if len(shards) > 1 else ""
        file = f"{stem}{many}.safetensors"
        arrays = {}
        for key, rows in keys.items():
            stored = changes.fused(rows)
            # BFL keeps the autoencoder's attention as 1x1 convolutions, diffusers as linears.
            flat = stored.values.ndim == 4 and ".attentions." in key
            values = stored.values[:, :, 0, 0] if flat else stored.values
            arrays[form.saved_name(model, key)] = (values, stored.dtype)
            yield stored.values.nbytes
        write_tensors(folder / file, arrays, {"format": "pt"})
        weight_map |= dict.fromkeys(arrays, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": reader.nbytes}, "weight_map": weight_map}
        write_json(folder / f"{stem}.safetensors.index.json", index)
    target = _adapted(source, changes.opened)
    config = dict(form.class_of(target.architecture, name)) | config_of(target, name)
    write_json(folder / "config.json", config)


def _shards(reader: ComponentReader) -> list[dict[str, tuple[Rows, ...]]]:
    """diffusers' tensors with the model's rows that each is made of, file by file."""
    table = to_diffusers(table_of(reader.checkpoint, reader.component))
    shards: list[dict[str, tuple[Rows, ...]]] = [{}]
    size = 0
    for key, rows in table.items():
        nbytes = sum(
            reader.stored_bytes(piece.key) * piece.count // reader.targets[piece.key].shape[0]
            for piece in rows
        )
        if shards[-1] and size + nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][key] = rows
        size += nbytes
    return shards


class _Changes:
    """What the adapters do to one component, tensor by tensor."""

    def __init__(
        self, reader: ComponentReader, opened: Sequence[tuple[AdapterFile, float]]
    ) -> None:
        self.reader, self.opened = reader, opened
        component = reader.component
        known = [file for file, _ in opened if component in file.targets.shapes]
        self.linears = {name for file in known for name in file.linears(component)}
        self.norms = {
            name
            for file in known
            for name in (*file.norms(component), *file.replacements(component))
        }
        # What linears that get more inputs have then.
        self.inputs = {name: width for file in known for (_, name), width in file.inputs.items()}
        self._latest: tuple[str, LowRank | np.ndarray] | None = None  # of the linear at hand

    @property
    def is_any(self) -> bool:
        """Whether anything of the component changes."""
        return bool(self.linears or self.norms)

    def fused(self, rows: tuple[Rows, ...]) -> Stored:
        """One of diffusers' tensors with the adapters' part added, in the dtype of the file.

        That of numbers which are computed, such as fp8's with a scale, is bfloat16.
        """
        dtypes = {self.reader.dtype(piece.key, piece.start, piece.stop) for piece in rows}
        dtype = dtypes.pop() if len(dtypes) == 1 else "F32"
        values = [self._block(piece, dtype) for piece in rows]
        return Stored(values[0] if len(values) == 1 else np.concatenate(values), dtype)

    def _block(self, piece: Rows, dtype: str) -> np.ndarray:
        module, _, leaf = piece.key.rpartition(".")
        if leaf == "weight" and module in self.linears:
            change = self._change(module)
            if isinstance(change, LowRank):
                delta = (change.scale * change.b[piece.start : piece.stop]) @ change.a
            else:
                delta = change[piece.start : piece.stop]
        elif leaf == "bias" and module in self.linears:
            delta = self._bias(module, piece)
        elif piece.key not in self.norms:
            return self.reader.rows(piece.key, piece.start, piece.stop, dtype).values
        exact = self._before(piece)
        if piece.key in self.norms:
            delta = self._norm(piece, exact)
        total = _rounded(exact + delta.reshape(exact.shape), dtype)
        if not np.isfinite(bfloat16.to_float32(total) if dtype == "BF16" else total).all():
            raise AdapterError(f"With these strengths {piece.key} is not finite; lower them.")
        return total

    def _before(self, piece: Rows) -> np.ndarray:
        """What the checkpoint has, float32; zeros where a linear gets more inputs."""
        values = self.reader.rows(piece.key, piece.start, piece.stop, "F32").values
        inputs = self.inputs.get(piece.key.removesuffix(".weight"))
        if inputs is None or not piece.key.endswith(".weight"):
            return values
        return np.pad(values, ((0, 0), (0, inputs - values.shape[1])))

    def _of(self, module: str) -> list[tuple[Change, float]]:
        component = self.reader.component
        changes = [
            (file.change(component, module), strength)
            for file, strength in self.opened
            if module in file.linears(component)
        ]
        inputs = self.inputs.get(module)
        if inputs is None:
            return changes
        return [(change.with_inputs(inputs), strength) for change, strength in changes]

    def _change(self, module: str) -> LowRank | np.ndarray:
        """A linear's change, as factors where it is plain LoRA, else multiplied out."""
        if self._latest is not None and self._latest[0] == module:
            return self._latest[1]
        changes = self._of(module)
        made: LowRank | np.ndarray
        if all(change.is_low_rank for change, _ in changes):
            lows = [(change.joined(), strength) for change, strength in changes]
            made = stack([LowRank(low.a, low.b, low.scale * strength) for low, strength in lows])
        else:
            key = f"{module}.weight"
            before = self._before(Rows(key, 0, self.reader.targets[key].shape[0]))
            made = before.copy()
            for change, strength in changes:
                change.add_to(made, strength)
            made -= before
        self._latest = (module, made)
        return made

    def _bias(self, module: str, piece: Rows) -> np.ndarray:
        total = np.zeros(piece.count, np.float32)
        for change, strength in self._of(module):
            if change.bias is not None:
                total += np.float32(strength) * change.bias[piece.start : piece.stop]
        return total

    def _norm(self, piece: Rows, before: np.ndarray) -> np.ndarray:
        """What is added to rows of a vector; a strength goes in a line towards a replacement."""
        total = np.zeros(piece.count, np.float32)
        for file, strength in self.opened:
            values = file.norms(self.reader.component).get(piece.key)
            if values is not None:
                total += np.float32(strength) * values[piece.start : piece.stop]
            instead = file.replacements(self.reader.component).get(piece.key)
            if instead is not None:
                moved = instead[piece.start : piece.stop] - before - total
                total += np.float32(strength) * moved
        return total


def _rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 as the file's dtype stores it, to the nearest and ties to even."""
    if dtype == "BF16":
        return bfloat16.of_float32(values)
    return values.astype(np.float16 if dtype == "F16" else np.float32)

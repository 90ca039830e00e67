"""An adapter's file, checked by its header, and what it does to each linear, read one by one.

Stands on `keys.py` (which tensor is what), `targets.py` (which module is meant), `factors.py` (what
the tensors of a module make), `peft.py` (how strong) and `refusals.py` (what else a file may be);
above stand `lora.py`, `fuse.py` and `convert.py`. Opening a file
reads its header alone, but for the small tensors that may be all zero; `AdapterFile.change` reads
one linear's factors, so that no more than these is ever in memory. Imports no mlx.

Whatever is wrong with a file is an `AdapterError`: it is the request that is at fault, never the
host that reads it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np

from fluxmesh.adapters import refusals, values
from fluxmesh.adapters.changes import Change, Piece
from fluxmesh.adapters.factors import check_complete, magnitude_of, rank_of, shape_of, term_of
from fluxmesh.adapters.keys import ModuleKeys, sort_keys
from fluxmesh.adapters.peft import PeftSettings, settings_of
from fluxmesh.adapters.targets import VECTORS, AdapterTargets, Target
from fluxmesh.errors import AdapterError, WeightsError
from fluxmesh.models.base import Architecture
from fluxmesh.models.tensor_map import Rows
from fluxmesh.storage.safetensors import Entry, Header, read_header

SAME = 1e-6  # of the larger one: two spellings of a linear that differ by less are one

Linear = tuple[str, str]  # component, and the linear's name in it
A = TypeVar("A", bound=Architecture)


@dataclass
class AdapterFile:
    """What a file adapts, by component and linear; `change` reads the numbers."""

    path: Path
    targets: AdapterTargets
    settings: PeftSettings
    modules: dict[Linear, list[tuple[str, ModuleKeys, Target]]] = field(default_factory=dict)
    biases: dict[Linear, list[tuple[Entry, Target]]] = field(default_factory=dict)
    vectors: dict[Linear, Entry] = field(default_factory=dict)  # of norms, by tensor
    replaced: dict[Linear, Entry] = field(default_factory=dict)  # norms that take the model's place
    inputs: dict[Linear, int] = field(default_factory=dict)  # of linears that get more
    notes: tuple[str, ...] = ()  # sentences: what is left out

    @property
    def kinds(self) -> list[str]:
        """The kinds of adapter in the file: "LoRA", "LoKr", …"""
        kinds = {keys.kind for parts in self.modules.values() for _, keys, _ in parts}
        return sorted(kinds | ({"difference"} if self.vectors or self.biases else set()))

    def linears(self, component: str) -> list[str]:
        """The linears of a component that `change` knows, in the file's order."""
        names = {name: None for of, name in self.modules if of == component}
        return list(names | {name: None for of, name in self.biases if of == component})

    def norms(self, component: str) -> dict[str, np.ndarray]:
        """What is added to vectors of a component, float32, by tensor. Raises `AdapterError`."""
        return {
            name: values.floats(entry).reshape(-1)
            for (of, name), entry in self.vectors.items()
            if of == component
        }

    def replacements(self, component: str) -> dict[str, np.ndarray]:
        """Vectors of a component that it has instead of its own, float32, by tensor.

        Raises `AdapterError`.
        """
        return {
            name: values.floats(entry).reshape(-1)
            for (of, name), entry in self.replaced.items()
            if of == component
        }

    def change(self, component: str, name: str) -> Change:
        """What the file does to one linear, read now.

        Raises `AdapterError` where a number is NaN or infinite, or where the file adapts the
        linear twice in two ways.
        """
        out, _ = self.targets.shapes[component][name]
        pieces = [
            Piece(
                _outputs(target.rows),
                term_of(keys, self._scale(module, keys, component)),
                magnitude_of(keys, sum(rows.count for rows in target.rows)),
                module,
            )
            for module, keys, target in self.modules.get((component, name), [])
        ]
        return Change(out, self._apart(out, pieces), self._bias(component, name, out))

    def check_values(self) -> None:
        """Reads every number once; raises what `change` and `norms` raise."""
        for component in self.targets.shapes:
            for name in self.linears(component):
                self.change(component, name)
            self.norms(component)
            self.replacements(component)

    def _scale(self, module: str, keys: ModuleKeys, component: str) -> float:
        rank = rank_of(keys)
        if "alpha" in keys.entries:
            alpha = values.number(keys.entries["alpha"])
            return alpha / rank if rank else 1.0  # LyCORIS's rule for LoKr of two full factors
        return 1.0 if "diff" in keys.entries else self.settings.scale(component, module, rank)

    def _bias(self, component: str, name: str, out: int) -> np.ndarray | None:
        total: np.ndarray | None = None
        for entry, target in self.biases.get((component, name), []):
            total = np.zeros(out, np.float32) if total is None else total
            total[_outputs(target.rows)] += values.floats(entry).reshape(-1)
        for module, keys, target in self.modules.get((component, name), []):
            if "bias" in keys.entries:
                total = np.zeros(out, np.float32) if total is None else total
                scale = np.float32(self._scale(module, keys, component))
                bias = values.floats(keys.entries["bias"]).reshape(-1)
                total[_outputs(target.rows)] += scale * bias
        return total

    def _apart(self, out: int, pieces: list[Piece]) -> tuple[Piece, ...]:
        """The pieces without those that say again what another one says.

        Some tools write a linear under two spellings. Raises `AdapterError` where the two differ.
        """
        kept: list[Piece] = []
        for piece in sorted(pieces, key=lambda piece: -len(piece.rows)):
            again = next((k for k in kept if np.isin(piece.rows, k.rows).any()), None)
            if again is None:
                kept.append(piece)
            elif not _is_same(out, again, piece):
                raise AdapterError(
                    f"{self.path} adapts one linear twice, as {again.source} and as "
                    f"{piece.source}, and not in the same way; remove one of the two."
                )
        return tuple(piece for piece in pieces if any(piece is k for k in kept))


def open_adapter(path: Path, targets: AdapterTargets) -> AdapterFile:
    """Reads a file's header, and says what of a model with these targets it adapts.

    What belongs to a text encoder and can't be applied is left out with a note. Raises
    `AdapterError` that says what the file is, where it is none of the model's; that names the keys
    that match nothing; or what is damaged.
    """
    try:
        header = read_header(path)
    except WeightsError as error:
        raise AdapterError(str(error)) from error
    return _Opening(path, targets, header).result()


class _Opening:
    """One file on its way to an `AdapterFile`."""

    def __init__(self, path: Path, targets: AdapterTargets, header: Header) -> None:
        self.path, self.targets, self.header = path, targets, header
        self.file = AdapterFile(path, targets, settings_of(path, header))
        self.unknown: list[str] = []  # keys that match nothing
        self.left_out: dict[str, list[str]] = {}  # a reason -> keys

    def result(self) -> AdapterFile:
        """Raises as `open_adapter`."""
        if not self.header.entries:
            raise AdapterError(f"{self.path} holds no LoRA weights; name an adapter.")
        refusals.refuse_control(self.path, self.header.entries, self.targets)
        keys = sort_keys(dict(self.header.entries))
        for module, part in keys.modules.items():
            self._place(module, part)
        for key in keys.others:
            if not (keys.modules and self._place_norm(key)):
                self.unknown.append(key)
        if self.unknown:
            raise refusals.unmatched(self.path, self.header.entries, self.targets, self.unknown)
        if keys.embeddings:
            names = ", ".join(keys.embeddings[:5])
            bundled = [key for key in self.header.entries if key.startswith("bundle_emb.")]
            reason = f"the bundled embeddings {names} are textual inversions"
            self.left_out[f"{reason}, which fluxmesh does not read"] = bundled
        if not (self.file.modules or self.file.biases or self.file.vectors):
            raise refusals.nothing(self.path, self.header.entries, self.targets, self.left_out)
        self.file.notes = tuple(
            f"{len(keys)} key{'' if len(keys) == 1 else 's'} of {self.path} left out "
            f"({refusals.some(keys)}): {reason}."
            for reason, keys in self.left_out.items()
        )
        return self.file

    def _place(self, module: str, part: ModuleKeys) -> None:
        for role, leaf in (("diff_b", "bias"), ("diff", "weight")):
            entry = part.entries.get(role)
            if entry is not None and (
                values.is_zero(entry) or self._place_vector(module, entry, leaf)
            ):
                del part.entries[role]
        if part.entries.keys() <= {"alpha"}:
            return
        target = self.targets.match(module)
        if target is None:
            self._without_target(module, part)
            return
        keys = [entry.key for entry in part.entries.values()]
        if target.is_absent:
            reason = f"this model has no {module}, which others of its family have"
            self.left_out.setdefault(reason, []).extend(keys)
            return
        check_complete(self.path, module, part)
        out, into = self.targets.shapes[target.component][target.name]
        expected = (sum(rows.count for rows in target.rows), into)
        shape = shape_of(self.path, module, part, expected)
        linear = (target.component, target.name)
        wider = self.targets.wider[target.component].get(target.name)
        if wider is not None and shape == (out, wider) and expected[0] == out:
            self.file.inputs[linear] = wider
        elif shape != expected:
            raise self._wrong_size(module, shape, expected)
        self.file.modules.setdefault(linear, []).append((module, part, target))

    def _place_norm(self, key: str) -> bool:
        """Takes a norm's factors that stand in the file whole; False for any other tensor.

        Source: diffusers, `_control_lora_supported_norm_keys`.
        """
        module, _, leaf = key.rpartition(".")
        target = self.targets.match_vector(module, "weight") if leaf in VECTORS else None
        if target is None or len(target.rows) != 1:
            return False
        entry = self.header.entries[key]
        if entry.shape != (target.rows[0].count,):
            raise self._wrong_size(
                module, (int(np.prod(entry.shape)), 1), (target.rows[0].count, 1)
            )
        self.file.replaced[target.component, target.name] = entry
        return True

    def _place_vector(self, module: str, entry: Entry, leaf: str) -> bool:
        """Takes a difference of a bias or of a norm; False where `module` has no such vector."""
        target = self.targets.match_vector(module, leaf)
        if target is None:
            return False
        size = sum(rows.count for rows in target.rows)
        if int(np.prod(entry.shape)) != size:
            raise self._wrong_size(module, (int(np.prod(entry.shape)), 1), (size, 1))
        linear = target.name.rpartition(".")[0]
        if linear in self.targets.shapes[target.component]:
            self.file.biases.setdefault((target.component, linear), []).append((entry, target))
        else:
            self.file.vectors[target.component, target.name] = entry
        return True

    def _without_target(self, module: str, part: ModuleKeys) -> None:
        keys = [entry.key for entry in part.entries.values()]
        if self.targets.prefixed(module) is None:
            self.unknown += keys
            return
        reason = "no text encoder of this model has these modules"
        self.left_out.setdefault(reason, []).extend(keys)

    def _wrong_size(
        self, module: str, shape: tuple[int, int], expected: tuple[int, int]
    ) -> AdapterError:
        sizes = (module, shape, expected)
        return refusals.wrong_size(self.path, self.header.entries, self.targets, *sizes)


def adapted(architecture: A, files: Iterable[AdapterFile]) -> A:
    """What a model is with adapters on it: one that gets more inputs takes other conditions."""
    for file in files:
        if file.inputs:
            inputs = {name: width for (_, name), width in file.inputs.items()}
            return architecture.with_inputs(inputs, file.path.name)
    return architecture


def _outputs(rows: tuple[Rows, ...]) -> np.ndarray:
    """Rows of a tensor, in the order of the file's, int64."""
    return np.concatenate([np.arange(piece.start, piece.stop) for piece in rows])


def _is_same(out: int, one: Piece, other: Piece) -> bool:
    """Whether the smaller of two pieces says no other than the larger one does."""
    if not np.isin(other.rows, one.rows).all():
        return False
    magnitudes = [None if p.magnitude is None else p.magnitude.lengths for p in (one, other)]
    if (magnitudes[0] is None) != (magnitudes[1] is None):
        return False
    if magnitudes[0] is not None and not np.array_equal(*magnitudes):  # type: ignore[arg-type]
        return False
    whole, again = one.product(out)[other.rows], other.term.product()
    return bool(np.abs(whole - again).max() <= SAME * max(np.abs(whole).max(), 1e-12))

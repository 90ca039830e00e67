"""What an adapter may change in a model, and every name that a file may give it. Imports no mlx.

A family says which tensors its components hold, how tools other than ours call a module, and which
prefixes stand before (`ComponentNames`; `models/flux1/adapter_names.py` is FLUX.1's). From these
come tables by name: a file's module is looked up, never reasoned about.

The table's own names are those of the model (BFL's) and of a diffusers file; `models/tensor_map.py`
says which rows of the one are the other.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from fluxmesh.models.base import Architecture
from fluxmesh.models.registry import family_of
from fluxmesh.models.tensor_map import ComponentNames, Rows, Spelling, to_diffusers

VECTORS = ("weight", "scale")  # how a norm's factors are called


@dataclass(frozen=True)
class Target:
    """What a name in a file stands for."""

    component: str
    rows: tuple[Rows, ...]  # of one tensor of the component, in the order of the file's
    is_absent: bool = False  # a module that this model lacks and others of its family have

    @property
    def name(self) -> str:
        """The tensor, without `.weight` where it is a linear's."""
        return self.rows[0].key if self.rows else ""


class AdapterTargets:
    """Every linear and vector of a model that an adapter may change, by any name."""

    def __init__(self, components: tuple[ComponentNames, ...], family: str = "") -> None:
        """`family` is what the model's is called."""
        self.components, self.family = components, family
        self.shapes: dict[str, dict[str, tuple[int, int]]] = {}  # [out, in] of each linear
        self.vectors: dict[str, dict[str, int]] = {}  # numbers of each vector, by tensor
        # Linears that an adapter may give more inputs: how many they have then.
        self.wider = {names.component: names.wider for names in components}
        self._names: dict[str, dict[str, Target]] = {}
        self._vector_names: dict[str, dict[str, Target]] = {}
        for names in components:
            self._add(names)
        pairs = [(p, names.component) for names in components for p in names.prefixes]
        self._prefixes = sorted(pairs, key=lambda pair: -len(pair[0]))

    def match(self, module: str) -> Target | None:
        """The linear that a file's `module` is, or the rows of one; None for none of ours."""
        return self._look_up(self._names, module)

    def match_vector(self, module: str, leaf: str) -> Target | None:
        """The same for a bias (`leaf` "bias") or a norm's factors ("weight")."""
        return self._look_up(self._vector_names, f"{module}.{leaf}")

    def prefixed(self, module: str) -> str | None:
        """The component that a name's prefix names, other than the first; None: it names none."""
        return self._split(module)[0]

    def _look_up(self, tables: dict[str, dict[str, Target]], name: str) -> Target | None:
        named, rest = self._split(name)
        for component in [named] if named else [names.component for names in self.components]:
            target = tables[component].get(rest)
            if target is not None:
                return target
        return None

    def _split(self, name: str) -> tuple[str | None, str]:
        """(the component that prefixes name, the name without them).

        Prefixes stand one before the other. The first that is not the transformer's says whose the
        module is: `lora_te2_text_model_` is no CLIP-L's.
        """
        rest, named = name, None
        while True:
            prefix = next(((p, c) for p, c in self._prefixes if rest.startswith(p)), None)
            if prefix is None:
                return named, rest
            rest = rest.removeprefix(prefix[0])
            if prefix[1] != self.components[0].component:
                named = named or prefix[1]

    def _add(self, names: ComponentNames) -> None:
        linears: dict[str, tuple[int, int]] = {}
        vectors: dict[str, int] = {}
        table: dict[str, tuple[Rows, ...]] = {}
        vector_table: dict[str, tuple[Rows, ...]] = {}
        for tensor, target in names.tensors.items():
            module, _, leaf = tensor.rpartition(".")
            if leaf == "weight" and len(target.shape) == 2:
                linears[module] = (target.shape[0], target.shape[1])
                table[module] = (Rows(module, 0, target.shape[0]),)
            elif len(target.shape) == 1:
                vectors[tensor] = target.shape[0]
                whole = (Rows(tensor, 0, target.shape[0]),)
                vector_table[_as_weight(tensor)] = whole
        for key, pieces in to_diffusers(names.tensors).items():
            module, _, leaf = key.rpartition(".")
            own = [piece.key.rpartition(".")[0] for piece in pieces]
            if leaf == "weight" and all(name in linears for name in own):
                table[module] = tuple(
                    Rows(name, piece.start, piece.stop)
                    for name, piece in zip(own, pieces, strict=True)
                )
            elif all(piece.key in vectors for piece in pieces):
                vector_table[_as_weight(key)] = pieces
        component, absent = names.component, dict.fromkeys(names.absent, ())
        self.shapes[component], self.vectors[component] = linears, vectors
        self._names[component] = {
            spelled: Target(component, rows, is_absent=not rows)
            for name, rows in (table | dict(names.extra) | absent).items()
            for spelled in _spelled(name, names.spellings)
        }
        self._vector_names[component] = {
            f"{spelled}.{name.rpartition('.')[2]}": Target(component, rows)
            for name, rows in vector_table.items()
            for spelled in _spelled(name.rpartition(".")[0], names.spellings)
        }


@functools.lru_cache(maxsize=8)
def targets_of(architecture: Architecture) -> AdapterTargets:
    """What adapters of a checkpoint may change, by every name."""
    return AdapterTargets(architecture.adapter_names, family_of(architecture).name)


def _as_weight(tensor: str) -> str:
    """A vector's name, a norm's factors being called `weight`."""
    module, _, leaf = tensor.rpartition(".")
    return f"{module}.{'weight' if leaf in VECTORS else leaf}"


def _spelled(name: str, spellings: tuple[Spelling, ...]) -> list[str]:
    """All ways to write a name: each spelling or not, in dots or in underscores."""
    ways = [name]
    for ours, theirs in spellings:
        ways += [way.replace(ours, theirs) for way in ways if ours in way]
    return [*ways, *(way.replace(".", "_") for way in ways)]

"""Which files of a folder make a model, by names alone: of a folder here, or a listing of the Hub.

Below `checkpoint.py` and `download.py`, so that both know what a model needs before a byte of it is
read or fetched. Weights come whole or in shards with an index, plainly named or as a variant
(`model.fp16.safetensors`), as diffusers and transformers of all years have spelled it, or numbered
(`0.safetensors`) as mflux saves them. Imports no mlx.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from fluxmesh.models.files.family import FolderFormat
from fluxmesh.storage import placeholders

INDEX = "model_index.json"
MANIFEST = "fluxmesh.json"
SCHEDULER = "scheduler/scheduler_config.json"

STEMS = ("diffusion_pytorch_model", "model")
VARIANTS = ("bf16", "fp16", "fp32")  # the preferred first, where no plain name stands
_STEM = r"(?P<stem>diffusion_pytorch_model|model)"
_WEIGHTS = re.compile(
    _STEM + r"(\.(?P<variant>\w+))?(-(?P<number>\d{5})-of-(?P<count>\d{5})(\.(?P<late>\w+))?)?"
    r"\.(safetensors|sft)"
)
_INDEX = re.compile(_STEM + r"(\.(?P<variant>\w+))?\.safetensors\.index(\.(?P<late>\w+))?\.json")
_NUMBERED = re.compile(r"(\d+)\.safetensors")
_OTHER_FORMATS = re.compile(r".+\.(bin|pt|pth|ckpt|pkl|msgpack|h5|onnx|gguf)")


@dataclass(frozen=True)
class WeightNames:
    """The files of one component by name, and the index that lists them, where one does."""

    files: tuple[str, ...]
    index: str | None = None
    missing: tuple[str, ...] = ()  # shards that should be there


@dataclass(frozen=True)
class FolderFiles:
    """What a folder has of a model."""

    small: tuple[str, ...]  # configs, tokenizers, indices
    weights: Mapping[str, tuple[str, ...]]  # of each component
    missing: tuple[str, ...]  # what should be there and is not, in words
    is_mflux: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """All, small ones first: a wrong model is found out before 30 GB of it are here."""
        return (*self.small, *(name for names in self.weights.values() for name in names))


def files_of(names: Collection[str], form: FolderFormat) -> FolderFiles:
    """What of a folder's files, by names relative to it, makes a model of a family."""
    present = set(names)
    is_mflux = INDEX not in present and "transformer/0.safetensors" in present
    small = [name for name in (INDEX, MANIFEST, SCHEDULER) if name in present]
    missing = [] if is_mflux else [name for name in (INDEX, SCHEDULER) if name not in present]
    weights = {}
    for part in form.components:
        inside = inside_of(part, present)
        chosen = weight_names(inside)
        if chosen is None:
            missing.append(f"the weights in {part}/{_instead(inside)}")
            chosen = WeightNames(())
        missing += [f"{part}/{name}" for name in chosen.missing]
        weights[part] = tuple(f"{part}/{name}" for name in chosen.files)
        small += [f"{part}/{chosen.index}"] if chosen.index else []
        if "config.json" in inside:
            small.append(f"{part}/config.json")
        elif not is_mflux:
            missing.append(f"{part}/config.json")
    for folder, tokenizer in form.tokenizers.items():
        inside = inside_of(folder, present)
        vocabulary = vocabulary_in(inside, tokenizer.choices)
        if vocabulary is None:
            first, *others = (" and ".join(choice) for choice in tokenizer.choices)
            missing.append(f"{folder}/{first} (or {', '.join(others)})")
        config = {"tokenizer_config.json"} & inside
        small += [f"{folder}/{name}" for name in (*(vocabulary or ()), *config)]
    return FolderFiles(tuple(small), weights, tuple(missing), is_mflux)


def inside_of(folder: str, names: Iterable[str]) -> set[str]:
    """Names of the files right inside of a folder."""
    start = f"{folder}/"
    inside = (name.removeprefix(start) for name in names if name.startswith(start))
    # `._NAME` is what macOS lays beside NAME on some disks
    return {name for name in inside if "/" not in name and not name.startswith("._")}


def vocabulary_in(
    names: Collection[str], choices: Iterable[tuple[str, ...]]
) -> tuple[str, ...] | None:
    """The first choice of a vocabulary's files that is there whole."""
    return next((choice for choice in choices if all(name in names for name in choice)), None)


def weight_names(names: Collection[str]) -> WeightNames | None:
    """A component's weights among the names of its folder, or None.

    A plain name goes before a variant, an index before a whole file, and either before shards that
    no index lists.
    """
    indices: dict[tuple[str, str], str] = {}
    whole: dict[tuple[str, str], str] = {}
    shards: dict[tuple[str, str], dict[str, str]] = {}
    counts: dict[tuple[str, str], int] = {}
    numbered = []
    for name in sorted(names):
        if match := _INDEX.fullmatch(name):
            indices[match["stem"], match["variant"] or match["late"] or ""] = name
        elif match := _WEIGHTS.fullmatch(name):
            key = (match["stem"], match["variant"] or match["late"] or "")
            if match["number"] is None:
                whole.setdefault(key, name)
            else:
                shards.setdefault(key, {})[match["number"]] = name
                counts[key] = int(match["count"])
        elif match := _NUMBERED.fullmatch(name):
            numbered.append((int(match[1]), name))
    for key in sorted({*indices, *whole, *shards}, key=_preference):
        listed = tuple(shards.get(key, {}).values()) or _otherwise_numbered(key[0], names)
        if key in indices and numbered:
            return WeightNames(tuple(name for _, name in sorted(numbered)), indices[key])
        if key in indices and (listed or key not in whole):
            count = counts.get(key, 0)
            absent = tuple(
                re.sub(r"-\d{5}-of-", f"-{number:05}-of-", listed[0])
                for number in range(1, count + 1)
                if f"{number:05}" not in shards[key]
            )
            return WeightNames(listed, indices[key], absent)
        if key in whole:
            return WeightNames((whole[key],))
        if key in counts and len(listed) == counts[key]:
            return WeightNames(listed)
    if numbered:
        return WeightNames(tuple(name for _, name in sorted(numbered)))
    return None


def _otherwise_numbered(stem: str, names: Iterable[str]) -> tuple[str, ...]:
    """Shards under an index whose names don't say how many there are, as fluxmesh writes them."""
    return tuple(sorted(name for name in names if re.fullmatch(stem + r"-\w+\.safetensors", name)))


def _preference(key: tuple[str, str]) -> tuple[int, int, str]:
    stem, variant = key
    order = ("", *VARIANTS)
    rank = order.index(variant) if variant in order else len(order)
    return (rank, STEMS.index(stem), variant)


def _instead(inside: Iterable[str]) -> str:
    """What a folder holds in place of weights that are read, for the end of a sentence."""
    other = sorted(name for name in inside if _OTHER_FORMATS.fullmatch(name))
    if not other:
        waiting = placeholders.among(inside)
        return f" (it has {waiting})" if waiting else ""
    kind = "a pickle, which can run any program as it is read" if _is_pickle(other[0]) else ""
    return f" as .safetensors (it has {other[0]}{kind and f', {kind}'})"


def _is_pickle(name: str) -> bool:
    return name.endswith((".bin", ".pt", ".pth", ".ckpt", ".pkl"))

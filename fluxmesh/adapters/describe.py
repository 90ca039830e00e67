"""What an adapter's file is, as people ask for it: format, rank, what it adapts, trigger words.

Beside `convert.py`; for `fluxmesh adapters show` and `list`. Headers are read and no factors, so
that a folder of large files is listed at once. Imports no mlx.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fluxmesh.adapters.keys import SortedKeys, other_kind, sort_keys
from fluxmesh.adapters.reading import open_adapter
from fluxmesh.adapters.targets import targets_of
from fluxmesh.errors import AdapterError, WeightsError
from fluxmesh.models.base import Architecture
from fluxmesh.storage import apple_double
from fluxmesh.storage.safetensors import Header, read_header
from fluxmesh.weights.cache import cached_snapshot, hub_cache, repo_of

MAX_TEXT = 300  # characters of a text in the metadata that are shown
TAGS = 12  # of the most frequent ones

# Whose spelling it is: the first that any key begins or ends with.
TOOLS: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), name)
    for pattern, name in (
        (r".*\.processor\.(?:qkv|proj)_lora\d?\..*", "x-flux (XLabs)"),
        (r"lycoris_.*", "LyCORIS (SimpleTuner)"),
        (r"lora_transformer_.*", "OneTrainer"),
        (r"lora_unet_.*", "kohya"),
        (r"(?:transformer|clip_l|t5)\.(?:double_blocks|single_blocks|text_model|encoder).*", "OMI"),
        (r"(?:base_model\.model|model)\..*", "PEFT"),
        (r"diffusion_model\..*", "ComfyUI or ai-toolkit"),
        (r".*\.lora_a", "Apple's MLX example"),
        (r".*\.lora_A", "mflux"),
        (r".*\.lora(?:_linear)?(?:_layer)?\.down\.weight|.*_lora\.down\.weight",
         "diffusers of before PEFT"),
        (r".*\.lora_A\..*", "diffusers"),
        (r"(?:double|single)_blocks\..*", "BFL"),
        (r"lora_te.*", "kohya"),
    )
)  # fmt: skip
# Metadata that say how a prompt calls up what was trained.
TRIGGERS = (
    *("modelspec.trigger_phrase", "trigger_phrase", "trigger_word", "trigger_words"),
    *("instance_prompt", "activation text", "activation_text", "ss_trigger_words"),
)
ABOUT = {  # metadata -> what it is
    "modelspec.title": "title",
    "modelspec.author": "author",
    "modelspec.description": "description",
    "modelspec.architecture": "architecture",
    "modelspec.license": "licence",
    "modelspec.date": "date",
    "modelspec.tags": "tags",
    "ss_base_model_version": "base model",
    "ss_output_name": "name",
    "ss_training_comment": "comment",
    "name": "name",
}


@dataclass(frozen=True)
class Description:
    """All that is told of one file."""

    path: Path
    nbytes: int
    tool: str  # whose spelling it is
    kinds: tuple[str, ...]  # "LoRA", "LoKr", …
    ranks: tuple[int, ...]
    dtypes: tuple[str, ...]  # as safetensors calls them
    adapts: Mapping[str, int]  # linears of each component
    triggers: tuple[str, ...]
    tags: tuple[tuple[str, int], ...]  # the most frequent captions' tags, and how often
    about: Mapping[str, str]
    notes: tuple[str, ...]  # what is left out when it is applied
    family: str = ""  # of the model that it fits
    problem: str = ""  # why it fits none of the models

    def as_json(self) -> dict[str, Any]:
        """For a program."""
        return {
            "file": str(self.path),
            "bytes": self.nbytes,
            "format": self.tool,
            "kinds": self.kinds,
            "ranks": self.ranks,
            "dtypes": self.dtypes,
            "adapts": dict(self.adapts),
            "family": self.family,
            "triggers": self.triggers,
            "tags": [{"tag": tag, "count": count} for tag, count in self.tags],
            "about": dict(self.about),
            "notes": self.notes,
            "problem": self.problem,
        }


def describe(path: Path, models: Sequence[Architecture]) -> Description:
    """What a file is; of the first model that it fits. Raises `AdapterError` for a damaged one."""
    try:
        header = read_header(path)
    except WeightsError as error:
        raise AdapterError(str(error)) from error
    keys = sort_keys(dict(header.entries))
    adapts: dict[str, int] = {}
    family = ""
    notes: tuple[str, ...] = ()
    problems = []
    for each in models:
        try:
            file = open_adapter(path, targets_of(each))
        except AdapterError as error:
            problems.append(str(error))
            continue
        counts = {component: len(file.linears(component)) for component in file.targets.shapes}
        adapts = {component: count for component, count in counts.items() if count}
        notes, problems, family = file.notes, [], file.targets.family
        break
    metadata = {key: value for key, value in header.metadata.items() if isinstance(value, str)}
    return Description(
        path=path,
        nbytes=path.stat().st_size,
        tool=_tool(header),
        kinds=_kinds(keys),
        ranks=_ranks(keys),
        dtypes=tuple(sorted({entry.dtype for entry in header.entries.values()})),
        adapts=adapts,
        triggers=_triggers(metadata),
        tags=_tags(metadata),
        about={name: shown(metadata[key]) for key, name in ABOUT.items() if metadata.get(key)},
        notes=notes,
        family=family,
        problem=problems[0] if problems else "",
    )


def adapter_files(folder: Path) -> Iterator[Path]:
    """Files that hold adapters: of a folder and those in it, then of the Hub's cache."""
    here = [*folder.glob("*.safetensors"), *folder.glob("*/*.safetensors")]
    cached = [
        path
        for cache in sorted(hub_cache().glob("models--*--*"))
        for snapshot in [cached_snapshot(repo_of(cache))]
        if snapshot is not None
        for path in sorted(snapshot.glob("*.safetensors"))
    ]
    for path in [*sorted(apple_double.without(here)), *cached]:
        if is_adapter(path):
            yield path


def name_of(path: Path, folder: Path) -> str:
    """What `--adapter` takes for a file: a path below `folder`, or a Hub id."""
    cache = hub_cache()
    if path.is_relative_to(cache):
        repository, _, _, *inside = path.relative_to(cache).parts
        return f"{repo_of(Path(repository))}:{'/'.join(inside)}"
    return str(path.relative_to(folder) if path.is_relative_to(folder) else path)


def is_adapter(path: Path) -> bool:
    """Whether a file's header is one of an adapter."""
    try:
        header = read_header(path)
    except WeightsError:
        return False
    keys = sort_keys(dict(header.entries))
    return bool(keys.modules) and len(keys.others) < len(header.entries) / 2


def shown(text: str) -> str:
    """A text of a file that anybody may have written, fit for a terminal."""
    clean = "".join(sign if sign.isprintable() else " " for sign in text[: 4 * MAX_TEXT])
    clean = " ".join(clean.split())
    return clean if len(clean) <= MAX_TEXT else f"{clean[:MAX_TEXT]}…"


def _tool(header: Header) -> str:
    for pattern, name in TOOLS:
        if any(pattern.fullmatch(key) for key in header.entries):
            return name
    return "unknown"


def _kinds(keys: SortedKeys) -> tuple[str, ...]:
    kinds = {part.kind for part in keys.modules.values() if part.entries.keys() - {"alpha"}}
    other = other_kind(keys.others)
    if other is not None:
        kinds.add(other.removeprefix("an ").removeprefix("a "))
    if keys.embeddings:
        kinds.add("embeddings")
    return tuple(sorted(kinds))


def _ranks(keys: SortedKeys) -> tuple[int, ...]:
    ranks = set()
    for part in keys.modules.values():
        for role, entry in part.entries.items():
            if role in ("a", "hada_w1_b", "lokr_w2_b", "lokr_w1_b") and len(entry.shape) >= 2:
                # mflux' may lie the other way round: a rank is the smaller side.
                ranks.add(min(entry.shape[:2]) if role == "a" else entry.shape[0])
            elif role == "a_transposed" and len(entry.shape) == 2:
                ranks.add(entry.shape[1])
    return tuple(sorted(ranks))


def _triggers(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """What to write into a prompt, each once: as the trainer says, or as its folders are called."""
    words = [metadata[key] for key in TRIGGERS if metadata.get(key)]
    for name in _object(metadata.get("ss_dataset_dirs")):
        words.append(re.sub(r"^\d+_", "", name))  # kohya's `10_sks dog`
    return tuple(dict.fromkeys(shown(word) for word in words if word.strip()))


def _tags(metadata: Mapping[str, str]) -> tuple[tuple[str, int], ...]:
    """kohya's count of what the captions say, folder by folder, added up."""
    counts: dict[str, int] = {}
    for tags in _object(metadata.get("ss_tag_frequency")).values():
        for tag, count in tags.items() if isinstance(tags, dict) else ():
            if isinstance(count, int):
                counts[tag.strip()] = counts.get(tag.strip(), 0) + count
    most = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))[:TAGS]
    return tuple((shown(tag), count) for tag, count in most)


def _object(text: str | None) -> dict[str, Any]:
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}

"""Patchwork as a family: its row of the registry is `PATCHWORK`. Pure, no mlx."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fluxmesh.models.base import Architecture
from fluxmesh.models.files.family import (
    APACHE,
    Family,
    FolderDescription,
    FolderFormat,
    PublishedModel,
    SingleFiles,
    TokenizerFolder,
)
from fluxmesh.models.files.kinds import FileContents, FileKind
from fluxmesh.request import PromptCut
from tests.third_family.architecture import (
    LetterSizes,
    NoShift,
    PainterSizes,
    PatchSizes,
    PatchworkArchitecture,
)

PIPELINE = "PatchworkPipeline"
CONFIGS = {"painter": "transformer", "letters": "letters", "patches": "autoencoder"}  # fields


@dataclasses.dataclass(frozen=True)
class Letters:
    """A prompt as its bytes."""

    max_length: int

    def ids(self, prompt: str) -> list[int]:
        """Padded with zeros."""
        read = list(prompt.encode()[: self.max_length])
        return read + [0] * (self.max_length - len(read))

    def cut(self, prompt: str, /) -> PromptCut | None:
        count, most = len(prompt.encode()), self.max_length
        return PromptCut(count, most, most) if count > most else None


class PatchworkFolder(FolderFormat):
    """Patchwork's, which has no vocabulary."""

    components = tuple(CONFIGS)
    tokenizers: Mapping[str, TokenizerFolder] = {}
    configs: Mapping[str, Any] = {
        "painter": PainterSizes.from_dict,
        "letters": LetterSizes.from_dict,
        "patches": PatchSizes.from_dict,
    }
    schedule = NoShift.from_dict

    def is_of(self, pipeline: str) -> bool:
        return pipeline == PIPELINE

    def architecture(self, description: FolderDescription, where: Path) -> PatchworkArchitecture:
        parts = {field: description.configs[part] for part, field in CONFIGS.items()}
        return PatchworkArchitecture(**parts, schedule=description.schedule)

    def reader(self, architecture: Architecture, tokenizers: Mapping[str, Path]) -> Letters:
        return Letters(architecture.text_length)

    def spellings(self, key: str) -> tuple[str, ...]:
        return (key,)

    def class_of(self, architecture: Architecture, folder: str) -> Mapping[str, Any]:
        return {"_class_name": folder}

    def index(self, architecture: Architecture) -> Mapping[str, Any]:
        return {"_class_name": PIPELINE}

    def config(self, architecture: Architecture, folder: str) -> dict[str, Any]:
        return dataclasses.asdict(getattr(architecture, CONFIGS[folder]))


class NoSingleFiles(SingleFiles):
    """Nobody has it as one."""

    name = "patchwork"
    kinds: tuple[FileKind, ...] = ()
    configs: Mapping[str, Any] = {}
    shapes_hide: Mapping[str, tuple[str, ...]] = {}
    usual: Mapping[str, str] = {}
    megabytes: Mapping[str, int] = {}
    nouns: Sequence[tuple[str, Mapping[str, str]]] = ()

    def fits(self, part: str, config: Any, transformer: Any) -> bool:
        return False

    def speaks(self, folder: Path, tokenizer: str, config: Any) -> bool:
        return False

    def schedule(self, transformer: Any) -> NoShift:
        return NoShift()

    def index(self, file: Path) -> Mapping[str, Any]:
        return {}

    def sources(
        self, parts: Sequence[str], transformer: FileContents, prefix: str
    ) -> list[tuple[str, tuple[str, ...]]]:
        return []


PATCHWORK = Family(
    name="Patchwork",
    parts=(PatchworkArchitecture, PainterSizes, LetterSizes, PatchSizes, NoShift),
    runtime="tests.third_family.runtime:PatchworkRuntime",
    published={
        "patchwork": PublishedModel(
            "somebody/Patchwork-1", PatchworkArchitecture(), licence=APACHE, gigabytes=0.1
        )
    },
    folder=PatchworkFolder(),
    files=NoSingleFiles(),
)

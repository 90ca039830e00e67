"""What is known of a family before any of its checkpoints is looked at. Pure, no mlx.

A family has aliases, a form of folder (diffusers', with the family's own parts) and single files.
`weights/` reads, completes and writes them with what stands here, and knows no family. Above
`base.py`, which has one checkpoint in numbers; `registry.py` lists the families.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from fluxmesh.models.base import Architecture
from fluxmesh.models.files.kinds import FileContents, FileKind
from fluxmesh.models.files.shapes import FileShapes
from fluxmesh.models.tensor_map import Tensors
from fluxmesh.request import PromptCut

Choices = tuple[tuple[str, ...], ...]
"""Files that hold a whole vocabulary, by names: any of the choices will do, the first is best."""


@dataclass(frozen=True)
class TokenizerFolder:
    """A folder with a vocabulary."""

    component: str  # the text encoder that reads its tokens
    encoder: str  # the folder of that
    choices: Choices
    beside: tuple[str, ...] = ()  # files that fluxmesh needs not, and diffusers does


@dataclass(frozen=True)
class FolderDescription:
    """What a checkpoint's small files say; each config by its folder."""

    configs: Mapping[str, Any]
    schedule: Any
    index: Mapping[str, Any]  # model_index.json, or what stands for it
    tokenizers: Mapping[str, Path]  # by text encoder


class PromptReader(Protocol):
    """A vocabulary, asked what of a prompt its text encoder leaves out."""

    @property
    def max_length(self) -> int: ...  # tokens

    def cut(self, prompt: str, /) -> PromptCut | None: ...


class FolderFormat(ABC):
    """A diffusers folder of a family: what it holds, what that means, how it is written again."""

    components: tuple[str, ...]  # folders with weights
    tokenizers: Mapping[str, TokenizerFolder]  # by folder
    configs: Mapping[str, Callable[[Mapping[str, Any]], Any]]  # readers of config.json, by folder
    schedule: Callable[[Mapping[str, Any]], Any]  # reads scheduler_config.json

    @abstractmethod
    def is_of(self, pipeline: str) -> bool:
        """Whether a folder is of this family, by the class that its model_index.json names."""

    @abstractmethod
    def architecture(self, description: FolderDescription, where: Path) -> Architecture:
        """The checkpoint in numbers. Raises `WeightsError`, naming it `where`, for one whose parts
        don't go together, or that paints in a way that fluxmesh doesn't."""

    @abstractmethod
    def reader(self, architecture: Architecture, tokenizers: Mapping[str, Path]) -> PromptReader:
        """What says how much of a prompt is read; `tokenizers` as of `FolderDescription`.

        Raises `ModelNotFoundError`, `WeightsError` for a vocabulary that can't be read.
        """

    @abstractmethod
    def spellings(self, key: str) -> tuple[str, ...]:
        """Names under which a tensor may stand in a file, the usual one first."""

    def saved_name(self, architecture: Architecture, key: str) -> str:
        """The name that diffusers and transformers save a tensor under."""
        return self.spellings(key)[0]

    @abstractmethod
    def class_of(self, architecture: Architecture, folder: str) -> Mapping[str, Any]:
        """What a component's config.json also says, for diffusers and transformers: its class."""

    @abstractmethod
    def index(self, architecture: Architecture) -> Mapping[str, Any]:
        """The model_index.json of a folder that is written."""

    @abstractmethod
    def config(self, architecture: Architecture, folder: str) -> dict[str, Any]:
        """A component's config.json, as `configs` reads it back."""


@dataclass(frozen=True)
class MfluxFolder:
    """How mflux saves a model of the family: no configs, other names, channels last."""

    part: str  # what `FileKind.what` says of one of its files
    # By folder: what its files hold, what is before the names, and how sizes are read from shapes.
    configs: Mapping[str, tuple[str, str, Callable[[FileShapes], Any]]]
    renamed: Callable[[str, Tensors], Tensors]  # of a folder, with mflux's names of the pieces
    left_out: frozenset[str]  # tensors that are not saved, and zero


class SingleFiles(ABC):
    """Files of a family that stand alone: told by their headers, completed by what lies near."""

    name: str  # as the kinds of files have it
    kinds: tuple[FileKind, ...]
    configs: Mapping[str, Callable[[Path, str], Any]]  # sizes by shapes, by folder of the component
    shapes_hide: Mapping[str, tuple[str, ...]]  # the fields of each that no shape tells
    usual: Mapping[str, str]  # how the names of the usual files begin, where several would fit
    megabytes: Mapping[str, int]  # of each part, about, to be fetched; of others 3 or less
    # Parts by what they are, in words: (noun, the parts that are one, each by its name).
    nouns: Sequence[tuple[str, Mapping[str, str]]]

    @abstractmethod
    def fits(self, part: str, config: Any, transformer: Any) -> bool:
        """Whether a component gives what the transformer takes."""

    @abstractmethod
    def speaks(self, folder: Path, tokenizer: str, config: Any) -> bool:
        """Whether a folder's vocabulary is that of a text encoder of these sizes.

        Raises `WeightsError` for a broken one.
        """

    @abstractmethod
    def schedule(self, transformer: Any) -> Any:
        """BFL's own, where no folder has another."""

    @abstractmethod
    def index(self, file: Path) -> Mapping[str, Any]:
        """What the name of a transformer's file tells, in place of a model_index.json."""

    @abstractmethod
    def sources(
        self, parts: Sequence[str], transformer: FileContents, prefix: str
    ) -> list[tuple[str, tuple[str, ...]]]:
        """Which repositories of the Hub give parts that the transformer in a file lacks, where
        `prefix` is before the names of its tensors."""

    @property
    def vocabularies(self) -> Mapping[str, str]:
        """Repositories that hold a vocabulary alone, each with the folder it is for."""
        return {}


@dataclass(frozen=True)
class Licence:
    """On what terms a model may be used, as its repository on the Hub says."""

    name: str
    is_commercial: bool  # whether it may be used to earn money


APACHE = Licence("Apache-2.0", is_commercial=True)


@dataclass(frozen=True)
class PublishedModel:
    """A model that has an alias."""

    repo: str  # on the Hub
    architecture: Architecture
    licence: Licence
    gigabytes: float  # of what a download fetches: all layers of its text encoders, read or not
    is_gated: bool = False  # whether the Hub gives it only to who has accepted its licence there
    variable: str = ""  # of the environment: BFL's single file of the transformer, if it is set
    also: tuple[str, ...] = ()  # what else people call it, beside the repository's own name

    @property
    def notice(self) -> str:
        """What is to be known before it is fetched, in sentences: its licence, and its gate."""
        terms = "" if self.licence.is_commercial else ", for non-commercial use alone"
        said = f"{self.repo} is under the licence {self.licence.name}{terms}."
        if not self.is_gated:
            return said
        return (
            f"{said} It is gated: accept the licence at https://huggingface.co/{self.repo}, and "
            "log in with `hf auth login` or set HF_TOKEN."
        )


@dataclass(frozen=True)
class ReaderPart:
    """One of the models with which others of a family read references, and how its file is told."""

    what: str  # for sentences, as "the picture encoder"
    instead: str  # what to get where it is not here, as people name it
    tensors: tuple[str, ...]  # that its file holds, behind the same prefix
    config: Callable[[Mapping[str, Any]], Any]  # reads its config.json
    sizes: Callable[[FileContents, str], Any]  # by shapes, of a file without one
    places: tuple[str, ...]  # ComfyUI's folders in which it lies
    lenders: tuple[str, ...] = ()  # repositories of the Hub that hold it too


@dataclass(frozen=True)
class ReferenceReader:
    """Models with which others of a family read reference pictures, published apart from them."""

    name: str  # for sentences
    alias: str
    pipeline: str  # the class that its model_index.json names
    published: PublishedModel  # its architecture is that of a model that reads with them
    parts: Mapping[str, ReaderPart]  # by folder
    # A model that reads with parts of these sizes, by folder: what a reader is known by.
    architecture: Callable[[Mapping[str, Any]], Architecture]


@dataclass(frozen=True)
class Family:
    """What a family is called, and where its parts are."""

    name: str
    parts: tuple[type, ...]  # the dataclasses of its architecture, that one first
    published: Mapping[str, PublishedModel]  # by alias
    runtime: str  # the module and the class of its `Runtime`, which needs mlx
    folder: FolderFormat
    files: SingleFiles
    # What keys of its adapters match; other models are asked first where those have such keys too.
    adapter_marks: str = ""
    shares_adapter_marks: bool = False
    mflux: MfluxFolder | None = None
    # Where models of its kind that come with fluxmesh lie, below `fluxmesh/tiny`, by name.
    embedded: Mapping[str, str] = field(default_factory=dict)
    reader: ReferenceReader | None = None  # of references, for those that read none by themselves

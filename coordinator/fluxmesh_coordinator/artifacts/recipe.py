"""How a picture was made: written into its PNG, and read back by `fluxmesh generate --from`.

A recipe holds what the pixels depend on, and nothing else (no time, no file name, no host), so
that the same picture made twice is the same file. It is read from files that anybody may have
written: every field is typed and bounded by `GenerateRequest` before it is used.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxmesh.errors import UsageError
from fluxmesh.storage.hashing import sha256_of
from fluxmesh.version import __version__

if TYPE_CHECKING:
    from fluxmesh_coordinator.runtime.resolved import Resolved

KEYWORD = "fluxmesh"  # of the PNG text chunk
# Fields that most pictures lack.
RARE = (
    *("text_bits", "references", "reference_strengths", "redux", "redux_revision"),
    *("control", "control_from", "negative", "cfg"),
)


@dataclass(frozen=True)
class SourceFiles:
    """The files that image-to-image, inpainting and outpainting began from, as they were named."""

    image: str
    strength: float
    image_sha256: str = ""
    mask: str | None = None
    mask_sha256: str | None = None
    outpaint: tuple[int, int, int, int] | None = None  # pixels: left, top, right, bottom
    sized: bool = False  # the user gave a size, so the picture was cut to it

    @classmethod
    def of(
        cls,
        image: str | bytes,
        strength: float,
        mask: str | bytes | None = None,
        outpaint: tuple[int, int, int, int] | None = None,
        *,
        sized: bool = False,
    ) -> SourceFiles:
        """The record of these files, with the hashes of what is in them now.

        What came as bytes has no name: "".
        """
        return cls(
            image=_name_of(image),
            strength=strength,
            image_sha256=sha256_of(image),
            mask=None if mask is None else _name_of(mask),
            mask_sha256=None if mask is None else sha256_of(mask),
            outpaint=outpaint,
            sized=sized,
        )


@dataclass(frozen=True)
class NamedFile:
    """A picture that the prompt speaks of, as it was named, and the hash of what is in it."""

    name: str
    sha256: str

    @classmethod
    def of(cls, file: str | bytes) -> NamedFile:
        """Of a file as it is now; what came as bytes has no name: ""."""
        return cls(_name_of(file), sha256_of(file))


@dataclass(frozen=True)
class ConditionFiles:
    """The files of a request's conditions."""

    references: tuple[NamedFile, ...] = ()
    control: NamedFile | None = None
    control_from: NamedFile | None = None  # a picture whose edges are the map


@dataclass(frozen=True)
class Recipe:
    """Everything that `--from` needs; the field names are those of the options."""

    prompt: str
    model: str
    seed: int
    height: int  # pixels, of one image
    width: int  # pixels
    steps: int
    guidance: float
    revision: str = ""  # of the checkpoint: a Hub commit, or a hash of its files
    dtype: str = "bfloat16"
    bits: int | None = None
    text_bits: int | None = None  # of the text encoders, where they have others
    adapters: tuple[tuple[str, float, str], ...] = ()  # path, scale, sha256
    fuse_adapters: bool = False
    t5_padding: bool = True
    decoding_batch_size: int = 1
    cache: float = 0.0  # above 0 the picture is an approximation
    placement: str = "data"
    source: SourceFiles | None = None
    references: tuple[NamedFile, ...] = ()
    reference_strengths: tuple[float, ...] = ()  # of each; () where all count as they are
    redux: str = ""  # with what they were read, by a model that reads none by itself
    redux_revision: str = ""
    control: NamedFile | None = None
    control_from: NamedFile | None = None
    negative: str | None = None
    cfg: float | None = None
    n_images: int = 1  # more than one: this file is a grid of them
    n_rows: int = 1
    version: str = __version__  # of fluxmesh

    @classmethod
    def of(
        cls,
        resolved: Resolved,
        source: SourceFiles | None = None,
        n_rows: int = 1,
        conditions: ConditionFiles | None = None,
    ) -> Recipe:
        """The recipe of all of a request's images, in the names that the user gave."""
        request, model = resolved.request, resolved.model
        conditions = conditions or ConditionFiles()
        adapters = zip(resolved.adapters, request.adapters, strict=True)
        return cls(
            prompt=request.prompt,
            model=model.name,
            seed=request.seed,
            height=request.height,
            width=request.width,
            steps=request.steps,
            guidance=request.guidance,
            revision=model.revision,
            dtype=request.dtype,
            bits=request.bits,
            text_bits=None if request.text_bits == request.bits else request.text_bits,
            adapters=tuple((named.path, named.scale, hashed.path) for named, hashed in adapters),
            fuse_adapters=request.fuse_adapters,
            t5_padding=request.t5_padding,
            decoding_batch_size=request.decoding_batch_size,
            cache=request.cache,
            source=source,
            references=conditions.references,
            reference_strengths=(
                request.reference_strengths if "reference_strengths" in request.conditions else ()
            ),
            redux=resolved.reader,
            redux_revision=resolved.reader_revision,
            control=conditions.control,
            control_from=conditions.control_from,
            negative=request.negative,
            cfg=request.cfg if request.cfg > 1 else None,
            n_images=request.n_images,
            n_rows=n_rows,
        )

    def of_image(self, seed: int) -> Recipe:
        """The recipe of one of the images, as if its seed had been asked for alone."""
        # Alone, a picture is decoded alone, so a batch size that had no effect is left out.
        batch = self.decoding_batch_size if self.n_images > 1 else 1
        return replace(self, seed=seed, n_images=1, n_rows=1, decoding_batch_size=batch)

    def file_hashes(self) -> dict[str, str]:
        """The SHA-256 of each file of the user's that the picture depends on, by its path."""
        hashes = {path: sha256 for path, _, sha256 in self.adapters}
        if self.source is not None:
            hashes[self.source.image] = self.source.image_sha256
            if self.source.mask is not None:
                hashes[self.source.mask] = self.source.mask_sha256 or ""
        hashes |= {file.name: file.sha256 for file in self.references}
        for file in (self.control, self.control_from):
            if file is not None:
                hashes[file.name] = file.sha256
        return hashes

    def to_json(self, **more: Any) -> str:
        """ASCII, so that it fits a PNG text chunk of any reader; `more` adds keys."""
        values = asdict(self) | more
        for name in RARE:  # what a picture was not made with, its recipe does not name
            if not values[name]:
                del values[name]
        if self.cache:
            values["approximate"] = True  # for whoever reads it without knowing what a cache does
        return json.dumps(values, ensure_ascii=True, sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        """Raises `ValueError` naming the field that is missing or of the wrong type."""
        try:
            values = json.loads(text)
        except RecursionError as error:
            raise ValueError("it is nested too deeply") from error
        if not isinstance(values, Mapping):
            raise ValueError("it is not a JSON object")
        source = values.get("source")
        return cls(
            prompt=_field(values, "prompt", str),
            model=_field(values, "model", str),
            seed=_field(values, "seed", int),
            height=_field(values, "height", int),
            width=_field(values, "width", int),
            steps=_field(values, "steps", int),
            guidance=_number(values, "guidance"),
            revision=_field(values, "revision", str, ""),
            dtype=_field(values, "dtype", str, "bfloat16"),
            bits=_field(values, "bits", (int, type(None)), None),
            text_bits=_field(values, "text_bits", (int, type(None)), None),
            adapters=tuple(_adapter(entry) for entry in _field(values, "adapters", list, [])),
            fuse_adapters=_field(values, "fuse_adapters", bool, False),
            t5_padding=_field(values, "t5_padding", bool, True),
            decoding_batch_size=_field(values, "decoding_batch_size", int, 1),
            cache=_number(values, "cache", 0.0),
            placement=_field(values, "placement", str, "data"),
            source=None if source is None else _source(source),
            references=tuple(_file(file) for file in _field(values, "references", list, [])),
            reference_strengths=_strengths(values),
            redux=_field(values, "redux", str, ""),
            redux_revision=_field(values, "redux_revision", str, ""),
            control=_file_or_none(values, "control"),
            control_from=_file_or_none(values, "control_from"),
            negative=_field(values, "negative", (str, type(None)), None),
            cfg=None if values.get("cfg") is None else _number(values, "cfg"),
            n_images=_field(values, "n_images", int, 1),
            n_rows=_field(values, "n_rows", int, 1),
            version=_field(values, "version", str, ""),
        )


def differences(recorded: Recipe, now: Recipe) -> list[str]:
    """What makes it doubtful that `now` gives the picture of `recorded`, in sentences."""
    named = [(recorded.model, recorded.revision, now.model, now.revision)]
    named += [(recorded.redux, recorded.redux_revision, now.redux, now.redux_revision)]
    sentences = [
        f"The picture was made with revision {before} of {name}; this machine has {here or 'none'}."
        for name, before, same, here in named
        if name == same and before not in ("", here)  # "": only other machines had its files
    ]
    before, present = recorded.file_hashes(), now.file_hashes()
    sentences.extend(
        f"{path} is not the file that it was when the picture was made."
        for path, sha256 in before.items()
        if present.get(path, sha256) != sha256
    )
    return sentences


def read_recipe(path: str | Path) -> Recipe:
    """The recipe in the PNG at `path`; raises `UsageError` when there is none."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            text = getattr(image, "text", {}).get(KEYWORD)
    except FileNotFoundError as error:
        raise UsageError(f"`recipe` {path}: there is no such file.", setting="recipe") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UsageError(
            f"`recipe` {path}: this is not a picture that can be read.", setting="recipe"
        ) from error
    if text is None:
        raise UsageError(
            f"`recipe` {path}: this picture does not say how it was made; "
            "only a PNG that fluxmesh wrote does, as long as no other program saved it again, and "
            "not with `no_metadata`.",
            setting="recipe",
        )
    try:
        return Recipe.from_json(text)
    except ValueError as error:
        raise UsageError(
            f"`recipe` {path}: its fluxmesh metadata can't be read: {error}.", setting="recipe"
        ) from error


def _name_of(file: str | bytes) -> str:
    return "" if isinstance(file, bytes) else file


_REQUIRED = object()


def _field(values: Mapping[str, Any], name: str, kind: Any, default: Any = _REQUIRED) -> Any:
    value = values.get(name, default)
    if value is _REQUIRED:
        raise ValueError(f"{name!r} is missing")
    # bool is a subclass of int in Python, but true is not a seed.
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{name!r} is of the wrong type")
    return value


def _number(values: Mapping[str, Any], name: str, default: Any = _REQUIRED) -> float:
    try:
        return float(_field(values, name, (int, float), default))
    except OverflowError as error:
        raise ValueError(f"{name!r} is too large") from error


def _adapter(entry: Any) -> tuple[str, float, str]:
    if not isinstance(entry, list) or len(entry) != 3:
        raise ValueError("'adapters' is not a list of (path, scale, sha256)")
    values = dict(zip(("path", "scale", "sha256"), entry, strict=True))
    return (
        _field(values, "path", str),
        _number(values, "scale"),
        _field(values, "sha256", str),
    )


def _strengths(values: Mapping[str, Any]) -> tuple[float, ...]:
    """Of the references, all of them or none."""
    listed = _field(values, "reference_strengths", list, [])
    strengths = tuple(_number({"strength": each}, "strength") for each in listed)
    if strengths and len(strengths) != len(_field(values, "references", list, [])):
        raise ValueError("'reference_strengths' are not as many as 'references'")
    return strengths


def _file(values: Any) -> NamedFile:
    if not isinstance(values, Mapping):
        raise ValueError("a file is not a JSON object")
    return NamedFile(_field(values, "name", str), _field(values, "sha256", str, ""))


def _file_or_none(values: Mapping[str, Any], name: str) -> NamedFile | None:
    return None if values.get(name) is None else _file(values[name])


def _source(values: Any) -> SourceFiles:
    if not isinstance(values, Mapping):
        raise ValueError("'source' is not a JSON object")
    outpaint = _field(values, "outpaint", (list, type(None)), None)
    if outpaint is not None:
        if len(outpaint) != 4 or not all(type(side) is int for side in outpaint):
            raise ValueError("'outpaint' is not four numbers of pixels")
        outpaint = tuple(outpaint)
    return SourceFiles(
        image=_field(values, "image", str),
        strength=_number(values, "strength"),
        image_sha256=_field(values, "image_sha256", str, ""),
        mask=_field(values, "mask", (str, type(None)), None),
        mask_sha256=_field(values, "mask_sha256", (str, type(None)), None),
        outpaint=outpaint,
        sized=_field(values, "sized", bool, False),
    )

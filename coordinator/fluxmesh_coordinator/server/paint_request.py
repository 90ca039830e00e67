"""What a client asks for, whichever face it came to: bounded, and turned into settings.

The faces fill one in from their own fields; `queue/service.py` has it resolved as the command line
has its options, by the same `commands/`.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, fields, replace

from fluxmesh.cluster.snapshot import Placement
from fluxmesh.errors import UsageError
from fluxmesh.images import Margins
from fluxmesh.request import MAX_REFERENCES, check_strengths
from fluxmesh_coordinator.commands.settings import GenerateSettings
from fluxmesh_coordinator.server.catalogue import Catalogue, ServedModel

MAX_PROMPT = 32_000  # characters
MAX_IMAGES = 16
MAX_STEPS = 200
MAX_AREA = 4 << 20  # pixels of a picture that is painted
MAX_ADAPTERS = 16


@dataclass(frozen=True, kw_only=True)
class PaintRequest:
    """One request; None leaves a choice to the model or to chance."""

    prompt: str
    model: ServedModel | None = None  # None: the one that is loaded, or the server's own
    width: int | None = None  # pixels
    height: int | None = None  # pixels
    steps: int | None = None
    guidance: float | None = None
    seed: int | None = None
    n_images: int = 1
    image: bytes | None = None
    mask: bytes | None = None
    outpaint: Margins | None = None  # a border that is painted around the image
    strength: float | None = None
    references: tuple[bytes, ...] = ()
    reference_strengths: tuple[float, ...] = ()  # of each; () is 1 for all
    control: bytes | None = None
    control_from: bytes | None = None  # a picture whose edges are such a map
    negative_prompt: str = ""
    cfg: float | None = None
    adapters: tuple[tuple[str, float], ...] = ()  # (name, strength)
    fuse_adapters: bool = False
    dtype: str | None = None
    bits: int | None = None  # of a quantized weight
    text_bits: int | None = None  # of a text encoder's
    t5_padding: bool = True
    cache: float | None = None  # approximate: how little a step must change to be reused
    placement: Placement | None = None
    previews: bool = False

    def check(self) -> None:
        """Raises `UsageError` for what this server does for nobody."""
        if not self.prompt.strip():
            raise UsageError.about("prompt", "is empty", "say what to paint")
        for name, text in (("prompt", self.prompt), ("negative_prompt", self.negative_prompt)):
            if len(text) > MAX_PROMPT:
                raise UsageError.about(name, f"has more than {MAX_PROMPT} characters")
        if not 1 <= self.n_images <= MAX_IMAGES:
            raise UsageError.about(
                "n_images", f"is {self.n_images}", f"it must be 1 to {MAX_IMAGES}"
            )
        if self.steps is not None and not 1 <= self.steps <= MAX_STEPS:
            raise UsageError.about("steps", f"is {self.steps}", f"it must be 1 to {MAX_STEPS}")
        if (self.width is None) != (self.height is None):
            raise UsageError("`width` and `height` go together; give both, or none.")
        if self.width is not None and self.height is not None:
            check_area(self.height, self.width)
        if len(self.references) > MAX_REFERENCES:
            given = len(self.references)
            raise UsageError.about("references", f"are {given}", f"give {MAX_REFERENCES} at most")
        check_strengths(self.reference_strengths, len(self.references))
        if len(self.adapters) > MAX_ADAPTERS:
            given = len(self.adapters)
            raise UsageError.about("adapters", f"are {given}", f"give {MAX_ADAPTERS} at most")
        if self.placement not in (None, "data", "sequence", "tensor"):
            raise UsageError.about(
                "placement", f"is {self.placement!r}", "choose data, sequence or tensor"
            )

    def settings(self, catalogue: Catalogue) -> GenerateSettings:
        """As the command line has them. Raises `UsageError` and what the catalogue does."""
        self.check()
        return GenerateSettings(
            model=None if self.model is None else self.model.source,
            n_images=self.n_images,
            image_size=(self.height, self.width) if self.height and self.width else None,
            steps=self.steps,
            guidance=self.guidance,
            seed=self.seed,
            adapter=tuple((str(catalogue.adapter(name)), scale) for name, scale in self.adapters),
            image=self.image,
            mask=self.mask,
            outpaint=self.outpaint,
            strength=self.strength,
            reference=tuple(
                zip(
                    self.references,
                    self.reference_strengths or (1.0,) * len(self.references),
                    strict=True,
                )
            ),
            control=self.control,
            control_from=self.control_from,
            negative_prompt=self.negative_prompt.strip() or None,
            cfg=self.cfg,
            fuse_adapter=self.fuse_adapters,
            dtype=self.dtype or GenerateSettings.dtype,
            bits=self.bits,
            text_bits=self.text_bits,
            no_t5_padding=not self.t5_padding,
            cache=self.cache or GenerateSettings.cache,
        )

    @property
    def nbytes(self) -> int:
        """Of its pictures; and the letters of its texts, which nobody has counted yet."""
        return sum(_size(getattr(self, field.name)) for field in fields(self))

    @property
    def fingerprint(self) -> str:
        """The same for the same pictures, also of a server that knows more fields."""
        values = asdict(replace(self, model=None, previews=False))
        usual = asdict(PaintRequest(prompt=""))
        said = {name: value for name, value in values.items() if value != usual[name]}
        model = "" if self.model is None else self.model.source
        text = repr([model, *((name, _short(value)) for name, value in sorted(said.items()))])
        return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def check_area(height: int, width: int) -> None:
    """Raises `UsageError` for a picture that is larger than this server paints."""
    if height * width > MAX_AREA:
        raise UsageError.about(
            "image_size",
            f"is {width}x{height}, more than {MAX_AREA >> 20} million pixels",
            "ask for a smaller picture",
        )


def _size(value: object) -> int:
    if isinstance(value, list | tuple):
        return sum(map(_size, value))
    return len(value) if isinstance(value, bytes | str) else 0


def _short(value: object) -> object:
    """A value by its hash, where it is a picture."""
    if isinstance(value, bytes):
        return hashlib.sha256(value).hexdigest()
    return [_short(each) for each in value] if isinstance(value, list | tuple) else value

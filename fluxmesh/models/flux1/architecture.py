"""What FLUX.1's checkpoints are made of, in numbers. Pure, no mlx.

T5 reads the prompt token by token, CLIP as a whole; the modulations, 27% of the transformer, are
computed before the first step and may leave memory then. A model that paints from text may read
pictures too, with Redux, which is published apart (`reading_with`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np

from fluxmesh.errors import UsageError
from fluxmesh.models.autoencoder import conv_tensors
from fluxmesh.models.base import Architecture, ModelComponent, ModelDefaults
from fluxmesh.models.flux1 import adapter_names, partition, tensor_maps
from fluxmesh.models.flux1.conditions import kontext, pictures
from fluxmesh.models.flux1.config import (
    AutoencoderConfig,
    ClipConfig,
    FluxConfig,
    InputKind,
    ReduxConfig,
    ScheduleConfig,
    SiglipConfig,
    T5Config,
    input_kind,
)
from fluxmesh.models.flux1.quantization import group_size
from fluxmesh.models.partition import Partition
from fluxmesh.models.tensor_map import ComponentNames, Tensors
from fluxmesh.models.transformer_shape import BLOCK_LISTS, TransformerShape, rules_of_heads
from fluxmesh.request import (
    MAX_REFERENCES,
    Condition,
    FilledRequest,
    GenerateRequest,
    MapKind,
    SourceImage,
)

COMPONENTS = (
    ModelComponent("t5", "text", "text_encoder_2"),
    ModelComponent("clip", "text", "text_encoder"),
    ModelComponent("modulator", "modulator", "transformer"),
    ModelComponent("denoiser", "denoiser", "transformer"),
    ModelComponent("autoencoder", "autoencoder", "vae"),
)

# Of Redux, which sees pictures for a model that reads text.
VISION = (
    ModelComponent("siglip", "vision", "image_encoder"),
    ModelComponent("redux", "vision", "image_embedder"),
)

DISTILLED_STEPS = 4  # of schnell, whose schedule is the one that shifts nothing


def map_kind_of(*names: str) -> MapKind | None:
    """What a model that takes a map follows, by the first of `names` that says; None: none does.

    Canny and Depth look alike, but for what they are called.
    """
    for name in map(str.lower, names):
        if "depth" in name:
            return "depth"
        if "canny" in name:
            return "edges"
    return None


def guidance_of(kind: InputKind, follows: MapKind | None = None) -> float:
    """The strength that a model was made for, as black-forest-labs/flux asks for it."""
    if kind == "text":
        return 4.0
    return 10.0 if kind == "control" and follows == "depth" else 30.0


@dataclass(frozen=True)
class Flux1Architecture(Architecture):
    """A checkpoint of FLUX.1, or one shaped like it."""

    transformer: FluxConfig
    t5: T5Config
    clip: ClipConfig
    autoencoder: AutoencoderConfig
    defaults: ModelDefaults
    schedule: ScheduleConfig = ScheduleConfig()
    is_kontext: bool = False  # of model_index.json: it edits a reference, and looks like dev
    siglip: SiglipConfig | None = None  # of Redux, where references are read with it
    redux: ReduxConfig | None = None
    follows: MapKind | None = None

    @property
    def takes(self) -> frozenset[Condition]:  # type: ignore[override]
        if self._kind == "control":
            # Where no name says what it follows, its user knows.
            is_made: tuple[Condition, ...] = () if self.follows == "depth" else ("control_from",)
            return frozenset(("control", *is_made))
        guided: tuple[Condition, ...] = ()
        if self._kind == "text" and self.takes_guidance:
            guided = ("negative", "cfg")
        seen: tuple[Condition, ...] = ("references",) if self.is_kontext else ()
        if self.redux is not None:
            seen = ("references", "reference_strengths")
        return frozenset((*guided, *seen))

    @property
    def most_references(self) -> int:  # type: ignore[override]
        if self.redux is not None:
            return MAX_REFERENCES
        return 1 if self.is_kontext else 0

    @property
    def _kind(self) -> InputKind | None:
        return input_kind(self.transformer, self.autoencoder)

    @property
    def is_tool(self) -> bool:  # type: ignore[override]
        return self._kind != "text"

    @property
    def fills_by_channels(self) -> bool:  # type: ignore[override]
        return self._kind == "fill"

    def lacking(self, request: GenerateRequest) -> str | None:
        if self._kind == "control" and request.control is None:
            return "follows a map of edges or depth, and `control` gives none; give a picture of it"
        if self._kind == "fill" and (request.source is None or request.source.mask is None):
            return (
                "paints a part of a picture; give the picture as `image`, and what to paint by "
                "`mask` or `outpaint`"
            )
        return None

    def start(self, request: FilledRequest) -> SourceImage | None:
        """Fill reads the picture at every step: none of it is put back, and at strength 1 the
        first one begins from noise alone."""
        if not self.fills_by_channels or request.source is None:
            return request.source
        return None if request.source.strength == 1 else replace(request.source, mask=None)

    def pictures(self, request: FilledRequest) -> Mapping[str, np.ndarray]:
        if self._kind == "control" and request.control is not None:
            return pictures.of_control(request.control, request.height, request.width)
        if self._kind == "fill" and request.source is not None:
            return pictures.of_source(request.source)
        return super().pictures(request)

    def check_pictures(self, named: Mapping[str, np.ndarray]) -> None:
        tools: dict[InputKind | None, tuple[str, ...]] = {
            "control": (pictures.CONTROL,),
            "fill": (pictures.FILLED, pictures.MASK),
        }
        names = tools.get(self._kind, ())
        if not names:
            super().check_pictures(named)
            return
        if set(named) != set(names):
            came = ", ".join(sorted(named))
            raise UsageError(f"The pictures {came} came; this model reads {' and '.join(names)}.")
        for name in names:
            self.check_picture(name, named[name], 1 if name == pictures.MASK else 3)
        if len({named[name].shape[:2] for name in names}) > 1:
            sizes = " and ".join(str(list(named[name].shape[:2])) for name in names)
            raise UsageError(f"The picture and its mask came as {sizes}; both have one size.")

    def check_reference(self, name: str, picture: np.ndarray) -> None:
        if self.siglip is None:
            super().check_reference(name, picture)
            return
        side = self.siglip.image_size
        if picture.shape != (side, side, 3):
            raise UsageError(
                f"The picture {name!r} came as {list(picture.shape)}; this model sees "
                f"{[side, side, 3]}."
            )

    def fitted(self, picture: np.ndarray) -> np.ndarray:
        if self.siglip is not None:
            return pictures.as_siglip_sees(picture, self.siglip.image_size)
        return kontext.fitted(picture)

    def size_of(self, references: Sequence[np.ndarray]) -> tuple[int, int] | None:
        """That of Kontext's reference, as black-forest-labs' own program has it."""
        return references[0].shape[:2] if references and self.is_kontext else None

    def reading_with(self, reader: Architecture) -> Self | None:
        """Redux's models, where this one paints from text whose features are as wide as theirs."""
        if not isinstance(reader, Flux1Architecture) or reader.redux is None:
            return None
        is_fit = reader.redux.txt_in_features == self.transformer.context_in_dim
        if self._kind != "text" or self.is_kontext or not is_fit:
            return None
        return replace(self, siglip=reader.siglip, redux=reader.redux)

    def added_tokens(self, references: Sequence[np.ndarray]) -> int:
        """With Redux, as many however many pictures there are: they are added up."""
        if self.siglip is not None:
            return self.siglip.rows**2 if references else 0
        return super().added_tokens(references)

    @property
    def shifting(self) -> ScheduleConfig:
        return self.schedule

    @property
    def takes_guidance(self) -> bool:
        return self.transformer.guidance_embed

    @property
    def distilled_steps(self) -> int | None:
        plain = not self.schedule.use_dynamic_shifting and self.schedule.shift == 1.0
        return DISTILLED_STEPS if plain and not self.transformer.guidance_embed else None

    @property
    def identity(self) -> tuple[Any, ...]:
        """Without what it has none of: a model is the same whether there is a Redux or not; and
        without what it follows, which is known by its name alone."""
        known = super(Flux1Architecture, replace(self, follows=None)).identity
        return tuple(value for value in known if value is not None)

    @property
    def components(self) -> tuple[ModelComponent, ...]:
        return COMPONENTS if self.redux is None else (*COMPONENTS[:2], *VISION, *COMPONENTS[2:])

    def tensors_in(self, folder: str) -> Tensors:
        if folder == "image_encoder" and self.siglip is not None:
            return tensor_maps.siglip_tensors(self.siglip)
        if folder == "image_embedder" and self.redux is not None:
            return tensor_maps.redux_tensors(self.redux)
        if folder == "text_encoder":
            return tensor_maps.clip_tensors(self.clip)
        if folder == "text_encoder_2":
            return tensor_maps.t5_tensors(self.t5)
        if folder == "vae":
            return tensor_maps.autoencoder_tensors(self.autoencoder)
        return tensor_maps.transformer_tensors(self.transformer)

    def with_inputs(self, inputs: Mapping[str, int], name: str) -> Self:
        follows = map_kind_of(name)
        return replace(
            self,
            transformer=replace(self.transformer, in_channels=inputs["img_in"]),
            defaults=replace(self.defaults, guidance=guidance_of("control", follows)),
            follows=follows,
        )

    def modulates(self, name: str) -> bool:
        return tensor_maps.modulates(name)

    def group_size(self, folder: str, name: str, shape: tuple[int, ...]) -> int | None:
        return group_size(folder, name, shape)

    @property
    def rules(self) -> Mapping[str, bool]:
        t5, clip, ae, schedule = self.t5, self.clip, self.autoencoder, self.schedule
        exact = t5.relative_attention_num_buckets // 4  # distances with a bucket of their own
        return {
            **rules_of_heads(self.transformer),
            "T5's layer_norm_epsilon must be above 0": t5.layer_norm_epsilon > 0,
            "T5's relative_attention_num_buckets must be at least 4, and "
            "relative_attention_max_distance above a quarter of them": (
                1 <= exact < t5.relative_attention_max_distance
            ),
            "CLIP's layer_norm_eps must be above 0": clip.layer_norm_eps > 0,
            "CLIP's heads must divide its hidden_size": (
                clip.hidden_size % clip.num_attention_heads == 0
            ),
            "the autoencoder's norm groups must divide each of its widths": all(
                width % ae.norm_groups == 0 for width in ae.widths
            ),
            "the autoencoder's scaling factor must not be 0": ae.scale_factor != 0,
            "the scheduler's shift must be above 0": schedule.shift > 0,
            "the scheduler's max_image_seq_len must be above its base_image_seq_len": (
                schedule.max_image_seq_len > schedule.base_image_seq_len
            ),
            **self._rules_of_redux,
        }

    @property
    def _rules_of_redux(self) -> Mapping[str, bool]:
        siglip, redux = self.siglip, self.redux
        if siglip is None or redux is None:
            return {}
        return {
            "SigLIP's layer_norm_eps must be above 0": siglip.layer_norm_eps > 0,
            "SigLIP's heads must divide its hidden_size": (
                siglip.hidden_size % siglip.num_attention_heads == 0
            ),
            "SigLIP's image_size must be no less than its patch_size": siglip.rows > 0,
            "the embedder of Redux must be as wide as SigLIP": (
                redux.redux_dim == siglip.hidden_size
            ),
        }

    @property
    def adapter_names(self) -> tuple[ComponentNames, ...]:
        return adapter_names.components(self.transformer, self.clip, self.t5)

    @property
    def shape(self) -> TransformerShape:
        config = self.transformer
        modulations = 12 * config.depth + 3 * config.depth_single_blocks + 2
        return TransformerShape(
            hidden_size=config.hidden_size,
            mlp_hidden_dim=config.mlp_hidden_dim,
            num_heads=config.num_heads,
            depth=config.depth,
            depth_single_blocks=config.depth_single_blocks,
            split_modulations=modulations * config.hidden_size,
        )

    @property
    def block_lists(self) -> tuple[str, ...]:
        return BLOCK_LISTS

    @property
    def partition(self) -> Partition:
        return partition.partition(self.transformer)

    @property
    def finest_width(self) -> int:
        return conv_tensors.finest_width(self.autoencoder)

    @property
    def finest_encoded_width(self) -> int:
        return conv_tensors.finest_encoded_width(self.autoencoder)

    def decode_flops(self, height: int, width: int) -> float:
        return conv_tensors.decode_flops(self.autoencoder, height, width)

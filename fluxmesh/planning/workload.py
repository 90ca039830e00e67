"""What a request asks for, in numbers: tokens, steps, bytes in memory, bytes on the wire. Pure.

Stands between a checkpoint's configs (`config.py`, `tensor_maps.py`) and `plan.py`;
`cost.py` turns the same numbers into seconds. Bytes on the wire and of weights are counted
exactly; memory of activations is estimated, from above. Left out, because every placement spends
them alike: text encoding, the requests and pictures that travel between coordinator and agents.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from typing import NamedTuple

from fluxmesh.cluster.snapshot import ModelVariant, Placement, Platform
from fluxmesh.models.flux1 import tensor_maps
from fluxmesh.models.flux1.config import (
    AutoencoderConfig,
    ClipConfig,
    FluxConfig,
    ScheduleConfig,
    T5Config,
)
from fluxmesh.models.flux1.quantization import group_size
from fluxmesh.models.partition import token_run
from fluxmesh.planning.activations import (
    SPLIT_STATES,
    STATES,
    WIDE_STATES,
    decoding_bytes,
    largest_of_decode,
)
from fluxmesh.request import DTYPE_BYTES as BYTES
from fluxmesh.request import FilledRequest, GenerateRequest
from fluxmesh.sampling.schedule import timesteps
from fluxmesh.weights.checkpoint import Checkpoint, ModelDefaults


@dataclass(frozen=True)
class ModelSizes:
    """What must be known of a checkpoint in order to plan with it; its files may be elsewhere."""

    transformer: FluxConfig
    t5: T5Config
    clip: ClipConfig
    autoencoder: AutoencoderConfig
    defaults: ModelDefaults
    bits: int | None = None  # that the checkpoint itself is quantized to

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> ModelSizes:
        return cls(
            checkpoint.transformer,
            checkpoint.t5,
            checkpoint.clip,
            checkpoint.autoencoder,
            checkpoint.defaults,
            checkpoint.bits,
        )

    def fill(self, request: GenerateRequest) -> FilledRequest:
        """The request, with what it leaves open as the model has it.

        A picture to begin from says the size, where the request does not. Raises `UsageError`.
        """
        own = self.defaults
        height, width = own.height, own.width
        if request.source is not None and request.height is None and request.width is None:
            height, width = request.source.pixels.shape[:2]
        values = {field.name: getattr(request, field.name) for field in fields(GenerateRequest)}
        values |= {
            "height": request.height or height,
            "width": request.width or width,
            "steps": request.steps or own.steps,
            "guidance": own.guidance if request.guidance is None else request.guidance,
        }
        return FilledRequest(**values)

    def tokens(self, height: int, width: int) -> int:
        """S: tokens of text and image, for a picture of that many pixels."""
        side = 2 * self.autoencoder.downsampling  # pixels along a token
        return self.defaults.t5_max_length + math.ceil(height / side) * math.ceil(width / side)


class Resident(NamedTuple):
    """Bytes of a transformer: what `tensor` splits among its ranks, and what each rank keeps."""

    split: int
    kept: int

    def on_each_of(self, shards: int) -> int:
        return math.ceil(self.split / shards) + self.kept


class Phases(NamedTuple):
    """Bytes that an engine needs while it denoises, and while it decodes."""

    denoise: int
    decode: int


@dataclass(frozen=True)
class Workload:
    """One request in numbers: S tokens of D channels, `steps` times, for each of `images`."""

    model: ModelSizes
    weights: ModelVariant
    images: int
    height: int  # pixels
    width: int  # pixels
    steps: int
    decoding_batch_size: int = 1
    preload: bool = False
    low_memory: bool = False

    @classmethod
    def of(cls, request: FilledRequest, model: ModelSizes) -> Workload:
        """The work that a request to a model of these sizes is."""
        strength = 1.0 if request.source is None else request.source.strength
        levels = timesteps(request.steps, 1, ScheduleConfig(), strength)
        return cls(
            model,
            ModelVariant.of(request, model.bits),
            request.n_images,
            request.height,
            request.width,
            len(levels) - 1,
            request.decoding_batch_size,
            request.preload,
            request.low_memory,
        )

    @cached_property
    def tokens(self) -> int:
        """S: text and image."""
        return self.model.tokens(self.height, self.width)

    @property
    def is_quantized(self) -> bool:
        return self.weights.bits is not None

    @cached_property
    def transformer(self) -> Resident:
        """Bytes of the transformer in memory."""
        return _resident(self.model.transformer, self.weights.dtype, self.weights.bits)

    @cached_property
    def modulation_bytes(self) -> int:
        """What `low_memory` lets leave of the transformer, which `tensor` splits."""
        return _modulation_bytes(self.model.transformer, self.weights.dtype, self.weights.bits)

    @cached_property
    def transformer_file(self) -> Resident:
        """Bytes of the transformer as a checkpoint stores it."""
        return _resident(self.model.transformer, "bfloat16", self.model.bits)

    @cached_property
    def autoencoder_bytes(self) -> int:
        return _autoencoder_parameters(self.model.autoencoder) * BYTES[self.weights.dtype]

    @cached_property
    def text_bytes(self) -> int:
        """T5 and CLIP in memory."""
        return _text_bytes(self.model.clip, self.model.t5, self.weights.dtype, self.weights.bits)

    def sent_a_step(self, placement: Placement, hosts: int) -> int:
        """Bytes that each host sends in a step: all-gathers of K and V, or ring reductions."""
        if placement == "data" or hosts < 2:
            return 0
        each = self.collective_bytes(placement, hosts)
        if placement == "sequence":
            return self.collectives(placement) * (hosts - 1) * each
        return math.ceil(self.collectives(placement) * 2 * (hosts - 1) * each / hosts)

    def collective_bytes(self, placement: Placement, hosts: int) -> int:
        """Of the array that each host gives to one collective: its K and V, or a part of a sum."""
        row = self.model.transformer.hidden_size * BYTES[self.weights.dtype]
        if placement == "data":
            return 0
        if placement == "sequence":
            # Gathers take equal shapes: every host's tokens are padded to those of the first.
            return 2 * math.ceil(self.tokens / hosts) * row
        return self.tokens * row

    @cached_property
    def beside_gathers(self) -> tuple[tuple[int, float], ...]:
        """(blocks, the part of such a block's arithmetic that needs no keys of other hosts).

        Double blocks compute their queries while keys and values travel, single blocks the inner
        half of their MLP too.
        """
        config = self.model.transformer
        hidden, mlp = config.hidden_size, config.mlp_hidden_dim
        block = 4 * hidden**2 + 2 * hidden * mlp + 2 * self.tokens * hidden
        return (
            (config.depth, hidden**2 / block),
            (config.depth_single_blocks, (hidden**2 + hidden * mlp) / block),
        )

    def collectives(self, placement: Placement) -> int:
        """Collectives in a step, whatever the number of hosts."""
        config = self.model.transformer
        if placement == "data":
            return 0
        doubles = 1 if placement == "sequence" else 2
        return doubles * config.depth + config.depth_single_blocks

    def sent_a_request(self, placement: Placement, hosts: int) -> int:
        """Bytes beside the steps': `tensor` gathers the modulations of all steps, once."""
        if placement != "tensor" or hosts < 2:
            return 0
        config = self.model.transformer
        columns = (12 * config.depth + 3 * config.depth_single_blocks + 2) * config.hidden_size
        whole = self.steps * columns * BYTES[self.weights.dtype]
        return math.ceil(whole * (hosts - 1) / hosts)

    def memory(
        self, placement: Placement, hosts: int, shards: int, platform: Platform = "cuda"
    ) -> Phases:
        """Bytes on one of `hosts` hosts whose engine holds 1/`shards` of the transformer."""
        config, size = self.model.transformer, BYTES[self.weights.dtype]
        row = config.hidden_size * size
        states = STATES + (WIDE_STATES if self.weights.dtype == "float16" else 0)
        if placement == "sequence":
            own = math.ceil(self.tokens / hosts)
            working = states * own * row + 4 * own * hosts * row  # K and V, whole, twice
        elif placement == "tensor":
            kept = states - SPLIT_STATES
            working = math.ceil((kept + SPLIT_STATES / hosts) * self.tokens * row)
        else:
            working = states * self.tokens * row
        transformer = self.transformer.on_each_of(shards)
        decode = self.autoencoder_bytes + self._decode_bytes(platform)
        if self.low_memory:  # the modulation weights, then the others, then the autoencoder
            modulation = math.ceil(self.modulation_bytes / shards)
            return Phases(max(modulation, transformer - modulation + working), decode)
        extra = self.autoencoder_bytes if self.preload else 0
        return Phases(transformer + working + extra, decode + transformer)

    def _decode_bytes(self, platform: Platform) -> int:
        size, batch = BYTES[self.weights.dtype], min(self.decoding_batch_size, self.images)
        largest = largest_of_decode(self.model.autoencoder, self.height, self.width, size)
        return decoding_bytes(batch * largest, platform)


def tensor_problem(work: Workload, hosts: int) -> str:
    """Why `tensor` can't split this model over so many hosts; "" where it can.

    Heads stay whole, and so do quantization groups: matrices that are split along their columns
    (those that lead out of attention and MLP) are quantized in groups along the same columns.
    """
    config = work.model.transformer
    if config.num_heads % hosts:
        return f"{config.num_heads} heads do not divide by {hosts}"
    if config.mlp_hidden_dim % hosts:
        return f"{config.mlp_hidden_dim} MLP columns do not divide by {hosts}"
    if not work.is_quantized:
        return ""
    hidden, mlp = config.hidden_size, config.mlp_hidden_dim
    for name, columns, parts in (
        ("double_blocks.0.img_attn.proj.weight", hidden, (hidden,)),
        ("double_blocks.0.img_mlp.2.weight", mlp, (mlp,)),
        ("single_blocks.0.linear2.weight", hidden + mlp, (hidden, mlp)),
    ):
        group = group_size("transformer", name, (hidden, columns))
        for part in parts:
            if group and part // hosts % group:
                return (
                    f"{part} columns over {hosts} hosts are {part // hosts}, not whole "
                    f"quantization groups of {group}"
                )
    return ""


def split_tokens(tokens: int, hosts: int) -> tuple[int, ...]:
    """Tokens of each rank under `sequence`, without what fills up the last ones."""
    runs = (token_run(tokens, rank, hosts) for rank in range(hosts))
    return tuple(max(0, min(stop, tokens) - start) for start, stop in runs)


@lru_cache(maxsize=64)
def _resident(config: FluxConfig, dtype: str, bits: int | None) -> Resident:
    """Blocks and modulations are split; embedders, norms and the last linear are kept."""
    tensors = tensor_maps.transformer_tensors(config)
    split = {
        name: target
        for name, target in tensors.items()
        if name.startswith(("double_blocks.", "single_blocks.", "final_layer.adaLN_modulation."))
        and ".norm." not in name
    }
    kept = {name: target for name, target in tensors.items() if name not in split}
    return Resident(
        _bytes("transformer", split, dtype, bits), _bytes("transformer", kept, dtype, bits)
    )


@lru_cache(maxsize=64)
def _modulation_bytes(config: FluxConfig, dtype: str, bits: int | None) -> int:
    tensors = tensor_maps.transformer_tensors(config)
    some = {name: target for name, target in tensors.items() if tensor_maps.modulates(name)}
    return _bytes("transformer", some, dtype, bits)


@lru_cache(maxsize=64)
def _autoencoder_parameters(config: AutoencoderConfig) -> int:
    return tensor_maps.parameter_count(tensor_maps.autoencoder_tensors(config))


@lru_cache(maxsize=64)
def _text_bytes(clip: ClipConfig, t5: T5Config, dtype: str, bits: int | None) -> int:
    return sum(
        _bytes(component, tensors, dtype, bits)
        for component, tensors in (
            ("text_encoder", tensor_maps.clip_tensors(clip)),
            ("text_encoder_2", tensor_maps.t5_tensors(t5)),
        )
    )


def _bytes(component: str, tensors: tensor_maps.Tensors, dtype: str, bits: int | None) -> int:
    """Bytes of tensors in memory, the large matrices quantized where `bits` says so."""
    total = 0
    for name, target in tensors.items():
        count = math.prod(target.shape)
        group = group_size(component, name, target.shape) if bits else None
        if bits is None or group is None:
            total += count * BYTES[dtype]
        else:  # a scale and a bias a group
            total += count * bits // 8 + 2 * (count // group) * BYTES[dtype]
    return total

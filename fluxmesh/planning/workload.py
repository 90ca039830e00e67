"""What a request asks for, in numbers: tokens, steps, bytes in memory, bytes on the wire. Pure.

Stands between what a family tells of a checkpoint (`models/base.py`) and `plan.py`;
`cost.py` turns the same numbers into seconds. Bytes on the wire and of weights are counted
exactly; memory of activations is estimated, from above. Left out, because every placement spends
them alike: text encoding, the requests and pictures that travel between coordinator and agents.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np

from fluxmesh.cluster.shares import EVEN, Shares
from fluxmesh.cluster.snapshot import ModelVariant, Placement, Platform, prompt_mark
from fluxmesh.errors import UsageError
from fluxmesh.models.base import Architecture, ModelDefaults, Role
from fluxmesh.models.partition import TokenRuns
from fluxmesh.models.transformer_shape import TransformerShape
from fluxmesh.planning.activations import (
    CPU_STATES,
    LENT_LINEARS,
    SCORE_ARRAYS,
    SPLIT_STATES,
    STATES,
    WIDE_STATES,
    decoding_bytes,
    largest_of_decode,
    largest_of_encode,
)
from fluxmesh.request import DTYPE_BYTES as BYTES
from fluxmesh.request import FilledRequest, GenerateRequest
from fluxmesh.sampling.schedule import first_step
from fluxmesh.weights.checkpoint import Checkpoint, other_bits

TEXT_STATES = 4  # arrays as large as a text encoder's widest that are there at once


@dataclass(frozen=True)
class ModelSizes:
    """What must be known of a checkpoint in order to plan with it; its files may be elsewhere."""

    architecture: Architecture
    bits: int | None = None  # that the checkpoint itself is quantized to
    text_bits: int | None = None  # that its text encoders are, where those have others

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> ModelSizes:
        return cls(checkpoint.architecture, checkpoint.bits, checkpoint.text_bits)

    @property
    def defaults(self) -> ModelDefaults:
        return self.architecture.defaults

    def fill(self, request: GenerateRequest) -> FilledRequest:
        """The request, with what it leaves open as the model has it.

        A picture to begin from says the size, where the request does not, or reference pictures,
        which are brought to the sizes at which the model reads them. Raises `UsageError`, also for
        other bits than those that the model is stored in.
        """
        if self.bits and request.bits not in (None, self.bits):
            raise other_bits(request.model, self.bits)
        own, model = self.defaults, self.architecture
        references = request.references
        if not isinstance(request, FilledRequest):
            references = tuple(_fitted(model, references))
        height, width = model.size_of(references) or (own.height, own.width)
        if request.control is not None and "control" in model.takes:
            height, width = model.size_of_control(request.control)
        if request.source is not None and request.height is None and request.width is None:
            height, width = request.source.pixels.shape[:2]
        values = {field.name: getattr(request, field.name) for field in fields(GenerateRequest)}
        guidance = own.guidance if request.guidance is None else request.guidance
        if model.guidance_is_cfg and request.cfg is not None:
            guidance = request.cfg
        cfg = 1.0  # where it is not the same as guidance
        if not model.guidance_is_cfg and request.cfg is not None:
            cfg = request.cfg
        elif not model.guidance_is_cfg and request.negative is not None:
            cfg = model.true_cfg
        negative = request.negative
        if not model.guidance_is_cfg:  # a negative prompt is read where it is moved away from
            negative = (negative or "") if cfg > 1 else None
        values |= {
            "height": request.height or height,
            "width": request.width or width,
            "steps": request.steps or own.steps,
            "guidance": guidance,
            "references": references,
            "cfg": cfg,
            "negative": negative,
        }
        return FilledRequest(**values)


def _fitted(model: Architecture, pictures: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
    """Reference pictures at the sizes at which a model reads them. Raises `UsageError`, which says
    of several which one is wrong."""
    for number, picture in enumerate(pictures, start=1):
        try:
            yield model.fitted(picture)
        except UsageError as error:
            which = f"picture {number} of {len(pictures)}: " if len(pictures) > 1 else ""
            raise UsageError(f"`references`: {which}{error}", setting="references") from error


class Resident(NamedTuple):
    """Bytes of a transformer: what `tensor` splits among its ranks, and what each rank keeps."""

    split: int
    kept: int

    def on_each_of(self, shards: int, part: float | None = None) -> int:
        """On one of so many hosts that hold a shard each; `part` is its own where they differ."""
        split = self.split / shards if part is None else self.split * part
        return math.ceil(split) + self.kept


class OwnShare(NamedTuple):
    """What one host of a ring has of a step, where not all have the same."""

    own: int = 0  # tokens, with `sequence`
    longest: int = 0  # of any host of the ring
    heads: float = 0.0  # part of them, with `tensor`
    columns: float = 0.0  # part of the MLPs' columns


class Phases(NamedTuple):
    """Bytes that an engine needs while it denoises, and while it decodes.

    Who encodes pictures beside that, `Workload.encoding_memory` says.
    """

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
    added: int = 0  # tokens of reference pictures
    reference_pixels: int = 0  # of the largest of these
    reads_canvas: bool = False  # a picture of the output's size is encoded: a source, a control map
    calls: int = 0  # of the transformer in a step; 0: as many as the model takes by itself
    mark: str = ""  # `prompt_mark` of the prompt: who remembers it need not read it
    is_read: bool = False  # the prompt: nobody has to any more

    @classmethod
    def of(cls, request: FilledRequest, model: ModelSizes) -> Workload:
        """The work that a request to a model of these sizes is."""
        strength = 1.0 if request.source is None else request.source.strength
        sizes = (picture.shape for picture in request.references)
        return cls(
            model,
            ModelVariant.of(request, model.bits, model.text_bits),
            request.n_images,
            request.height,
            request.width,
            request.steps - first_step(request.steps, strength),
            request.decoding_batch_size,
            request.preload,
            request.low_memory,
            added=model.architecture.added_tokens(request.references),
            # What has models that see references needs no autoencoder for them.
            reference_pixels=0
            if model.architecture.of_role("vision")
            else max((height * width for height, width, _ in sizes), default=0),
            reads_canvas=request.source is not None
            or request.control is not None
            or model.architecture.is_tool,  # also where a plan is not given its picture
            calls=model.architecture.calls(request.guidance, request.cfg),
            mark=prompt_mark(request.prompt, request.t5_padding, request.negative),
        )

    @property
    def plain(self) -> Workload:
        """The same of a prompt alone, as steps are timed."""
        return replace(self, added=0, calls=0, reference_pixels=0, reads_canvas=False)

    @property
    def is_plain(self) -> bool:
        """Whether a step of it takes as long as one of a prompt alone."""
        return not self.added and self.shape == self.model.architecture.shape

    @cached_property
    def step_flops(self) -> float:
        """Arithmetic of one step of one image, after the first."""
        return self.shape.flops(self.tokens, self.remembered)

    @cached_property
    def begin_flops(self) -> float:
        """Arithmetic before the first step of a request: keys and values of remembered references.

        Their tokens attend to one another alone, in one call.
        """
        return replace(self.shape, calls=1).flops(self.remembered)

    @property
    def encoded_pixels(self) -> int:
        """Of the largest picture that an engine encodes; 0: none."""
        canvas = self.height * self.width if self.reads_canvas else 0
        return max(canvas, self.reference_pixels)

    @cached_property
    def tokens(self) -> int:
        """S: text and image, and reference pictures unless they are remembered."""
        tokens = self.model.architecture.tokens(self.height, self.width)
        return tokens + self.added - self.remembered

    @property
    def remembered(self) -> int:
        """Tokens of which keys and values are kept, which all others attend to."""
        return self.added if self.model.architecture.remembers_references else 0

    @property
    def is_quantized(self) -> bool:
        return self.weights.bits is not None

    @cached_property
    def transformer(self) -> Resident:
        """Bytes of the transformer in memory."""
        return _resident(self.model.architecture, self.weights.dtype, self.weights.bits)

    @cached_property
    def modulation_bytes(self) -> int:
        """What `low_memory` lets leave of the transformer, which `tensor` splits."""
        return self._nbytes("modulator")

    @cached_property
    def transformer_file(self) -> Resident:
        """Bytes of the transformer as a checkpoint stores it."""
        return _resident(self.model.architecture, "bfloat16", self.model.bits)

    @cached_property
    def autoencoder_bytes(self) -> int:
        return self._nbytes("autoencoder")

    @cached_property
    def text_bytes(self) -> int:
        """The text encoders in memory, and what sees references where they do."""
        weights = self.weights
        text = self.model.architecture.nbytes(("text",), weights.dtype, weights.bits_of_text)
        return text + self.vision_bytes

    @cached_property
    def text_file_bytes(self) -> int:
        """The same as a checkpoint stores them."""
        model = self.model
        text = model.architecture.nbytes(("text",), "bfloat16", model.text_bits or model.bits)
        return text + self._vision_bytes("bfloat16")

    @cached_property
    def vision_bytes(self) -> int:
        """What sees the request's references in the place of the autoencoder, in memory: it comes
        where the prompt is read, after the text encoders, and is never quantized."""
        return self._vision_bytes(self.weights.dtype)

    @cached_property
    def text_working_bytes(self) -> int:
        """Of what text encoders compute beside their weights."""
        return TEXT_STATES * self.model.architecture.text_row * BYTES[self.weights.dtype]

    @cached_property
    def shape(self) -> TransformerShape:
        shape = self.model.architecture.shape
        return replace(shape, calls=self.calls or shape.calls)

    def share(
        self, placement: Placement, hosts: int, shares: Shares, place: int
    ) -> OwnShare | None:
        """That of the host at `place` of the ring; None where all have the same."""
        if shares.are_even:
            return None
        if placement == "sequence":
            runs = TokenRuns.of(self.tokens, hosts, shares)
            return OwnShare(runs.counts[place], runs.longest)
        heads, columns = shares.heads, shares.columns
        return OwnShare(heads=heads[place] / sum(heads), columns=columns[place] / sum(columns))

    def weights_part(self, share: OwnShare | None) -> float | None:
        """Of what `tensor` splits of the weights, the part that such a host holds."""
        if share is None:
            return None
        weights = self.weights
        columns = self.model.architecture.column_part(weights.dtype, weights.bits)
        return columns * share.columns + (1 - columns) * share.heads

    def sent_a_step(self, placement: Placement, hosts: int, shares: Shares = EVEN) -> int:
        """Bytes that each host sends in a step: all-gathers of K and V, or ring reductions."""
        if placement == "data" or hosts < 2:
            return 0
        each = self.collective_bytes(placement, hosts, shares)
        if placement == "sequence":
            return self.shape.collectives(placement) * (hosts - 1) * each
        return math.ceil(self.shape.collectives(placement) * 2 * (hosts - 1) * each / hosts)

    def collective_bytes(self, placement: Placement, hosts: int, shares: Shares = EVEN) -> int:
        """Of the array that each host gives to one collective: its K and V, or a part of a sum."""
        row = self.shape.hidden_size * BYTES[self.weights.dtype]
        if placement == "data":
            return 0
        if placement == "sequence":
            # Gathers take equal shapes: every host's tokens are padded to the most that one has.
            return 2 * TokenRuns.of(self.tokens, hosts, shares).longest * row
        return self.tokens * row

    @cached_property
    def beside_gathers(self) -> tuple[tuple[int, float], ...]:
        """(blocks, the part of such a block's arithmetic that needs no keys of other hosts)."""
        return tuple(self.shape.beside_gathers(self.tokens))

    def sent_a_request(self, placement: Placement, hosts: int) -> int:
        """Bytes beside the steps': what `tensor` splits of the modulations is gathered, once."""
        if placement != "tensor" or hosts < 2:
            return 0
        shape = self.shape
        whole = self.steps * shape.calls * shape.split_modulations * BYTES[self.weights.dtype]
        return math.ceil(whole * (hosts - 1) / hosts)

    def memory(
        self,
        placement: Placement,
        hosts: int,
        shards: int,
        platform: Platform = "cuda",
        share: OwnShare | None = None,
    ) -> Phases:
        """Bytes on one of `hosts` hosts whose engine holds 1/`shards` of the transformer.

        `share` is its own where not all hosts have the same.
        """
        if self.low_memory and placement == "tensor":  # which loads no more than it runs
            shards = hosts
        row = self.shape.hidden_size * BYTES[self.weights.dtype]
        working = self._working(placement, hosts, shards, platform, share)
        kept = 2 * self.remembered * self.shape.blocks * row  # keys and values, in all blocks
        if placement == "tensor":  # of this rank's heads
            kept = math.ceil(kept / hosts if share is None else kept * share.heads)
        part_held = self.weights_part(share) if shards > 1 else None
        transformer = self.transformer.on_each_of(shards, part_held)
        decode = self.autoencoder_bytes + self._decode_bytes(platform)
        # Whoever encodes pictures keeps what it did that with.
        extra = self.autoencoder_bytes if self.preload or self.encoded_pixels else 0
        if self.low_memory:  # the modulation weights, then the others, then the autoencoder
            modulation = math.ceil(self.modulation_bytes / shards)
            if share is not None and shards > 1:
                modulation = math.ceil(self.modulation_bytes * share.heads)
            least = max(modulation, transformer - modulation + working + kept)
            return Phases(least + extra, decode)
        return Phases(transformer + working + kept + extra, decode + transformer + kept)

    def _working(
        self,
        placement: Placement,
        hosts: int,
        shards: int,
        platform: Platform,
        share: OwnShare | None,
    ) -> int:
        """Bytes that a step takes beside weights, and beside what is remembered."""
        row = self.shape.hidden_size * BYTES[self.weights.dtype]
        states = CPU_STATES if platform == "cpu" else STATES
        states += WIDE_STATES if self.weights.dtype == "float16" else 0
        tokens = max(self.tokens, self.remembered)  # those of a step, or of references before it
        part = 1.0  # of the attention weights
        if placement == "sequence" and share is not None:
            # K and V, whole: as they were gathered, without what filled them up, and turned
            own, longest = (math.ceil(n * tokens / self.tokens) for n in share[:2])
            every = 2 * longest * hosts + 4 * tokens
            working, part = (states * own + every) * row, own / tokens
        elif placement == "sequence":
            own = math.ceil(tokens / hosts)
            # K and V, whole, twice
            working, part = states * own * row + 4 * own * hosts * row, own / tokens
        elif placement == "tensor":
            part = 1 / hosts if share is None else max(share.heads, share.columns)
            working = math.ceil((states - SPLIT_STATES + SPLIT_STATES * part) * tokens * row)
            if shards < hosts:
                working += math.ceil(LENT_LINEARS * part * self._largest_split)
        else:
            working = states * tokens * row
        if platform == "cpu":
            scores = self.shape.num_heads * tokens * (self.tokens + self.remembered)
            working += math.ceil(SCORE_ARRAYS * part * scores * BYTES["float32"])
        return working

    @cached_property
    def _largest_split(self) -> int:
        """Bytes of the largest linear that `tensor` splits."""
        weights = self.weights
        return self.model.architecture.largest_split_bytes(weights.dtype, weights.bits)

    def encoding_memory(
        self, shards: int, platform: Platform, weights_part: float | None = None
    ) -> int:
        """Bytes on the one host that encodes the request's pictures, one after another; 0: none.

        Beside its part of the transformer, 1/`shards` or `weights_part` of what is split, which may
        be there from earlier requests and leaves in low memory alone.
        """
        if not self.encoded_pixels:
            return 0
        model, size = self.model.architecture, self._bytes_of_pixels(platform)
        largest = largest_of_encode(model, self.encoded_pixels, size)
        encode = self.autoencoder_bytes + decoding_bytes(largest, platform)
        if self.low_memory:
            return encode
        return encode + self.transformer.on_each_of(shards, weights_part)

    def _vision_bytes(self, dtype: str) -> int:
        return self.model.architecture.nbytes(("vision",), dtype, None) if self.added else 0

    def _nbytes(self, role: Role) -> int:
        return self.model.architecture.nbytes((role,), self.weights.dtype, self.weights.bits)

    def _decode_bytes(self, platform: Platform) -> int:
        size, batch = self._bytes_of_pixels(platform), min(self.decoding_batch_size, self.images)
        largest = largest_of_decode(self.model.architecture, self.height, self.width, size)
        return batch * decoding_bytes(largest, platform)

    def _bytes_of_pixels(self, platform: Platform) -> int:
        """Of a number of the autoencoder's activations: a CPU's convolutions are float32."""
        return BYTES["float32" if platform == "cpu" else self.weights.dtype]


def tensor_problem(work: Workload, hosts: int, shares: Shares = EVEN) -> str:
    """Why `tensor` can't split this model over so many hosts, in these shares; "" where it can."""
    return work.model.architecture.partition.obstacle(hosts, work.is_quantized, shares) or ""


def split_tokens(tokens: int, hosts: int, shares: Shares = EVEN) -> tuple[int, ...]:
    """Tokens of each rank under `sequence`, without what fills up the last ones."""
    return TokenRuns.of(tokens, hosts, shares).own


def _resident(architecture: Architecture, dtype: str, bits: int | None) -> Resident:
    """Blocks, and modulations where they are cut, are split; the rest each host keeps."""
    split = architecture.split_bytes(dtype, bits)
    return Resident(split, architecture.nbytes(("modulator", "denoiser"), dtype, bits) - split)

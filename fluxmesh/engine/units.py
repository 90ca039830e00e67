"""The units of work beside the painting: load, read a prompt or a picture, decode.

Each is a generator of its reports. What stays in memory is told in `worker.py`.
"""

from __future__ import annotations

import time

import mlx.core as mx
import numpy as np

from fluxmesh.cluster.snapshot import Holding, ModelVariant
from fluxmesh.engine import features
from fluxmesh.engine.residency import READER
from fluxmesh.engine.state import EngineState, Reports
from fluxmesh.models.partition import Shard
from fluxmesh.request import SourceImage
from fluxmesh.wire import messages
from fluxmesh.wire.messages import Decode, Encode, EncodePictures, EncodeSource, Load


def load(engine: EngineState, work: Load) -> Reports:
    """What the work names, or the transformer; what is there already takes no time."""
    start = time.perf_counter()
    engine.open(work.weights)
    engine.model.low_memory = work.low_memory
    if not work.text_stays:
        engine.model.reload_text_encoders()
    with engine.meter.phase("load"):
        for component in work.components or ("transformer",):
            if component == "transformer":
                engine.hold(Shard(work.shard, work.shards, work.shares))
                if work.low_memory:  # the modulation weights come first, with an image
                    continue
            yield from engine.loading(work, component)
    holding = engine.holding or Holding(
        weights=work.weights,
        nbytes=0,
        shards=work.shards,
        shard=work.shard,
        content=engine.content,
        shares=work.shares,
    )
    yield messages.Loaded(
        job=work.job,
        ring_generation=work.ring_generation,
        holding=holding,
        seconds=time.perf_counter() - start,
    )


def encode(engine: EngineState, work: Encode) -> Reports:
    """A prompt's features; encoders load only for one that is not remembered."""
    engine.doing = "reading the prompt"
    pipeline = engine.open(work.weights)
    pipeline.t5_padding = work.t5_padding
    pipeline.by_layers = work.by_layers
    cached = pipeline.remembers(work.prompt, work.negative)
    with engine.meter.phase("text"):
        start = time.perf_counter()
        if not cached:
            if work.makes_room:
                engine.drop_transformer()
            if not pipeline.reads_by_layers:
                yield from engine.loading(work, "text encoders")
            start = time.perf_counter()
        engine.begin("encoding", "encode")
        text = pipeline.encode(work.prompt, work.negative)
        engine.quiet = ""
        if not work.stay or (work.makes_room and not cached):
            pipeline.reload_text_encoders()
        seconds = time.perf_counter() - start
        engine.count(encodes=0 if cached else 1)
        named = features.to_arrays(text)
        peak = engine.meter.now("text")
    yield messages.TextEncoded(
        job=work.job,
        ring_generation=work.ring_generation,
        seconds=seconds,
        cached=cached,
        peak_bytes=peak,
        content=engine.content,
        revision=pipeline.checkpoint.revision,
        cut=pipeline.cut(work.prompt),
        negative_cut=None if work.negative is None else pipeline.cut(work.negative),
        features=named,
    )


def encode_source(engine: EngineState, work: EncodeSource) -> Reports:
    """The latents of a picture that the image begins from."""
    pipeline = engine.open(work.weights)
    pipeline.architecture.check_picture("source", work.pixels)
    _make_room(engine, work)
    with engine.meter.phase("text"):
        yield from engine.loading(work, "autoencoder")
        engine.doing = "encoding the picture"
        engine.begin("encoding", "encode")
        source = pipeline.encode_source(SourceImage(work.pixels))
        engine.quiet = ""
    yield messages.SourceEncoded(
        job=work.job,
        ring_generation=work.ring_generation,
        content=engine.content,
        latents=np.array(source.clean),
    )


def encode_pictures(engine: EngineState, work: EncodePictures) -> Reports:
    """What the denoiser reads of the pictures beside the prompt."""
    pipeline = engine.open(work.weights)
    if work.reader:
        pipeline.read_references_with(engine.options.locate(ModelVariant(work.reader)).model)
    reads_apart = bool(pipeline.architecture.of_role("vision"))
    pipeline.architecture.check_pictures(work.named)
    if not reads_apart or engine.missing(READER):
        _make_room(engine, work)
    with engine.meter.phase("text"):
        yield from engine.loading(work, READER if reads_apart else "autoencoder")
        engine.doing = "encoding the pictures"
        engine.begin("encoding", "encode")
        made = pipeline.encode_pictures(work.named, work.strengths)
        engine.quiet = ""
        if reads_apart and not work.stay:
            del pipeline.vision
        engine.count(pictures=len(work.named))
    reader = pipeline.reader if reads_apart else None
    yield messages.PicturesEncoded(
        job=work.job,
        ring_generation=work.ring_generation,
        content=engine.content,
        reader="" if reader is None else reader.content,
        conditions=features.to_arrays(made),
    )


def _make_room(engine: EngineState, work: EncodeSource | EncodePictures) -> None:
    """What is not to be there while pictures are encoded leaves."""
    if work.makes_room:
        engine.drop_transformer()
    if not work.text_stays:
        engine.model.reload_text_encoders()


def decode(engine: EngineState, work: Decode) -> Reports:
    """Pictures of latents; in low memory, after the transformer has left, and what steps share."""
    pipeline = engine.open(work.weights)
    engine.check_latents(work.latents, work)
    if pipeline.low_memory:
        engine.drop_transformer()
        engine.plan = None
    with engine.meter.phase("decode"):
        yield from engine.loading(work, "autoencoder")
        if engine.options.stopping():
            return
        engine.doing = "decoding"
        engine.begin("decoding", "decode")
        start = time.perf_counter()
        with pipeline.bounded_pixels(work.height, work.width, len(work.images)):
            pixels = pipeline.pixels(mx.array(work.latents), engine.latent_size(work))
        engine.quiet = ""
        seconds = (time.perf_counter() - start) / len(pixels)
        engine.count(decodes=len(pixels))
        peak = engine.meter.now("decode")
    for image, picture in zip(work.images, pixels, strict=True):
        yield messages.Pictured(
            job=work.job,
            ring_generation=work.ring_generation,
            image=image,
            seconds=seconds,
            peak_bytes=peak,
            pixels=picture,
        )

"""Text encoders apart from the denoiser: bits of their own, layers one at a time, who stays."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from fluxmesh.cluster.snapshot import ModelVariant, prompt_mark
from fluxmesh.engine.pipeline import FluxPipeline
from fluxmesh.engine.worker import Worker
from fluxmesh.errors import UsageError, WeightsError
from fluxmesh.weights import hub, loading
from fluxmesh.weights.quantize import quantize_checkpoint
from fluxmesh.wire import messages
from fluxmesh.wire.messages import Encode, Load
from tests.checkpoints import make_checkpoint
from tests.flux2_checkpoint import Kind, make_flux2
from tests.numerics.units import HEAD, only


@pytest.fixture(scope="module")
def flux1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("flux1"), guidance=True).path


@pytest.fixture(scope="module")
def klein(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_flux2(tmp_path_factory.mktemp("klein") / "made")


def bits_of(model: Any) -> set[int]:
    """Of a model's quantized linears; none of a plain one."""
    return {m.bits for _, m in model.named_modules() if isinstance(m, nn.QuantizedLinear)}


def encoded(worker: Worker, weights: ModelVariant, **keys: Any) -> messages.TextEncoded:
    work = Encode(**HEAD, weights=weights, **{"prompt": "a cat", **keys})
    (report,) = only(worker, work, messages.TextEncoded)
    return report


def same(a: messages.TextEncoded, b: messages.TextEncoded) -> bool:
    return a.features.keys() == b.features.keys() and all(
        np.array_equal(a.features[name], b.features[name]) for name in a.features
    )


# Bits


@pytest.mark.parametrize("family", ["flux1", "klein"])
def test_text_encoders_have_bits_of_their_own(family: str, request: pytest.FixtureRequest) -> None:
    name = str(request.getfixturevalue(family))
    for bits, text_bits, expected in ((None, 4, 4), (4, 8, 8), (8, None, 8)):
        pipeline = FluxPipeline(name, bits=bits, text_bits=text_bits)
        encoder = pipeline.text_model(pipeline.runtime.text_models[0])
        assert bits_of(encoder) == {expected}
        assert bits_of(pipeline.flow) == ({bits} if bits else set())
    with pytest.raises(UsageError, match="text_bits is 7"):
        FluxPipeline(name, text_bits=7)


@pytest.mark.parametrize("family", ["flux1", "klein"])
def test_a_quantized_folder_keeps_the_bits_of_its_text_encoders(
    family: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    source = hub.resolve(str(request.getfixturevalue(family)))
    quantize_checkpoint(source, tmp_path / "both", 4)
    quantize_checkpoint(source, tmp_path / "own", 4, text_bits=8)
    both, own = (hub.resolve(str(tmp_path / name)) for name in ("both", "own"))
    assert ((both.bits, both.text_bits), (own.bits, own.text_bits)) == ((4, None), (4, 8))
    manifest = json.loads((tmp_path / "both" / "fluxmesh.json").read_text())
    assert manifest["quantization"] == {"bits": 4}  # as it always was
    loading.verify(own)
    assert own.content != both.content
    while_loading = FluxPipeline(source.name, bits=4, text_bits=8)
    stored = FluxPipeline(own.name)
    for one, other in ((while_loading, stored), (FluxPipeline(own.name, bits=4), stored)):
        assert np.array_equal(
            *(
                np.array(next(iter(flux.encode("a cat").values())).astype(mx.float32))
                for flux in (one, other)
            )
        )
    name = stored.runtime.text_models[0]
    for folder, text_bits, has in ((both, 8, 4), (own, 4, 8)):
        with pytest.raises(UsageError, match=f"stored in {has} bits; leave `text_bits` out"):
            FluxPipeline(folder.name, text_bits=text_bits).text_model(name)
    with pytest.raises(UsageError, match="text_bits"):
        quantize_checkpoint(source, tmp_path / "no", 4, text_bits=7)
    damaged = manifest | {"quantization": {"bits": 4, "text_bits": "8"}}
    (tmp_path / "both" / "fluxmesh.json").write_text(json.dumps(damaged))
    with pytest.raises(WeightsError, match="says '8' bits"):
        hub.resolve(str(tmp_path / "both"))


def test_other_bits_of_text_read_the_prompt_again_and_leave_the_denoiser(klein: Path) -> None:
    worker = Worker()
    plain, four = (ModelVariant(str(klein), text_bits=bits) for bits in (None, 4))
    list(worker.do(Load(**HEAD, weights=plain)))
    flow = worker.model.flow
    first = encoded(worker, plain)
    other = encoded(worker, four)
    assert worker.model.flow is flow
    assert not other.cached and not same(first, other)
    assert worker.holding is not None and worker.holding.weights == four
    again = encoded(worker, plain)
    assert again.cached and same(first, again)


# Layer by layer


@pytest.mark.parametrize("kind", ["klein", "base", "dev"])
@pytest.mark.parametrize("bits", [None, 4])
def test_a_text_read_layer_by_layer_is_the_same_to_the_bit(
    kind: Kind, bits: int | None, tmp_path: Path
) -> None:
    weights = ModelVariant(str(make_flux2(tmp_path / "made", kind)), text_bits=bits)
    whole = encoded(Worker(), weights)
    worker = Worker()
    progress: list[tuple[int, int]] = []
    worker.options.hear = lambda event: progress.append((event.done_bytes, event.total_bytes))
    layered = encoded(worker, weights, by_layers=True)
    assert same(whole, layered)
    assert not worker.model.is_loaded("text_encoder")
    assert worker.text_holding is not None and worker.text_holding.nbytes == 0
    assert encoded(worker, weights).cached
    done = [read for read, _ in progress]
    total = {total for _, total in progress}
    assert done == sorted(done) and total == {done[-1]}, "all of it is read, once"


def test_no_more_than_a_layer_is_in_memory_at_once(tmp_path: Path) -> None:
    folder = make_flux2(tmp_path / "made")
    peaks = {}
    for by_layers in (False, True):
        worker = Worker()
        encoded(worker, ModelVariant(str(folder), "float32"), by_layers=by_layers)  # compiles
        encoder = worker.model.file_bytes("text_encoder")
        del worker
        gc.collect()
        mx.clear_cache()
        worker, before = Worker(), mx.get_active_memory()
        mx.reset_peak_memory()
        encoded(worker, ModelVariant(str(folder), "float32"), by_layers=by_layers)
        peaks[by_layers] = mx.get_peak_memory() - before
        del worker
    assert peaks[False] - peaks[True] > 0.8 * encoder


def test_a_family_that_reads_texts_as_a_whole_does_so(flux1: Path) -> None:
    weights = ModelVariant(str(flux1), "float32")
    assert same(encoded(Worker(), weights), encoded(Worker(), weights, by_layers=True))


# Who stays


def test_what_is_held_for_prompts_is_told(flux1: Path) -> None:
    worker, weights = Worker(), ModelVariant(str(flux1), "float32")
    assert worker.text_holding is None
    encoded(worker, weights)
    text = worker.text_holding
    assert text is not None and text.serves(weights) and text.nbytes > 0
    assert text.prompts == (prompt_mark("a cat"),)
    list(worker.do(Load(**HEAD, weights=weights, text_stays=False)))
    assert worker.text_holding is not None and worker.text_holding.nbytes == 0
    assert encoded(worker, weights).cached
    assert worker.model.is_loaded("flow") and not worker.missing("transformer")


def test_a_denoiser_leaves_for_the_text_encoders_where_it_is_told_to(flux1: Path) -> None:
    worker, weights = Worker(), ModelVariant(str(flux1), "float32")
    list(worker.do(Load(**HEAD, weights=weights)))
    encoded(worker, weights, stay=False)
    assert worker.model.is_loaded("flow") and worker.missing("text encoders")
    encoded(worker, weights, prompt="two", stay=False, makes_room=True)
    assert not worker.model.is_loaded("flow") and worker.missing("text encoders")

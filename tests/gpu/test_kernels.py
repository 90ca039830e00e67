"""`make gpu`: kernels give what the plain forms do, and what is traced gives what is not."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from fluxmesh.kernels import ops
from fluxmesh.training.compute.loss import loss_and_gradient
from tests import fusing
from tests.trainings import asked, learner, make_place

FLUX = fusing.Shape(1, 1536, 512, 24, 128)
SHAPES = (FLUX, fusing.Shape(2, 77, 13, 3, 64), fusing.Shape(1, 33, 5, 2, 16))


def test_there_is_a_gpu() -> None:
    assert ops.device() != "cpu", "These tests are about GPUs, and MLX finds none here."


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", fusing.NAMES)
def test_kernels_compute_what_the_plain_forms_do(name: str, shape: fusing.Shape) -> None:
    case = fusing.make(name, shape, mx.float32)
    wanted = fusing.values_and_gradients(case.plain, case)
    assert fusing.worst(fusing.values_and_gradients(case.fused, case), wanted) < 3e-6
    # In bfloat16 a kernel rounds once, MLX's operations one after another: it is as near or nearer.
    narrow = fusing.make(name, shape, mx.bfloat16)
    truth = fusing.values_and_gradients(narrow.plain, narrow, mx.float32)
    outputs = fusing.values_and_gradients(narrow.fused, narrow)
    plain = fusing.values_and_gradients(narrow.plain, narrow)
    for output, other, wanted in zip(outputs, plain, truth, strict=True):
        bound = max(4e-3, 1.05 * fusing.worst([other], [wanted]))
        assert fusing.worst([output], [wanted]) < bound


@pytest.mark.timeout(600)  # CUDA's compiler takes minutes when nothing is on disk yet
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kept", [False, True])
def test_a_traced_gradient_is_the_one_that_is_not_and_repeats(tmp_path, dtype, kept) -> None:
    made = learner(
        asked(make_place(tmp_path), tmp_path, dtype=dtype, grad_checkpoint=kept, lora_dropout=0.3)
    )
    drawn = mx.random.normal((made.adapters.size,), key=mx.random.key(3))
    made.adapters.install(made.adapters.unflatten(0.2 * drawn))
    (part,) = made.plan.parts(3)
    keys = part.micro.dropout_keys(len(made.adapters.names))
    batch = made.batch(part)
    _, plain = loss_and_gradient(made.runtime, made.adapters, batch, made.request.guidance, keys)
    (_, traced), (_, repeated) = made.step(batch, keys), made.step(batch, keys)
    assert np.array_equal(np.array(traced), np.array(repeated))
    bound = 1e-5 if dtype == "float32" else 2e-2
    assert fusing.worst([np.array(traced)], [np.array(plain)]) < bound

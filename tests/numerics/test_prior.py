"""Prior preservation: pictures of what the model is to keep, beside those that it is taught."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from fluxmesh.errors import FluxmeshError
from fluxmesh.training.compute import exact_sum
from fluxmesh.training.compute.loss import loss_and_gradient
from fluxmesh.training.events import Prepared, Updated
from fluxmesh.training.run import read_examples
from tests.datasets import make_dataset
from tests.trainings import asked, final, learner, make_place, of, run


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    place = make_place(tmp_path_factory.mktemp("prior"))
    make_dataset(place / "dogs", sizes=((32, 32), (24, 48), (32, 32), (32, 32)))
    return place


def kept(place: Path, out: Path, **changed):
    return asked(place, out, **{"prior_folder": str(place / "dogs"), **changed})


def test_the_prior_s_loss_and_gradient_are_added_by_their_weight(place, tmp_path):
    made = learner(kept(place, tmp_path, prior_weight=0.25))
    made.adapters.install(
        made.adapters.unflatten(0.2 * mx.random.normal((made.adapters.size,), key=mx.random.key(1)))
    )
    number = next(n for n in range(9) if len(made.plan.parts(n)[0].items) == 2)
    shown, prior = made.plan.parts(number)
    assert (shown.weight, shown.images, prior.images) == (1.0, 2, 0)
    assert prior.weight == 0.25 * 2 / len(prior.items)
    assert not {image for image, _ in shown.items} & set(made.plan.priors)
    assert {image for image, _ in prior.items} <= set(made.plan.priors)
    loss, gradient = 0.0, np.zeros(made.adapters.size)
    for part in (shown, prior):
        keys = part.micro.dropout_keys(len(made.adapters.names))
        value, slope = loss_and_gradient(made.runtime, made.adapters, made.batch(part), 4.0, keys)
        loss += part.weight * value.item() / 2
        gradient += part.weight * np.array(slope) / 2
    total = exact_sum.read(made.total([number], 1))
    assert (total.images, total.bad) == (2, 0)
    assert total.loss == pytest.approx(loss, rel=1e-6)
    assert np.linalg.norm(np.array(total.gradient) - gradient) <= 1e-6 * np.linalg.norm(gradient)


def test_the_pictures_that_are_taught_come_as_without_a_prior(place, tmp_path):
    with_it, without = learner(kept(place, tmp_path)).plan, learner(asked(place, tmp_path)).plan
    for number in range(12):
        (alone,), (shown, prior) = without.parts(number), with_it.parts(number)
        assert shown.items == alone.items and shown.captions == alone.captions
        drawn = [part.micro.noise(4, 4).tobytes() for part in (alone, shown, prior)]
        assert drawn[0] == drawn[1] != drawn[2]
        assert (shown.micro.times == alone.micro.times).all()
        assert shown.micro.number != prior.micro.number
    every = {item for number in range(40) for item in with_it.parts(number)[1].items}
    assert len(every) == 4 * 2, "each crop of each picture gets its turn"


def test_a_prior_without_weight_is_the_same_as_none(place, tmp_path):
    run(asked(place, tmp_path / "none"))
    run(kept(place, tmp_path / "weightless", prior_weight=0.0))
    events = run(kept(place, tmp_path / "kept"))
    assert final(tmp_path / "none") == final(tmp_path / "weightless") != final(tmp_path / "kept")
    (prepared,) = of(events, Prepared)
    assert (prepared.images, prepared.priors) == (3, 4)
    assert {event.images for event in of(events, Updated)} <= set(range(4, 9)), "of those taught"


def test_the_trigger_and_what_is_held_out_are_the_data_set_s_alone(place, tmp_path):
    request = kept(place, tmp_path, trigger="sks", validation=2)
    examples, _ = read_examples(request)
    assert [e.caption.startswith("sks") for e in examples] == [True] * 3 + [False] * 4
    plan = learner(dataclasses.replace(request, trigger="")).plan
    assert len(plan.held_out) == 2 and not set(plan.held_out) & set(plan.priors)


def test_a_resume_without_the_prior_is_refused(place, tmp_path):
    run(kept(place, tmp_path, iterations=4))
    with pytest.raises(FluxmeshError, match="pictures or captions have changed"):
        run(asked(place, tmp_path, iterations=4, resume=True))

"""What a checkpoint says of itself as its name is resolved: sizes, defaults, revision, content."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fluxmesh.errors import (
    NotFetchedError,
    WeightsError,
)
from fluxmesh.weights import hub
from fluxmesh.weights.checkpoint import from_folder
from tests.checkpoints import make_checkpoint
from tests.unit.hub.caches import COMMIT, cached, edit


@pytest.mark.parametrize("guidance", [False, True])
@pytest.mark.parametrize("layout", ["diffusers", "bfl"])
def test_every_size_is_read_from_either_layout(tmp_path, layout, guidance):
    made = make_checkpoint(tmp_path, layout=layout, guidance=guidance)
    checkpoint = hub.resolve(str(made.path))
    assert checkpoint.architecture.transformer == made.transformer
    assert checkpoint.architecture.t5 == made.t5
    assert checkpoint.architecture.clip == made.clip
    assert checkpoint.architecture.autoencoder == made.autoencoder
    assert checkpoint.architecture.schedule == made.schedule
    assert checkpoint.kind == layout
    assert checkpoint.bits is None


def test_a_guided_model_takes_many_steps_and_a_distilled_one_few(tmp_path):
    steps = {}
    for guidance in (False, True):
        made = make_checkpoint(tmp_path / str(guidance), layout="bfl", guidance=guidance)
        defaults = hub.resolve(str(made.path)).defaults
        assert (defaults.height, defaults.width, defaults.guidance) == (512, 512, 4.0)
        steps[guidance] = defaults.steps
    assert steps == {False: 4, True: 50}


@pytest.mark.parametrize(
    ("guidance", "declared", "length"),
    [(False, 512, 256), (True, 512, 512), (False, 32, 32), (True, 32, 32), (False, 10**30, 256)],
)
def test_prompts_are_as_long_as_the_tokenizer_says_and_256_at_most_for_schnell(
    tmp_path, guidance, declared, length
):
    make_checkpoint(tmp_path, guidance=guidance, t5_max_length=declared)
    assert hub.resolve(str(tmp_path)).defaults.t5_max_length == length


def test_a_value_that_a_config_leaves_null_is_the_usual_one(tmp_path):
    make_checkpoint(tmp_path)
    expected = hub.resolve(str(tmp_path))
    edit(tmp_path / "transformer" / "config.json", guidance_embeds=None)
    edit(tmp_path / "scheduler" / "scheduler_config.json", base_shift=None, shift_terminal=None)
    edit(tmp_path / "vae" / "config.json", latents_mean=None, mid_block_add_attention=None)
    nulls = hub.resolve(str(tmp_path))
    assert nulls.architecture == expected.architecture
    edit(tmp_path / "transformer" / "config.json", num_layers=None)
    with pytest.raises(WeightsError, match="lacks 'num_layers'"):
        hub.resolve(str(tmp_path))


def test_the_revision_of_a_folder_changes_with_its_weights(tmp_path):
    first = make_checkpoint(tmp_path / "a", seed=1)
    again = make_checkpoint(tmp_path / "b", seed=1)
    other = make_checkpoint(tmp_path / "c", seed=2)
    a, b, c = (hub.resolve(str(made.path)).revision for made in (first, again, other))
    assert a == b != c
    assert a.startswith("local-")


def test_the_revision_of_a_hub_model_is_its_commit(empty_cache):
    cached(empty_cache, "someone/paints")
    assert hub.resolve("someone/paints", download=False).revision == COMMIT


def test_content_tells_models_apart_and_knows_a_copy(tmp_path: Path) -> None:
    made = make_checkpoint(tmp_path / "one", seed=1).folder
    copy = shutil.copytree(made, tmp_path / "elsewhere")
    (copy / "transformer" / "notes.json").write_text("{}")
    other = make_checkpoint(tmp_path / "two", seed=2).folder
    original = from_folder(made, "m")
    again = from_folder(copy, "m", revision="a" * 40)
    assert original.content == again.content and original.revision != again.revision
    assert from_folder(other, "m").content != original.content
    spiece = copy / "tokenizer_2" / "spiece.model"
    spiece.write_bytes(spiece.read_bytes()[:-1] + b"x")
    assert from_folder(copy, "m").content != original.content
    config = made / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_shift": 0.25}))
    assert from_folder(made, "m").content != original.content


@pytest.mark.parametrize("below", ["", "snapshots", f"snapshots/{COMMIT}"])
def test_a_path_into_the_hubs_cache_is_a_model(tmp_path, below):
    """Of any cache, also one on another disk."""
    snapshot = cached(tmp_path / "elsewhere", "someone/paints")
    repository = snapshot.parent.parent
    checkpoint = hub.resolve(str(repository / below))
    assert checkpoint.revision == COMMIT
    assert checkpoint.tokenizers["clip"].parent == snapshot.resolve()
    assert hub.full_name(str(repository)) == str(repository)


def test_a_path_into_the_hubs_cache_needs_no_main(tmp_path):
    """A model that was fetched at a revision of its own has no `refs/main`."""
    snapshot = cached(tmp_path / "elsewhere", "someone/paints")
    repository = snapshot.parent.parent
    shutil.rmtree(repository / "refs")
    assert hub.resolve(str(repository)).revision == COMMIT
    shutil.copytree(snapshot, snapshot.with_name("f" * 40))
    with pytest.raises(NotFetchedError, match="models pull someone/paints"):
        hub.resolve(str(repository))


def test_resolving_imports_neither_mlx_nor_the_hubs_library(tmp_path):
    make_checkpoint(tmp_path)
    program = (
        "import sys; from fluxmesh.weights import hub; hub.resolve(sys.argv[1]); hub.list_models();"
        "print([m for m in ('mlx', 'torch', 'huggingface_hub') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"

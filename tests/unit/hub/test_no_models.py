"""What is no model, or none that can be used, and how that is told."""

from __future__ import annotations

import dataclasses

import pytest

from fluxmesh.errors import (
    IncompleteModelError,
    ModelNotFoundError,
    NotFetchedError,
    WeightsError,
)
from fluxmesh.storage.safetensors import read_header, read_tensor
from fluxmesh.weights import hub
from tests import checkpoints
from tests.checkpoints import make_checkpoint
from tests.unit.hub.caches import cached, edit


def test_a_file_of_another_kind_is_refused(tmp_path):
    file = tmp_path / "flux.ckpt"
    file.write_bytes(b"pickle")
    with pytest.raises(ModelNotFoundError, match="no other format"):
        hub.resolve(str(file))


def test_a_folder_that_is_no_model_is_refused(tmp_path):
    with pytest.raises(ModelNotFoundError, match=r"model_index\.json"):
        hub.resolve(str(tmp_path))


@pytest.mark.parametrize(
    "missing",
    [
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
        "text_encoder/config.json",
        "text_encoder_2/model.safetensors",
        "vae/config.json",
        "scheduler/scheduler_config.json",
        "tokenizer/vocab.json",
        "tokenizer/merges.txt",
        "tokenizer_2/spiece.model",
    ],
)
def test_a_folder_that_lacks_a_file_says_which_folder_or_file(tmp_path, missing):
    make_checkpoint(tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(IncompleteModelError, match=missing.split("/")[0]) as caught:
        hub.resolve(str(tmp_path))
    assert "models pull" not in str(caught.value)  # which would not mend a folder of the user's


def test_a_model_of_the_hub_that_lacks_files_is_completed_by_pull(empty_cache):
    (cached(empty_cache, "someone/paints") / "tokenizer" / "vocab.json").unlink()
    with pytest.raises(NotFetchedError, match="fluxmesh models pull someone/paints") as caught:
        hub.resolve("someone/paints", download=False)
    assert "tokenizer/vocab.json" in str(caught.value)


def test_a_part_of_a_folder_is_told_by_the_folder_above(tmp_path):
    made = make_checkpoint(tmp_path)
    with pytest.raises(ModelNotFoundError, match="name the folder above"):
        hub.resolve(str(made.folder / "transformer"))


def test_weights_that_another_library_quantized_are_told_by_its_name(tmp_path):
    make_checkpoint(tmp_path)
    edit(tmp_path / "transformer" / "config.json", quantization_config={"quant_method": "quanto"})
    with pytest.raises(ModelNotFoundError, match="quantized by quanto"):
        hub.resolve(str(tmp_path))


@pytest.mark.parametrize("pipeline", ["StableDiffusionPipeline", "Flux3Pipeline", None])
def test_another_family_of_models_is_refused_by_name(tmp_path, pipeline):
    make_checkpoint(tmp_path)
    edit(tmp_path / "model_index.json", _class_name=pipeline)
    with pytest.raises(ModelNotFoundError, match=str(pipeline)):
        hub.resolve(str(tmp_path))


def test_a_model_of_an_unknown_input_is_refused_because_of_its_channels(tmp_path):
    make_checkpoint(tmp_path)
    config = tmp_path / "transformer" / "config.json"
    edit(config, in_channels=96, out_channels=64)
    with pytest.raises(WeightsError, match="takes 96 channels"):
        hub.resolve(str(tmp_path))


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"in_channels": 64}', '{"num_layers": null}'])
def test_a_broken_config_is_refused_by_name(tmp_path, text):
    make_checkpoint(tmp_path)
    (tmp_path / "transformer" / "config.json").write_text(text)
    with pytest.raises(WeightsError, match=r"transformer.config\.json"):
        hub.resolve(str(tmp_path))


def test_an_autoencoder_of_another_model_is_told_as_such(tmp_path):
    make_checkpoint(tmp_path)
    edit(tmp_path / "vae" / "config.json", latent_channels=1)
    with pytest.raises(WeightsError, match="autoencoder of .* has 1 channels.* two models"):
        hub.resolve(str(tmp_path))


def test_a_single_file_of_another_model_is_refused(tmp_path):
    made = make_checkpoint(tmp_path, layout="bfl")
    checkpoints.write_safetensors(made.path, {"unet.conv_in.weight": checkpoints.np.ones((4, 4))})
    with pytest.raises(WeightsError, match="not a FLUX transformer"):
        hub.resolve(str(made.path))


def test_a_file_with_a_block_missing_in_its_middle_is_refused(tmp_path):
    """A count of what is there without a gap would paint with the blocks before it alone."""
    made = make_checkpoint(
        tmp_path,
        layout="bfl",
        transformer=dataclasses.replace(checkpoints.TRANSFORMER, depth_single_blocks=3),
    )
    entries = read_header(made.path).entries
    assert hub.resolve(str(made.path)).architecture.transformer.depth_single_blocks == 3
    arrays = {
        key: read_tensor(entry) for key, entry in entries.items() if "single_blocks.1." not in key
    }
    checkpoints.write_safetensors(made.path, arrays)
    with pytest.raises(WeightsError, match=r"lacks single_blocks\.1\.linear1\.weight and has what"):
        hub.resolve(str(made.path))

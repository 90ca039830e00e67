"""What a folder must hold, by names alone: variants, shards, other formats, what is missing."""

from __future__ import annotations

import pytest

from fluxmesh.models.flux1.family import FLUX1
from fluxmesh.weights.folder_files import WeightNames, files_of, weight_names

CONFIGS = [
    "model_index.json",
    "scheduler/scheduler_config.json",
    *(f"{part}/config.json" for part in ("transformer", "text_encoder", "text_encoder_2", "vae")),
]
FORM = FLUX1.folder
TOKENIZERS = ["tokenizer/vocab.json", "tokenizer/merges.txt", "tokenizer_2/spiece.model"]
WEIGHTS = [
    "transformer/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
    "text_encoder_2/model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
]
WHOLE = [*CONFIGS, *TOKENIZERS, *WEIGHTS]


@pytest.mark.parametrize(
    ("names", "files", "index"),
    [
        (["model.safetensors"], ("model.safetensors",), None),
        (["model.sft"], ("model.sft",), None),
        (["model.fp16.safetensors"], ("model.fp16.safetensors",), None),
        (["model.fp16.safetensors", "model.safetensors"], ("model.safetensors",), None),
        (["model.fp16.safetensors", "model.bf16.safetensors"], ("model.bf16.safetensors",), None),
        (["model.non_ema.safetensors"], ("model.non_ema.safetensors",), None),
        (["model.fp16.sft"], ("model.fp16.sft",), None),
        (["._model.safetensors"], None, None),
        (["other.safetensors"], None, None),
        (["pytorch_model.bin"], None, None),
        (
            ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
            ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
            None,
        ),
        (["model-00001-of-00002.safetensors"], None, None),
        (
            ["model-00001.safetensors", "model-00002.safetensors", "model.safetensors.index.json"],
            ("model-00001.safetensors", "model-00002.safetensors"),
            "model.safetensors.index.json",
        ),
        (["10.safetensors", "9.safetensors"], ("9.safetensors", "10.safetensors"), None),
        (
            ["0.safetensors", "1.safetensors", "model.safetensors.index.json"],
            ("0.safetensors", "1.safetensors"),
            "model.safetensors.index.json",
        ),
    ],
)
def test_weights_are_found_by_name(names, files, index) -> None:
    found_names = weight_names(names)
    assert found_names == (None if files is None else WeightNames(files, index))


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("stem", ["model", "diffusion_pytorch_model"])
def test_shards_of_a_variant_are_found_as_any_year_spelled_them(stem: str, late: bool) -> None:
    index = f"{stem}.safetensors.index.fp16.json"
    shards = tuple(
        f"{stem}-0000{i}-of-00002.fp16.safetensors"
        if late
        else f"{stem}.fp16-0000{i}-of-00002.safetensors"
        for i in (1, 2)
    )
    assert weight_names([index, *shards]) == WeightNames(shards, index)
    assert weight_names([index, shards[0]]) == WeightNames(shards[:1], index, shards[1:])
    plain = f"{stem}.safetensors"
    assert weight_names([index, *shards, plain]) == WeightNames((plain,))


def test_a_whole_folder_lacks_nothing_and_small_files_come_first() -> None:
    files = files_of([*WHOLE, "README.md", "flux1-dev.safetensors", "vae/other.bin"], FORM)
    assert files.missing == ()
    assert set(files.names) == set(WHOLE)
    assert files.names[-len(WEIGHTS) :] == tuple(WEIGHTS)


@pytest.mark.parametrize("name", WHOLE)
def test_each_file_that_is_missing_is_named(name: str) -> None:
    missing = files_of([other for other in WHOLE if other != name], FORM).missing
    assert len(missing) == 1
    folder, _, file = name.rpartition("/")
    assert folder in missing[0]
    if not name.endswith(".safetensors"):
        assert file in missing[0]


@pytest.mark.parametrize("name", ["tokenizer", "tokenizer_2"])
def test_a_tokenizer_json_stands_for_the_older_files(name: str) -> None:
    names = [other for other in WHOLE if not other.startswith(f"{name}/")]
    files = files_of([*names, f"{name}/tokenizer.json"], FORM)
    assert files.missing == () and f"{name}/tokenizer.json" in files.small


def test_all_that_is_missing_is_told_at_once_and_pickles_by_their_name() -> None:
    names = [name for name in WHOLE if not name.startswith(("vae/", "tokenizer/"))]
    pickles = ["vae/._diffusion_pytorch_model.bin", "vae/diffusion_pytorch_model.bin"]
    missing = " ".join(files_of([*names, *pickles], FORM).missing)
    assert "._" not in missing
    assert "tokenizer/vocab.json and merges.txt (or tokenizer.json)" in missing
    assert "vae/config.json" in missing
    assert "diffusion_pytorch_model.bin, a pickle, which can run any program" in missing


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("diffusion_pytorch_model.safetensors.incomplete", "a download that has not ended"),
        ("diffusion_pytorch_model.safetensors.crdownload", "a download that has not ended"),
        (".diffusion_pytorch_model.safetensors.icloud", "iCloud"),
    ],
)
def test_what_waits_in_the_place_of_weights_is_told(name: str, said: str) -> None:
    names = [other for other in WHOLE if not other.startswith("vae/diff")]
    (missing,) = files_of([*names, f"vae/{name}"], FORM).missing
    assert missing.startswith("the weights in vae/") and name in missing and said in missing


def test_a_folder_that_mflux_saved_needs_no_config() -> None:
    names = [f"{name.rpartition('/')[0]}/0.safetensors" for name in WEIGHTS]
    files = files_of([*names, "tokenizer/tokenizer.json", "tokenizer_2/tokenizer.json"], FORM)
    assert files.is_mflux and files.missing == ()
    assert "the weights in vae/" in files_of([*names[:3], *TOKENIZERS], FORM).missing

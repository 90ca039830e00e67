"""`fluxmesh models` as a user runs it: list, pull without a network, quantize, use the result."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from fluxmesh.storage.safetensors import read_header
from tests.integration.conftest import Run


def test_the_list_names_what_can_be_asked_for(fluxmesh: Run) -> None:
    done = fluxmesh("models", "list", "--json")
    assert done.code == 0
    listed = {line["name"]: line for line in done.of("model")}
    klein = {f"klein-{kind}" for kind in ("4b", "9b", "9b-kv", "base-4b", "base-9b")}
    assert {"tiny", "schnell", "dev", "krea-dev", "flux2-dev", *klein} <= set(listed)
    assert not listed["schnell"]["usable"]
    assert listed["schnell"]["note"] == "not here"
    table = fluxmesh("models", "list")
    assert table.code == 0
    assert "here, default" in table.out
    assert "fluxmesh models pull" in table.out


def test_pulling_without_a_network_is_one_sentence(fluxmesh: Run) -> None:
    done = fluxmesh("models", "pull", "schnell")
    assert done.code == 1
    assert done.out == ""
    licence, error = done.err.splitlines()  # the terms first
    assert "Apache-2.0" in licence and "gated" in licence
    assert error.startswith("Error: ") and "HF_HUB_OFFLINE" in error
    assert "Traceback" not in done.err


def test_a_quantized_folder_paints(fluxmesh: Run, checkpoint: Path, tmp_path: Path) -> None:
    done = fluxmesh("models", "quantize", checkpoint, "small", "--bits", 8)
    assert done.code == 0
    assert "small" in done.out
    assert done.err == ""
    painted = fluxmesh("generate", "two dogs", "--model", "small", "--seed", 1, "--json")
    assert painted.code == 0, painted.err
    for command in (("generate", "two dogs"), ("plan",)):
        other = fluxmesh(*command, "--model", "small", "--bits", 4, "--json")
        assert other.code == 2  # and no recipe says bits that no weight has had
        assert "small is stored in 8 bits; leave --bits out" in other.of("error")[0]["message"]
    up = fluxmesh("up", "--local", 1, "--model", "small", "--bits", 4)
    assert up.code == 2 and "small is stored in 8 bits; leave --bits out" in up.err
    assert "Starting agents" not in up.err  # nothing is up that nobody could use
    again = fluxmesh("models", "quantize", checkpoint, "small", "--json")
    assert again.code == 1
    assert "exists already" in again.of("error")[0]["message"]


def test_a_model_is_checked_number_by_number(
    fluxmesh: Run, checkpoint: Path, tmp_path: Path
) -> None:
    """A single NaN of a large matrix, which loading may read past, is named with its file."""
    shutil.copytree(checkpoint, tmp_path / "model")
    done = fluxmesh("models", "check", "model")
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("model is sound: every number of ")
    sound = fluxmesh("models", "check", "model", "--json").of("sound")[0]
    total = sum(file.stat().st_size for file in (tmp_path / "model").rglob("*.safetensors"))
    assert (sound["name"], sound["bytes"]) == ("model", total)
    file = next((tmp_path / "model" / "text_encoder_2").glob("*.safetensors"))
    entry = next(
        entry for key, entry in read_header(file).entries.items() if key.endswith("wo.weight")
    )
    assert entry.dtype == "BF16"
    content = bytearray(file.read_bytes())
    content[entry.end - 2 : entry.end] = b"\xc0\x7f"
    file.write_bytes(content)
    done = fluxmesh("models", "check", "model")
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith("Error: ") and done.err.count("\n") == 1
    assert file.name in done.err and entry.key in done.err and "NaN" in done.err
    merges = tmp_path / "model" / "tokenizer" / "merges.txt"
    merges.write_text("version https://git-lfs.github.com/spec/v1\n")
    assert "merges.txt does not fit" in fluxmesh("models", "check", "model").err
    assert fluxmesh("models", "check", "nowhere/model.safetensors").code == 2


@pytest.mark.parametrize("bits", ["2", "16", "four"])
def test_other_bits_are_a_usage_error(fluxmesh: Run, checkpoint: Path, bits: str) -> None:
    done = fluxmesh("models", "quantize", checkpoint, "small", "--bits", bits)
    assert done.code == 2
    assert "--bits" in done.err


def test_a_damaged_source_is_refused_and_nothing_is_written(
    fluxmesh: Run, checkpoint: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken)
    file = next((broken / "vae").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1])
    done = fluxmesh("models", "quantize", "broken", "small")
    assert done.code == 1
    assert "truncated" in done.err
    assert not (tmp_path / "small").exists()


@pytest.mark.parametrize("command", ["generate", "plan", "up"])
def test_a_model_of_no_name_is_not_the_default(fluxmesh: Run, command: str) -> None:
    """As `--model "$MODEL"` says it where the shell's variable is not set."""
    words = ["a dog"] if command == "generate" else []
    done = fluxmesh(command, *words, "--model", "")
    assert done.code == 2
    assert "No model is called ''" in done.err and "Saved" not in done.out


def test_what_is_wrong_with_a_model_names_it_as_the_user_did(
    fluxmesh: Run, checkpoint: Path, tmp_path: Path
) -> None:
    model = tmp_path / "my models" / "flux"
    shutil.copytree(checkpoint, model)
    (file,) = (model / "vae").glob("*.safetensors")
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    (tmp_path / "my models" / "x.safetensors").write_bytes(b"Entry not found")
    for name, where, said in (
        ("my models/flux", f"my models/flux/vae/{file.name}", "a pointer of Git LFS"),
        ("my models/x.safetensors", "my models/x.safetensors", "begins 'Entry not found'"),
    ):
        for command in (["models", "check"], ["generate", "a dog", "-m"]):
            done = fluxmesh(*command, name)
            (sentence,) = (line for line in done.err.splitlines() if line.startswith("Error"))
            assert sentence.startswith(f"Error: {where} is ") and said in sentence
            assert done.code == 1 and str(tmp_path) not in done.err

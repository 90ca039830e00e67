"""What `fluxmesh generate` cannot do is told in a sentence, with an exit code."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.integration.conftest import Run
from tests.integration.generate.results import names


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((), "There is no prompt"),
        (("dog", "--image-size", "big"), "HEIGHTxWIDTH"),
        (("dog", "--steps", "0"), "--steps is 0"),
        (("dog", "--bits", "7"), "7"),
        (("dog", "--seed", "-1"), "--seed is -1"),
        (("dog", "--mask", "missing.png"), "missing.png"),
        (("dog", "--strength", "0.5"), "--strength says how to change --image"),
        (("dog", "--outpaint", "1,2"), "--outpaint"),
        (("dog", "-o", "picture.jpg"), "end it in .png"),
        (("dog", "--prompt-file", "-"), "give one of them"),
        (("--prompt-file", "missing.txt"), "missing.txt can't be read"),
        (("-",), "stdin holds no prompt"),
        (("--from", "missing.png"), "there is no such file"),
        (("dog", "--frobnicate"), "--frobnicate"),
        (("dog", "--low-memory", "--preload-models"), "exclude each other"),
    ],
)
def test_a_wrong_option_is_told_in_a_sentence_and_exits_2(
    fluxmesh: Run, checkpoint: Path, tmp_path: Path, arguments: tuple[str, ...], sentence: str
) -> None:
    done = fluxmesh("generate", *arguments, "--model", checkpoint)
    assert done.code == 2, done.err
    assert sentence in done.err
    assert "Traceback" not in done.err
    assert names(tmp_path) == []


def test_a_missing_model_is_told_in_a_sentence_to_people_and_programs(
    fluxmesh: Run, tmp_path: Path
) -> None:
    done = fluxmesh("generate", "dog", "--model", "nobody/nothing", "--json")
    assert done.code == 1
    assert done.err.startswith("Error: ") and done.err.count("\n") == 1
    (error,) = done.of("error")
    assert error["exit_code"] == 1
    assert error["message"] in done.err
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("option", "code"), [("--output", 1), ("--stepwise", 1), ("--adapter", 2), ("--model", 2)]
)
def test_a_path_that_can_not_be_is_a_sentence(
    fluxmesh: Run, checkpoint: Path, tmp_path: Path, option: str, code: int
) -> None:
    done = fluxmesh("generate", "dog", "--model", checkpoint, option, "x" * 300)
    assert done.code == code, done.err
    assert "Error: " in done.err and "Traceback" not in done.err
    assert names(tmp_path) == []


def test_an_adapter_that_is_missing_is_named(fluxmesh: Run, checkpoint: Path) -> None:
    done = fluxmesh("generate", "dog", "--model", checkpoint, "--adapter", "no.safetensors:0.5")
    assert done.code == 2
    assert "No adapter file no.safetensors" in done.err


def test_mlx_without_a_backend_is_told_with_what_to_install(
    fluxmesh: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on Linux without `[cpu]` or `[cuda]`: mlx is installed, and can't be imported."""
    (tmp_path / "bare" / "mlx").mkdir(parents=True)
    (tmp_path / "bare" / "mlx" / "__init__.py").touch()
    why = "libmlx.so: cannot open shared object file: No such file or directory"
    (tmp_path / "bare" / "mlx" / "core.py").write_text(f"raise ImportError({why!r})\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "bare"))
    remedy = "fluxmesh[cpu]" if sys.platform == "linux" else "pip install mlx"

    painted = fluxmesh("generate", "dogs", "--model", "tiny")
    assert painted.code == 1 and "Traceback" not in painted.err
    assert f"ended with exit code 1: ImportError: {why}; run " in painted.err
    assert remedy in painted.err

    looked = fluxmesh("doctor", "--json")
    (mlx,) = [line for line in looked.of("check") if line["check"] == "MLX"]
    assert looked.code == 1 and mlx["level"] == "fail"
    assert why in mlx["text"] and remedy in mlx["text"]


def test_a_home_that_cannot_be_written_keeps_nobody_from_painting(
    fluxmesh: Run, home: Path, tmp_path: Path
) -> None:
    """Root can write everywhere: a link that leads nowhere stands where the folder would be."""
    (home / "mesh").symlink_to(tmp_path / "nowhere")
    painted = fluxmesh("generate", "dogs", "--model", "tiny", "--image-size", "64x64")
    assert painted.code == 0, painted.err
    refused = fluxmesh("up", "--model", "tiny")
    assert refused.code == 1 and "Traceback" not in refused.err
    assert "can't be used" in refused.err and "set FLUXMESH_HOME to a folder" in refused.err

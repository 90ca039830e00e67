"""Values of options, where prompts come from, and how settings become a request."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from fluxmesh.errors import UsageError
from fluxmesh.models.base import ModelDefaults
from fluxmesh.request import GenerateRequest
from fluxmesh_coordinator.cli.parameters.options import chosen, settings_options
from fluxmesh_coordinator.cli.parameters.prompts import only_prompt, read_prompts
from fluxmesh_coordinator.cli.parameters.types import Adapter, ImageSize, Margins, Resolutions
from fluxmesh_coordinator.commands.settings import GenerateSettings, draw_seed
from tests.unit.meshes import small, with_defaults


def settings_of(*arguments: str) -> GenerateSettings:
    """The settings that these arguments choose, as every command gathers them."""
    gathered: list[GenerateSettings] = []

    @click.command()
    @settings_options
    @click.pass_context
    def command(context: click.Context, **_settings: object) -> None:
        gathered.append(GenerateSettings().with_chosen(chosen(context)))

    result = CliRunner().invoke(command, arguments, standalone_mode=False)
    if result.exception:
        raise result.exception
    return gathered[0]


def test_without_options_the_settings_are_the_defaults() -> None:
    assert settings_of() == GenerateSettings()


def test_every_setting_has_an_option_and_every_option_a_setting() -> None:
    @click.command()
    @settings_options
    def command(**_settings: object) -> None: ...

    assert {option.name for option in command.params} == set(GenerateSettings.__dataclass_fields__)


def test_options_become_a_request() -> None:
    settings = settings_of(
        *("-m", "dev", "-n", "2", "--image-size", "32X48", "--steps", "5", "--guidance", "2.5"),
        *("--dtype", "float32", "-q", "--adapter", "a.safetensors", "--adapter", "b:0.5"),
        *("--fuse-adapter", "--no-t5-padding", "--decoding-batch-size", "2", "--low-memory"),
        *("--cache", "0.1"),
    )
    request = settings.request("dog", 3, model="dev")
    assert (request.height, request.width, request.steps, request.guidance) == (32, 48, 5, 2.5)
    assert (request.n_images, request.dtype, request.bits) == (2, "float32", 4)
    assert [(a.path, a.scale) for a in request.adapters] == [("a.safetensors", 1.0), ("b", 0.5)]
    assert request.fuse_adapters and not request.t5_padding and request.low_memory
    assert (request.decoding_batch_size, request.cache) == (2, 0.1)
    assert settings_of().request("dog", 3).cache == 0  # only who asks for it gets it


def test_bits_alone_quantize() -> None:
    assert settings_of("--bits", "8").effective_bits == 8
    assert settings_of("--quantize").effective_bits == 4
    assert settings_of().effective_bits is None


def test_text_encoders_have_bits_of_their_own_with_a_quantized_denoiser_or_without() -> None:
    for options, bits in ((("--text-bits", "4"), (None, 4)), (("-q", "--text-bits", "8"), (4, 8))):
        request = settings_of(*options).request("dog", 3)
        assert (request.bits, request.text_bits) == bits
    assert settings_of("-q").request("dog", 3).text_bits is None
    with pytest.raises(UsageError, match="`text_bits` is 7; choose 3, 4, 5, 6 or 8"):
        GenerateRequest("dog", 1, text_bits=7)


def test_the_checkpoint_decides_what_the_user_leaves_open() -> None:
    defaults = ModelDefaults(steps=7, guidance=3.0, height=64, width=80, t5_max_length=16)
    sizes = with_defaults(small(), defaults)
    request = sizes.fill(GenerateSettings().request("dog", 1))
    assert (request.steps, request.guidance) == (7, 3.0)
    assert (request.height, request.width) == (64, 80)
    request = sizes.fill(GenerateSettings(steps=2, guidance=0.0).request("dog", 1))
    assert (request.steps, request.guidance) == (2, 0.0)


@pytest.mark.parametrize(
    ("text", "size"),
    [("512x768", (512, 768)), ("512", (512, 512)), ("256×512", (256, 512)), ("1x17", (16, 32))],
)
def test_sizes_are_height_by_width_in_sixteens(text: str, size: tuple[int, int]) -> None:
    assert ImageSize().convert(text, None, None) == size


@pytest.mark.parametrize("text", ["", "x", "12x", "1x2x3", "-16x16", "16.0", "axb"])
def test_sizes_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(click.BadParameter, match="not HEIGHTxWIDTH"):
        ImageSize().convert(text, None, None)


def test_an_adapter_has_a_scale_unless_a_file_has_that_name(tmp_path: Path) -> None:
    def convert(text: str) -> tuple[str, float]:
        return Adapter().convert(text, None, None)

    assert convert("a/b.safetensors") == ("a/b.safetensors", 1.0)
    assert convert("a/b.safetensors:-0.5") == ("a/b.safetensors", -0.5)
    assert convert("C:dog") == ("C:dog", 1.0)
    odd = tmp_path / "dog:2"
    odd.write_bytes(b"")
    assert convert(str(odd)) == (str(odd), 1.0)
    for wrong in ("dog:nan", "dog:inf", ":1"):
        with pytest.raises(click.BadParameter, match=r"not NAME\[@SCALE\], such as"):
            convert(wrong)


def test_margins_are_four_numbers() -> None:
    assert Margins().convert("1,2,3,4", None, None) == (1, 2, 3, 4)
    with pytest.raises(UsageError, match="`outpaint`"):
        Margins().convert("1,2,3", None, None)


@pytest.mark.parametrize("option", ["mask", "outpaint", "strength"])
def test_what_changes_a_picture_needs_one(option: str) -> None:
    with pytest.raises(UsageError, match=f"`{option}` says how to change `image`"):
        GenerateSettings(**{option: 0.5}).request("dog", 1)


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [({"strength": 5.0, "image": "a.png"}, "`strength` is 5.0"), ({"n_rows": 0}, "`n_rows` is 0")],
)
def test_numbers_are_checked_before_any_file_is(setting: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        GenerateSettings(**setting).request("dog", 1)


def test_drawn_seeds_differ_and_are_allowed() -> None:
    seeds = {draw_seed() for _ in range(8)}
    assert len(seeds) == 8
    for seed in seeds:
        GenerateSettings(n_images=4096).request("dog", seed)


def stdin(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


def test_prompts_come_from_one_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("﻿eins\r\n# a comment\n\n\t zwei 猫\n".encode())
    assert read_prompts("a dog", None, "old") == ["a dog"]
    assert read_prompts("", None, "old", allow_empty=True) == [""]
    assert read_prompts(None, None, "") == [""]  # of a picture that was painted so
    assert read_prompts(None, None, "old") == ["old"]
    assert read_prompts(None, str(path), "old") == ["eins", "zwei 猫"]
    stdin(monkeypatch, b"from a pipe\n")
    assert read_prompts("-", None, None) == ["from a pipe"]
    stdin(monkeypatch, b"from a pipe\n")
    assert read_prompts(None, "-", None) == ["from a pipe"]


def test_prompts_that_are_none_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    (tmp_path / "empty").write_bytes(b"\n \n")
    (tmp_path / "comments").write_bytes(b"# one\n  # two\n")
    stdin(monkeypatch, b"")
    for prompt, file, sentence in (
        (None, None, "There is no prompt"),
        ("", None, "The prompt is empty: .* --allow-empty-prompt"),
        (" \t", None, "The prompt is empty"),
        ("a", str(tmp_path / "empty"), "give one of them"),
        (None, str(tmp_path / "comments"), "comments holds no prompt"),
        (None, str(tmp_path / "latin"), r"latin is not UTF-8 text \(byte 3\)"),
        (None, str(tmp_path / "empty"), "empty holds no prompt"),
        (None, str(tmp_path), "can't be read: Is a directory"),
        ("-", None, "stdin holds no prompt"),
    ):
        with pytest.raises(UsageError, match=sentence):
            read_prompts(prompt, file, None)


def test_a_line_that_begins_with_a_number_sign_is_a_comment_unless_it_is_escaped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stdin(monkeypatch, b"# my prompts\n\\#1 fan\na cat # and a dog\n#a bird\n")
    assert read_prompts("-", None, None) == ["#1 fan", "a cat # and a dog"]


def test_a_prompt_without_quotes_is_told_with_them() -> None:
    assert only_prompt((), "generate") is None
    assert only_prompt(("a red apple",), "generate") == "a red apple"
    with pytest.raises(UsageError, match='quotes, as in fluxmesh generate "a red apple"'):
        only_prompt(("a", "red", "apple"), "generate")


def test_several_sizes_are_read_each_once_and_in_their_order() -> None:
    sizes = Resolutions()
    assert sizes.convert("512x768,1024,512X768", None, None) == ((512, 768), (1024, 1024))
    for wrong in ("", "512x768,", "0x512", "500x512", "512x", "a,b"):
        with pytest.raises(click.BadParameter):
            sizes.convert(wrong, None, None)

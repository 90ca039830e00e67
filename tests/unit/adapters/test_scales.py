"""The numbers of an adapter: alpha, fp8, PEFT's settings beside the file; what is no number."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fluxmesh.adapters.changes import LowRank
from fluxmesh.errors import AdapterError
from tests.adapter_files import alpha, write
from tests.unit.adapters.targets import (
    IMG_QKV,
    D,
    opened,
    pair,
    refusal,
)


@pytest.mark.parametrize("dtype", [np.int64, np.float64, np.float16])
def test_an_alpha_may_be_of_any_dtype(tmp_path, dtype):
    a, b = pair(D, D)
    arrays = {
        "lora_unet_img_in.lora_down.weight": a,
        "lora_unet_img_in.lora_up.weight": b,
        "lora_unet_img_in.alpha": np.array(8, dtype),
    }
    change = opened(write(tmp_path / "a.safetensors", arrays)).change("transformer", "img_in")
    assert change.joined().scale == 2
    wide = {key: x.astype(np.float64) for key, x in arrays.items()}
    change = opened(write(tmp_path / "b.safetensors", wide)).change("transformer", "img_in")
    np.testing.assert_array_equal(change.joined().product(), 2 * (b @ a))


def test_fp8_factors_are_read_with_their_scales(tmp_path):
    """Against the formats' own definitions, bit by bit."""

    def value(byte: int, exponent_bits: int) -> float:
        mantissa_bits = 7 - exponent_bits
        exponent = (byte >> mantissa_bits) & (2**exponent_bits - 1)
        mantissa = byte & (2**mantissa_bits - 1)
        bias = 2 ** (exponent_bits - 1) - 1
        if exponent:
            size = (1 + mantissa / 2**mantissa_bits) * 2.0 ** (exponent - bias)
        else:
            size = mantissa / 2**mantissa_bits * 2.0 ** (1 - bias)
        return -size if byte & 0x80 else size

    for dtype, exponent_bits, nans in (("F8_E4M3", 4, {0x7F, 0xFF}), ("F8_E5M2", 5, set())):
        bytes_ = [x for x in range(256) if x not in nans]
        if exponent_bits == 5:
            bytes_ = [x for x in bytes_ if (x & 0x7F) < 0x7C]  # infinity and NaN above
        a = np.resize(np.array(bytes_, np.uint8), (4, D))
        b = np.resize(np.array(bytes_[::-1], np.uint8), (D, 4))
        keys = ("diffusion_model.img_in.lora_A.weight", "diffusion_model.img_in.lora_B.weight")
        arrays = {
            **dict(zip(keys, (a, b), strict=True)),
            "diffusion_model.img_in.lora_A.scale_weight": np.array(0.5, np.float32),
            "scaled_fp8": np.zeros(2, np.uint8),
        }
        dtypes = dict.fromkeys((*keys, "scaled_fp8"), dtype)
        path = write(tmp_path / f"{dtype}.safetensors", arrays, dtypes=dtypes)
        term = opened(path).change("transformer", "img_in").joined()
        lifted = np.vectorize(lambda byte: value(int(byte), exponent_bits))  # noqa: B023
        np.testing.assert_array_equal(term.a, 0.5 * lifted(a))
        np.testing.assert_array_equal(term.b, lifted(b))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["lora_down.weight", "lora_up.weight", "alpha"])
def test_what_is_not_finite_is_named(tmp_path, bad, where):
    a, b = pair(D, D)
    arrays = {
        "lora_unet_img_in.lora_down.weight": a,
        "lora_unet_img_in.lora_up.weight": b,
        "lora_unet_img_in.alpha": alpha(4),
    }
    arrays[f"lora_unet_img_in.{where}"].reshape(-1)[-1] = bad
    text = refusal(tmp_path / "a.safetensors", arrays)
    assert f"lora_unet_img_in.{where} holds NaN or infinity" in text


def test_a_file_that_changes_nothing_is_told(tmp_path):
    zero = {"diffusion_model.img_in.diff": np.zeros((D, D), np.float32)}
    assert "changes nothing" in refusal(tmp_path / "a.safetensors", zero)


def folder_of_peft(folder: Path, modules: dict[str, int], **settings: object) -> Path:
    """A folder as `save_pretrained` leaves it, factors of ones in ranks of their own."""
    arrays = {}
    for module, rank in modules.items():
        key = f"base_model.model.{module}"
        arrays[f"{key}.lora_A.weight"] = np.ones((rank, D), np.float32)
        arrays[f"{key}.lora_B.weight"] = np.ones((D, rank), np.float32)
    folder.mkdir()
    path = write(folder / "adapter_model.safetensors", arrays)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, **settings}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize(
    ("settings", "scales"),
    [
        ({}, (2, 2, 4)),
        ({"use_rslora": True}, (4, 4, 8 / 2**0.5)),
        ({"alpha_pattern": {"to_q": 2}, "rank_pattern": {"to_k": 2}}, (0.5, 2, 4)),
        ({"alpha_pattern": {"transformer_blocks.1.attn.to_q": 4}}, (1, 2, 4)),
        ({"alpha_pattern": {r"transformer_blocks\.\d+\.attn\.to_[qv]": 4}}, (1, 1, 4)),
        ({"alpha_pattern": {r"^transformer_blocks\.1\.attn\.to_q$": 4}}, (1, 2, 4)),
        ({"alpha_pattern": {"q": 4, "o_q": 4}}, (2, 2, 4)),  # no name's end
        ({"lora_alpha": None}, (1, 1, 1)),
    ],
)
def test_pefts_settings_beside_the_file_scale_it(tmp_path, settings, scales):
    modules = {f"transformer_blocks.1.attn.to_{x}": r for x, r in (("q", 4), ("v", 4), ("k", 2))}
    path = folder_of_peft(tmp_path / "peft", modules, **settings)
    terms = {p.source: p.term for p in opened(path).change("transformer", IMG_QKV[1]).pieces}
    for module, scale in zip(modules, scales, strict=True):
        term = terms[f"base_model.model.{module}"]
        assert isinstance(term, LowRank) and term.scale == pytest.approx(scale), module


@pytest.mark.parametrize("pattern", ["(a+)+b", "x" * 600 + "*"])
def test_a_pattern_that_could_take_for_ever_is_refused(tmp_path, pattern):
    modules = {"transformer_blocks.1.attn.to_q": 4}
    path = folder_of_peft(tmp_path / "peft", modules, alpha_pattern={pattern: 1})
    with pytest.raises(AdapterError, match="repeats a repetition"):
        opened(path).check_values()


def test_settings_that_are_none_are_an_error(tmp_path):
    path = folder_of_peft(tmp_path / "peft", {"x_embedder": 4}, lora_alpha="much")
    with pytest.raises(AdapterError, match=r"adapter_config\.json .* can't be read"):
        opened(path).check_values()
    path.with_name("adapter_config.json").write_text("{")
    with pytest.raises(AdapterError, match="is no JSON"):
        opened(path)

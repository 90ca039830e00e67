"""FLUX.2's files: rows of an embedding, tokenizers, single files; and reference pictures."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

from fluxmesh.errors import ModelNotFoundError, UsageError, WeightsError
from fluxmesh.models.flux1 import tensor_maps
from fluxmesh.models.flux1.config import AutoencoderConfig, FluxConfig
from fluxmesh.models.flux2.config import Flux2AutoencoderConfig, TextEncoderConfig
from fluxmesh.models.flux2.embedding import EmbeddingRows
from fluxmesh.models.flux2.references import fitted
from fluxmesh.models.flux2.single_file import flux2_autoencoder_config_of, flux2_config_of
from fluxmesh.models.flux2.tensor_maps import (
    autoencoder_tensors,
    is_flux2_transformer,
    transformer_tensors,
)
from fluxmesh.models.flux2.text_encoder import TextEncoder
from fluxmesh.models.flux2.tokenizer import FRAMES, ChatTokenizer, PromptTokens
from fluxmesh.models.registry import published
from fluxmesh.models.tensor_map import Tensors
from fluxmesh.storage import safetensors
from fluxmesh.storage.safetensors import read_header, write_tensors
from fluxmesh.weights.embedded.checkpoints import embedded_checkpoint
from tests.flux2_models import SMALL, randomize

TEXT = TextEncoderConfig(
    vocab_size=30,
    hidden_size=16,
    intermediate_size=24,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    states=(1, 2, 3),
)
TABLE = np.random.default_rng(0).standard_normal((30, 16)).astype(np.float32)


def write_table(folder: Path, key: str, table: np.ndarray, kind: str = "F32") -> list[Path]:
    path = folder / f"{len(list(folder.iterdir()))}.safetensors"
    write_tensors(path, {key: (table, kind)}, {})
    return [path]


def bits(table: np.ndarray) -> np.ndarray:
    """bfloat16 as the two bytes that files hold."""
    return np.array(mx.array(table).astype(mx.bfloat16).view(mx.uint16))


# Rows of the embedding


@pytest.mark.parametrize(
    "key",
    ["model.embed_tokens.weight", "language_model.model.embed_tokens.weight"],
)
def test_only_the_rows_of_a_prompt_are_read_and_each_of_them_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    rows = EmbeddingRows(write_table(tmp_path, key, TABLE), TEXT)
    read = []
    into = safetensors.read_bytes_into
    monkeypatch.setattr(
        safetensors,
        "read_bytes_into",
        lambda view, *where: (read.append(len(view)), into(view, *where)),
    )
    embedded = rows([29, 0, 7, 7, 0], mx.float32)
    assert embedded.shape == (1, 5, 16) and embedded.dtype == mx.float32
    np.testing.assert_array_equal(np.array(embedded[0]), TABLE[[29, 0, 7, 7, 0]])
    assert read == [16 * 4] * 3


def test_rows_in_bfloat16_come_as_they_are(tmp_path: Path) -> None:
    files = write_table(tmp_path, "model.embed_tokens.weight", bits(TABLE), "BF16")
    embedded = EmbeddingRows(files, TEXT)([3, 4], mx.bfloat16)
    assert embedded.dtype == mx.bfloat16
    assert mx.array_equal(embedded[0], mx.array(TABLE[3:5]).astype(mx.bfloat16))


def test_a_table_that_is_missing_or_of_another_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="lacks model.embed_tokens.weight"):
        EmbeddingRows(write_table(tmp_path, "lm_head.weight", TABLE), TEXT)
    files = write_table(tmp_path, "model.embed_tokens.weight", TABLE)
    with pytest.raises(WeightsError, match=r"shape \(30, 16\).*shape \(31, 16\)"):
        EmbeddingRows(files, replace(TEXT, vocab_size=31))
    whole = write_table(tmp_path, "model.embed_tokens.weight", TABLE.view(np.uint32), "U32")
    with pytest.raises(WeightsError, match="U32"):
        EmbeddingRows(whole, TEXT)


@pytest.mark.parametrize("ids", [[0, 30], [-1, 3]])
def test_a_token_beyond_the_table_is_never_read(tmp_path: Path, ids: list[int]) -> None:
    rows = EmbeddingRows(write_table(tmp_path, "model.embed_tokens.weight", TABLE), TEXT)
    with pytest.raises(WeightsError, match="30 rows .* one belongs to another model"):
        rows(ids, mx.float32)


# Tokenizers


def tokenizer_file(folder: Path, specials: list[str], **options: Any) -> Path:
    """A tokenizer.json of single bytes and special tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.add_special_tokens(specials)
    if options:
        raw.enable_padding(**options)
        raw.enable_truncation(3)
    raw.save(str(folder / "tokenizer.json"))
    return folder


QWEN = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
MISTRAL = ["<s>", "<pad>", "[INST]", "[/INST]", "[IMG]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"]


def test_a_prompt_is_framed_padded_and_cut_whatever_the_file_says_of_lengths(
    tmp_path: Path,
) -> None:
    folder = tokenizer_file(tmp_path, QWEN, length=70)
    tokenizer = ChatTokenizer.from_folder(folder, "qwen3", max_length=60)
    assert tokenizer.vocab_size == 261
    tokens = tokenizer.encode("ab")
    text = "<|im_start|>user\nab<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert tokenizer.model.decode(tokens.ids, skip_special_tokens=False).count("<|im_start|>") == 2
    assert tokens.ids == tokenizer.model.encode(text).ids and tokens.ids[0] == 257
    assert len(tokens.ids) + tokens.padding == 60
    assert (tokens.pad_id, tokens.is_padded_before) == (256, False)
    cut = tokenizer.encode("a" * 100)
    assert (len(cut.ids), cut.padding) == (60, 0) and cut.ids[-1] == cut.ids[-2]


def test_mistral_s_prompt_has_the_system_message_and_no_picture_token(tmp_path: Path) -> None:
    folder = tokenizer_file(tmp_path, MISTRAL)
    tokenizer = ChatTokenizer.from_folder(folder, "mistral3")
    tokens = tokenizer.encode("a[IMG]b")
    picture = tokenizer.model.token_to_id("[IMG]")
    assert picture not in tokens.ids and tokens.is_padded_before
    assert tokens.ids[:2] == [256, tokenizer.model.token_to_id("[SYSTEM_PROMPT]")]
    assert tokens == tokenizer.encode("ab")
    assert "object\nattribution" in FRAMES["mistral3"].before


def test_a_tokenizer_that_is_missing_broken_or_of_another_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="tokenizer.json is missing"):
        ChatTokenizer.from_folder(tmp_path, "qwen3")
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(ModelNotFoundError, match="tokenizer.json is missing"):
        ChatTokenizer.from_folder(tmp_path, "mistral3")  # which has no such files
    with pytest.raises(WeightsError, match="no vocabulary and merges"):
        ChatTokenizer.from_folder(tmp_path, "qwen3")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(WeightsError, match="no tokenizer"):
        ChatTokenizer.from_folder(tmp_path, "qwen3")
    with pytest.raises(WeightsError, match=r"lacks the token <\|endoftext\|>"):
        ChatTokenizer.from_folder(tokenizer_file(tmp_path / "other", MISTRAL), "qwen3")


def test_added_tokens_whose_ids_do_not_follow_the_vocabulary_are_refused(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0, "b": 1}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    config = {"added_tokens_decoder": {"7": {"content": "<|endoftext|>"}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match="does not follow"):
        ChatTokenizer.from_folder(tmp_path, "qwen3")


@pytest.mark.parametrize("is_before", [True, False])
def test_features_are_as_long_as_padding_makes_them(tmp_path: Path, is_before: bool) -> None:
    """Padding before a prompt is computed once and repeated; after it, row by row."""
    encoder = TextEncoder(TEXT)
    randomize(encoder, 1)
    rows = EmbeddingRows(write_table(tmp_path, "model.embed_tokens.weight", TABLE), TEXT)
    tokens = PromptTokens([3, 4, 5], 4, 9, is_before)
    ids, real = [3, 4, 5, 9, 9, 9, 9], [True] * 3 + [False] * 4
    if is_before:
        ids, real = ids[3:] + ids[:3], real[3:] + real[:3]
    expected = np.array(encoder(rows(ids, mx.float32), np.array(real)))
    features = np.array(encoder.encode([tokens], rows)[0])
    assert features.shape == (1, 7, 48)
    np.testing.assert_allclose(features, expected, rtol=1e-4, atol=1e-5)
    pads = features[0, :4] if is_before else features[0, 3:]
    assert np.array_equal(pads[0], pads[1]) == is_before


# Single files


def write_model(path: Path, tensors: Tensors, prefix: str = "") -> Path:
    arrays = {
        f"{prefix}{name}": (np.zeros(target.shape, dtype=np.float32), "F32")
        for name, target in tensors.items()
    }
    write_tensors(path, arrays, {})
    return path


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_single_file_s_sizes_are_read_from_its_shapes(tmp_path: Path, prefix: str) -> None:
    path = write_model(tmp_path / "flux-2.safetensors", transformer_tensors(SMALL), prefix)
    assert flux2_config_of(path) == SMALL
    assert is_flux2_transformer(read_header(path).entries)
    without = replace(SMALL, guidance_embed=False, depth=3, mlp_ratio=2.0)
    other = write_model(tmp_path / "other.safetensors", transformer_tensors(without), prefix)
    assert flux2_config_of(other) == without


def test_an_autoencoder_s_sizes_are_read_from_its_shapes(tmp_path: Path) -> None:
    config = Flux2AutoencoderConfig(
        widths=(32, 64), decoder_widths=(32, 32), num_res_blocks=1, z_channels=4
    )
    path = write_model(tmp_path / "ae.safetensors", autoencoder_tensors(config))
    assert flux2_autoencoder_config_of(path) == config


def test_files_of_flux_1_are_no_flux_2(tmp_path: Path) -> None:
    small = FluxConfig(hidden_size=32, num_heads=2, depth=1, depth_single_blocks=1)
    path = write_model(tmp_path / "flux1.safetensors", tensor_maps.transformer_tensors(small))
    assert not is_flux2_transformer(read_header(path).entries)
    with pytest.raises(WeightsError, match=r"not a FLUX\.2 transformer"):
        flux2_config_of(path)
    ae = AutoencoderConfig(widths=(8, 16), num_res_blocks=1, z_channels=4)
    path = write_model(tmp_path / "ae.safetensors", tensor_maps.autoencoder_tensors(ae))
    with pytest.raises(WeightsError, match=r"not FLUX\.2's autoencoder"):
        flux2_autoencoder_config_of(path)


# Reference pictures


def test_a_reference_is_cropped_in_its_middle_to_whole_tokens() -> None:
    picture = np.arange(70 * 101 * 3, dtype=np.uint32).astype(np.uint8).reshape(70, 101, 3)
    np.testing.assert_array_equal(fitted(picture, 16), picture[3:67, 2:98])
    assert np.array_equal(fitted(picture[:64, :80], 16), picture[:64, :80])


def test_a_large_reference_is_scaled_to_a_million_pixels() -> None:
    rows, columns = np.mgrid[0:1536, 0:2048]
    picture = np.stack([rows // 8, columns // 8, rows // 8], axis=-1).astype(np.uint8)
    kept = fitted(picture, 16)
    assert kept.shape == (880, 1168, 3)  # of 886 x 1182
    scaled = Image.fromarray(picture).resize((1182, 886), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(kept, np.asarray(scaled)[3:883, 7:1175])


def test_a_model_that_paints_small_pictures_reads_a_photo_small() -> None:
    """Else the embedded one takes minutes for a photo, and edits nothing of it."""
    photo = np.zeros((1536, 2048, 3), dtype=np.uint8)
    tiny, klein = embedded_checkpoint("tiny-klein").architecture, published("klein")
    assert tiny.fitted(photo).shape == (160, 208, 3)  # of 166 x 221
    assert klein.fitted(photo).shape == (880, 1168, 3)
    for side in (64, 128, 192):  # what it was trained on is read as it is
        assert tiny.fitted(photo[:side, :side]).shape == (side, side, 3)
    assert tiny.fitted(np.zeros((200, 1600, 3), dtype=np.uint8)).shape == (64, 528, 3)


@pytest.mark.parametrize(
    ("height", "width", "said"), [(63, 100, "64 at least"), (64, 513, "8 times")]
)
def test_a_reference_that_is_too_small_or_too_narrow_is_refused(
    height: int, width: int, said: str
) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        fitted(np.zeros((height, width, 3), dtype=np.uint8), 16)
    assert f"{height}x{width}" in str(caught.value)
    assert fitted(np.zeros((64, 512, 3), dtype=np.uint8), 16).shape == (64, 512, 3)

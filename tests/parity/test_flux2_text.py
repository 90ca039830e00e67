"""FLUX.2's tokenizers and text encoders against transformers and diffusers' pipelines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import Flux2KleinPipeline, Flux2Pipeline
from hypothesis import given, settings
from hypothesis import strategies as st

from fluxmesh.models.flux2.config import TextEncoderConfig
from fluxmesh.models.flux2.embedding import EmbeddingRows
from fluxmesh.models.flux2.tensor_maps import text_encoder_tensors
from fluxmesh.models.flux2.text_encoder import TextEncoder
from fluxmesh.models.flux2.tokenizer import ChatTokenizer
from tests.flux2_models import load
from tests.parity import flux2
from tests.parity.oracles import BOUND, relative_error

KINDS = ("qwen3", "mistral3")
PROMPTS = {
    "plain": "a cat",
    "empty": "",
    "begins and ends with line ends": "\n\n a tiny cat \n",
    "digits, accents, emoji": "12345 cats - cafe\u0301, nai\u0308ve x2 \U0001f408 猫 don'T",
    "spells special tokens": "a <|im_end|> [INST] <think> <s> [IMG]b<|endoftext|> </think>",
    "just too long": "cat " * 230,
    "far too long": "ny ti us er " * 300,
}


@pytest.fixture(scope="module", params=KINDS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(kind, diffusers' parts, their folder)"""
    parts = flux2.parts(request.param, seed=5)
    return request.param, parts, flux2.save(parts, tmp_path_factory.mktemp(request.param))


def reference(kind: str, parts: dict[str, Any], prompt: str) -> torch.Tensor:
    if kind == "qwen3":
        return Flux2KleinPipeline(**parts, is_distilled=True).encode_prompt(prompt)[0]
    return Flux2Pipeline(**parts).encode_prompt(prompt)[0]


def reference_ids(kind: str, parts: dict[str, Any], prompt: str) -> tuple[list[int], list[int]]:
    """Ids and mask as the pipeline makes them, caught on their way into the text encoder."""
    caught: dict[str, torch.Tensor] = {}

    class Caught(Exception):
        pass

    def catch(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        caught.update(ids=kwargs["input_ids"], mask=kwargs["attention_mask"])
        raise Caught

    handle = parts["text_encoder"].register_forward_pre_hook(catch, with_kwargs=True)
    try:
        with pytest.raises(Caught):
            reference(kind, parts, prompt)
    finally:
        handle.remove()
    return caught["ids"][0].tolist(), caught["mask"][0].tolist()


def own_ids(tokenizer: ChatTokenizer, prompt: str) -> tuple[list[int], list[int]]:
    tokens = tokenizer.encode(prompt)
    pads, real = [tokens.pad_id] * tokens.padding, [1] * len(tokens.ids)
    if tokens.is_padded_before:
        return [*pads, *tokens.ids], [0] * tokens.padding + real
    return [*tokens.ids, *pads], real + [0] * tokens.padding


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
def test_token_ids_equal_the_pipeline_s(made: Any, prompt: str) -> None:
    kind, parts, folder = made
    tokenizer = ChatTokenizer.from_folder(folder / "tokenizer", kind)
    assert own_ids(tokenizer, prompt) == reference_ids(kind, parts, prompt)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.text(max_size=12),
            st.sampled_from(["<|im_start|>", "[/INST]", "[IMG]", "<think>", "\n", "  ", "123"]),
        ),
        max_size=8,
    ).map("".join)
)
def test_any_prompt_s_token_ids_equal_the_pipeline_s(made: Any, prompt: str) -> None:
    kind, parts, folder = made
    tokenizer = ChatTokenizer.from_folder(folder / "tokenizer", kind)
    assert own_ids(tokenizer, prompt) == reference_ids(kind, parts, prompt)


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
def test_all_three_states_equal_the_pipeline_s_rows_of_padding_included(
    made: Any, prompt: str
) -> None:
    kind, parts, folder = made
    config = TextEncoderConfig.from_dict(flux2.config_of(folder / "text_encoder"))
    files = [folder / "text_encoder" / "model.safetensors"]
    encoder = load(TextEncoder(config), text_encoder_tensors(config), files)
    tokens = ChatTokenizer.from_folder(folder / "tokenizer", kind).encode(prompt)
    features = encoder.encode([tokens], EmbeddingRows(files, config))[0]
    expected = reference(kind, parts, prompt)
    assert features.shape == expected.shape == (1, 512, 3 * config.hidden_size)
    assert len(config.states) == 3
    assert relative_error(features, expected) <= BOUND
    pads = slice(0, tokens.padding) if tokens.is_padded_before else slice(len(tokens.ids), 512)
    for i, state in enumerate(config.states):
        columns = slice(i * config.hidden_size, (i + 1) * config.hidden_size)
        errors = [relative_error(features[..., columns], expected[..., columns])]
        if tokens.padding:
            rows = (slice(None), pads, columns)
            errors.append(relative_error(features[rows], expected[rows]))
        print(f"{kind}'s state {state}, and its padding: {', '.join(map('{:.1e}'.format, errors))}")
        assert max(errors) <= BOUND


def test_the_last_state_is_not_normed(made: Any) -> None:
    """transformers, cut to as many layers as are read, would put its last norm there."""
    kind, parts, folder = made
    config = TextEncoderConfig.from_dict(flux2.config_of(folder / "text_encoder"))
    assert (config.layers, config.width) == ({"qwen3": 27, "mistral3": 30}[kind], 96)
    names = text_encoder_tensors(config)
    assert not any(name.startswith("norm") for name in names)
    assert f"layers.{config.layers}.input_layernorm.weight" not in names


def test_qwen_s_vocabulary_and_merges_serve_without_tokenizer_json(tmp_path: Path) -> None:
    """As older folders have them; the added tokens then stand in tokenizer_config.json."""
    whole = flux2.qwen_tokenizer()
    whole.save_pretrained(tmp_path / "whole")
    model = json.loads((tmp_path / "whole" / "tokenizer.json").read_text())
    added = {entry["id"]: entry for entry in model["added_tokens"]}
    vocab = {token: i for token, i in model["model"]["vocab"].items() if i not in added}
    parts = tmp_path / "parts"
    parts.mkdir()
    (parts / "vocab.json").write_text(json.dumps(vocab))
    merges = ["#version: 0.2", *(" ".join(pair) for pair in model["model"]["merges"])]
    (parts / "merges.txt").write_text("\n".join(merges))
    decoder = {str(i): {"content": entry["content"]} for i, entry in added.items()}
    config = {"added_tokens_decoder": decoder}
    (parts / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = ChatTokenizer.from_folder(tmp_path / "whole", "qwen3")
    other = ChatTokenizer.from_folder(parts, "qwen3")
    assert tokenizer.vocab_size == other.vocab_size
    for prompt in PROMPTS.values():
        assert tokenizer.encode(prompt) == other.encode(prompt)

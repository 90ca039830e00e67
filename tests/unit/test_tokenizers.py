"""Tokenizers by themselves: lengths, padding, and files that are not what they should be.

That their ids are transformers' is held by tests/parity/test_tokenizers.py.
"""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import sentencepiece

from fluxmesh.errors import WeightsError
from fluxmesh.models.flux1.tokenizers import END, START, ClipTokenizer, T5Tokenizer

VOCAB = ["c", "a", "t", "t</w>", "s</w>", "ca", "cat</w>", START, END, "<pad>"]
MERGES = "#version: 0.2\nc a\nca t</w>\n"


@pytest.fixture
def clip_files(tmp_path: Path) -> tuple[Path, Path]:
    vocab, merges = tmp_path / "vocab.json", tmp_path / "merges.txt"
    vocab.write_text(json.dumps({token: i for i, token in enumerate(VOCAB)}))
    merges.write_text(MERGES)
    return vocab, merges


@pytest.fixture
def spiece(tmp_path: Path) -> Path:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a cat and a dog"] * 20),
        model_writer=model,
        vocab_size=20,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
        num_threads=1,
    )
    path = tmp_path / "spiece.model"
    path.write_bytes(model.getvalue())
    return path


def pieces(tokenizer: ClipTokenizer, text: str) -> list[str]:
    return [VOCAB[i] for i in tokenizer.encode(text, pad=False)]


def test_clip_merges_in_the_order_learned(clip_files: tuple[Path, Path]) -> None:
    tokenizer = ClipTokenizer(*clip_files)
    assert pieces(tokenizer, "Cat") == [START, "cat</w>", END]
    assert pieces(tokenizer, "cats") == [START, "ca", "t", "s</w>", END]


def test_clip_keeps_the_end_token_when_it_truncates(clip_files: tuple[Path, Path]) -> None:
    tokenizer = ClipTokenizer(*clip_files, max_length=5)
    assert pieces(tokenizer, "cat cat cat cat") == [START, *["cat</w>"] * 3, END]
    assert tokenizer.encode("") == [7, 8, 8, 8, 8]


def test_clip_pads_with_its_pad_token(clip_files: tuple[Path, Path]) -> None:
    assert ClipTokenizer(*clip_files, 4, pad_token="<pad>").encode("cat") == [7, 6, 8, 9]


def test_clip_reads_length_and_padding_from_its_folder(clip_files: tuple[Path, Path]) -> None:
    folder = clip_files[0].parent
    assert len(ClipTokenizer.from_folder(folder).encode("cat")) == 77
    for pad_token in ("<pad>", {"content": "<pad>", "special": True}):
        config = {"model_max_length": 4, "pad_token": pad_token}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        assert ClipTokenizer.from_folder(folder).encode("cat") == [7, 6, 8, 9]
    assert ClipTokenizer.from_folder(folder, limit=3).encode("cat") == [7, 6, 8]


def test_t5_knows_its_sentinels_only_where_the_folder_declares_them(spiece: Path) -> None:
    size = sentencepiece.SentencePieceProcessor(model_file=str(spiece)).vocab_size()
    text = "<extra_id_0> cat <extra_id_9>"
    without = T5Tokenizer.from_folder(spiece.parent, 32).encode(text, pad=False)
    assert max(without) < size
    (spiece.parent / "tokenizer_config.json").write_text('{"extra_ids": 10}')
    ids = T5Tokenizer.from_folder(spiece.parent, 32).encode(text, pad=False)
    assert (ids[0], ids[-2], ids[-1]) == (size + 9, size, 1)


def test_t5_keeps_the_end_token_when_it_truncates(spiece: Path) -> None:
    tokenizer = T5Tokenizer(spiece, max_length=6)
    full = T5Tokenizer(spiece, max_length=100).encode("a cat and a dog", pad=False)
    assert tokenizer.encode("a cat and a dog") == [*full[:5], 1]
    assert tokenizer.encode("") == [1, 0, 0, 0, 0, 0]
    assert tokenizer.encode("", pad=False) == [1]


@pytest.mark.parametrize(
    "vocab, merges, message",
    [
        ("{", MERGES, "vocab.json is not valid JSON"),
        ("[1]", MERGES, "vocab.json should hold a JSON object"),
        ('{"a": "b"}', MERGES, "vocab.json is not a vocabulary"),
        ('{"a": 0}', MERGES, "lacks the token <|startoftext|>"),
        (None, "c a t\n", "merges.txt has the line 'c a t'"),
    ],
)
def test_broken_clip_files_are_named(
    clip_files: tuple[Path, Path], vocab: str | None, merges: str, message: str
) -> None:
    if vocab is not None:
        clip_files[0].write_text(vocab)
    clip_files[1].write_text(merges)
    with pytest.raises(WeightsError) as error:
        ClipTokenizer(*clip_files)
    assert message in str(error.value)


def test_missing_and_broken_sentencepiece_models_are_named(tmp_path: Path) -> None:
    broken = tmp_path / "spiece.model"
    for content in (None, b"not a model"):
        if content:
            broken.write_bytes(content)
        with pytest.raises(WeightsError, match="spiece.model is not a sentencepiece model"):
            T5Tokenizer(broken, max_length=8)

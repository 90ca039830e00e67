"""Tokenizers by themselves: lengths, padding, and files that are not what they should be.

That their ids are transformers' is held by tests/parity/test_tokenizers.py.
"""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from fluxmesh.errors import WeightsError
from fluxmesh.models.flux1.tokenizers import END, START, ClipTokenizer, T5Tokenizer
from tests.wild_layouts import clip_tokenizer_json, t5_tokenizer_json

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
        (None, "", "merges.txt does not fit the vocabulary beside it: 'ca'"),
        (None, "#version: 0.2\nc a\n", "merges.txt does not fit the vocabulary beside it: 'cat"),
        (None, MERGES + "t t\n", "merges.txt does not fit the vocabulary beside it: 'tt'"),
        (None, "version https://git-lfs.github.com/spec/v1\nsize 3\n", "download both again"),
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


# Texts on which a tokenizer that is read otherwise would differ.
TEXTS = [
    "",
    " \t\n ",
    "Cat cats  a\u3000cat",
    "cafe\u0301 nai\u0308ve \u00b2\u0301 \ufb01ne \u2167",
    "\u732b \U0001f415\u200d\U0001f9ba x",
    "<|endoftext|> a<|startoftext|>t </s> <pad><unk> <extra_id_0> <extra_id_3>",
    "\u2581dog \u2581 a_b-c",
    "a \uff1c/s\uff1e b",  # which the table of characters makes an end token's letters of
    "a cat and a dog " * 40,
]


@pytest.mark.parametrize("are_pairs", [True, False])
def test_clip_reads_a_tokenizer_json_as_its_two_files(
    clip_files: tuple[Path, Path], tmp_path: Path, are_pairs: bool
) -> None:
    """Merges are pairs in today's files and a text in those of earlier years."""
    values = json.loads(clip_tokenizer_json(clip_files[0].parent).to_str())
    pairs = values["model"]["merges"]
    assert [*map(list, pairs)] == [["c", "a"], ["ca", "t</w>"]]
    values["model"]["merges"] = pairs if are_pairs else [" ".join(pair) for pair in pairs]
    folder = tmp_path / "alone"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(values))
    (folder / "tokenizer_config.json").write_text('{"pad_token": "<pad>"}')
    alone = ClipTokenizer.from_folder(folder)
    both = ClipTokenizer(*clip_files, pad_token="<pad>")
    assert alone.vocab_size == both.vocab_size
    for text in TEXTS:
        assert alone.encode(text) == both.encode(text), text


def test_clip_knows_a_token_that_stands_beside_its_vocabulary(
    clip_files: tuple[Path, Path], tmp_path: Path
) -> None:
    tokenizer = clip_tokenizer_json(clip_files[0].parent)
    tokenizer.add_special_tokens(["<filler>"])
    folder = tmp_path / "alone"
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"pad_token": "<filler>"}')
    alone = ClipTokenizer.from_folder(folder)
    assert (alone.pad_id, alone.vocab_size) == (len(VOCAB), len(VOCAB) + 1)
    assert alone.encode("a<filler>t", pad=False)[2] == len(VOCAB)


@pytest.mark.parametrize("sentinels", [0, 4])
def test_t5_reads_a_tokenizer_json_as_its_sentencepiece_model(
    spiece: Path, tmp_path: Path, sentinels: int
) -> None:
    folder = tmp_path / "alone"
    folder.mkdir()
    t5_tokenizer_json(spiece, sentinels).save(str(folder / "tokenizer.json"))
    alone = T5Tokenizer.from_folder(folder, 32)
    whole = T5Tokenizer(spiece, 32, sentinels)
    assert (alone.vocab_size, alone.pad_id, alone.end_id) == (
        *(whole.vocab_size, whole.pad_id, whole.end_id),
    )
    for text in TEXTS:
        assert alone.encode(text) == whole.encode(text), text


def test_the_older_files_go_before_a_tokenizer_json(clip_files: tuple[Path, Path]) -> None:
    folder = clip_files[0].parent
    (folder / "tokenizer.json").write_text("not read")
    assert len(ClipTokenizer.from_folder(folder).encode("cat")) == 77


def test_a_t5_file_with_rules_of_its_own_is_read_by_them(tmp_path: Path) -> None:
    """A normalizer that no sentencepiece model has: whoever wrote the file meant it."""
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    vocab += [("\u2581cat", -1.0), *((letter, -3.0) for letter in "cat")]
    tokenizer = Tokenizer(models.Unigram(vocab, 2, False))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    ids = T5Tokenizer.from_folder(tmp_path, 16).encode("CAT", pad=False)
    assert ids == [4, 1]


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "{}",
        '{"model": {"type": "WordPiece", "vocab": {}}}',
        '{"model": {"type": "BPE", "vocab": {"a": "b"}, "merges": []}}',
        '{"model": {"type": "BPE", "vocab": {"a": 1}, "merges": ["a b c"]}}',
        '{"model": {"type": "Unigram", "unk_id": 0, "vocab": [["a"]]}}',
        '{"model": {"type": "Unigram", "unk_id": null, "vocab": [["a", 0.0]]}}',
        '{"model": {"type": "Unigram", "unk_id": 0, "vocab": []}, "added_tokens": [{"id": -1}]}',
    ],
)
def test_a_tokenizer_json_that_is_none_is_named(content: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    for read in (ClipTokenizer.from_folder, lambda folder: T5Tokenizer.from_folder(folder, 8)):
        with pytest.raises(WeightsError) as error:
            read(tmp_path)
        assert str(path) in str(error.value)

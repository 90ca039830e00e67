"""Prompts that are longer than a model reads: where what is left out begins."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from fluxmesh import events
from fluxmesh.models.flux1.tokenizers import T5Tokenizer
from fluxmesh.models.flux2.tokenizer import FRAMES, ChatTokenizer
from fluxmesh.request import PromptCut, cut_of
from fluxmesh.weights import hub
from fluxmesh_coordinator.runtime.lent_hosts import HostBook
from fluxmesh_coordinator.server.picture_folder import PictureFolder
from fluxmesh_coordinator.server.queue.lane import Lane

PROMPT = "a red apple to the left of a dog on a yellow background "


@pytest.fixture(scope="module")
def tokenizer() -> T5Tokenizer:
    """That of `tiny`, which reads 32 tokens."""
    base = hub.resolve("tiny")
    return T5Tokenizer.from_folder(base.tokenizers["t5"], base.defaults.t5_max_length)


def words(text: str) -> int:
    """A token a word, and an end."""
    return len(text.split()) + 1


def test_a_prompt_that_fits_is_not_cut() -> None:
    assert cut_of("one two three", words, 4) is None
    assert cut_of("", words, 4) is None


def test_what_is_left_out_begins_with_the_first_word_that_is_not_read_whole() -> None:
    prompt = "one two  three four\nfive"
    cut = cut_of(prompt, words, 4)
    assert cut == PromptCut(tokens=6, kept=4, start=prompt.index("four"))
    assert cut.sentence(prompt) == (
        "The model reads 4 of the 6 tokens of the prompt; left out is all from “four five” on."
    )


def test_a_text_without_spaces_is_cut_between_its_letters() -> None:
    prompt = "狐狸在桌子上" * 10
    cut = cut_of(prompt, lambda text: len(text) + 1, 21)
    assert cut is not None and cut.start == 20


def test_a_long_rest_is_told_by_its_first_words() -> None:
    prompt = "one two " + "and a further word " * 20
    cut = cut_of(prompt, words, 3)
    assert cut is not None
    assert cut.sentence(prompt).endswith("“and a further word and a further word and a …” on.")


@given(st.text("abc .,!\n狐é", max_size=200))
def test_what_is_read_is_what_the_kept_words_alone_give(tokenizer: T5Tokenizer, text: str) -> None:
    cut = tokenizer.cut(text)
    whole = tokenizer.encode(text, pad=False)
    if cut is None:
        assert tokenizer.encode(text, pad=False) == tokenizer.encode(text)[: len(whole)]
        return
    assert cut.kept == tokenizer.max_length == len(whole) < cut.tokens
    assert text[cut.start :].strip()
    assert tokenizer.cut(text[: cut.start]) is None
    read = tokenizer.encode(text[: cut.start], pad=False)[:-1]
    assert whole[: len(read) - 1] == read[:-1]  # the last may be part of a word that is divided


def test_the_word_that_is_named_is_the_first_that_is_not_read_whole(tokenizer: T5Tokenizer) -> None:
    prompt = PROMPT * 3
    cut = tokenizer.cut(prompt)
    assert cut is not None and prompt[cut.start - 1] == " "
    assert tokenizer.cut(prompt[: cut.start]) is None
    assert tokenizer.cut(prompt[: prompt.index(" ", cut.start)]) is not None


def test_an_event_says_nothing_of_a_prompt_that_is_read_whole() -> None:
    assert events.Encoded("dogs", 0.1, cached=False).dropped == ""


def test_a_prompt_of_just_as_many_tokens_as_are_read_is_not_cut(tokenizer: T5Tokenizer) -> None:
    prompt = " ".join(["dog"] * (tokenizer.max_length - 1))
    assert len(tokenizer.encode(prompt, pad=False)) == tokenizer.max_length
    assert tokenizer.cut(prompt) is None
    cut = tokenizer.cut(f"{prompt} cat")
    assert cut == PromptCut(tokenizer.max_length + 1, tokenizer.max_length, len(prompt) + 1)


@pytest.mark.parametrize("kind", ["qwen3", "mistral3"])
def test_a_chat_s_frame_counts_where_it_comes_before_the_prompt(kind: str) -> None:
    """A token a word and a sign, so that what is read can be counted by hand."""
    frame = FRAMES[kind]
    model = Tokenizer(models.WordLevel({"?": 0, frame.pad_token: 1}, unk_token="?"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    before = len(frame.before.split())
    tokenizer = ChatTokenizer(model, frame, max_length=before + 4)
    prompt = " one two three four"
    assert tokenizer.cut(prompt) is None
    cut = tokenizer.cut(f"{prompt} five six")
    assert cut is not None and cut.start == len(prompt) + 1
    assert (cut.tokens, cut.kept) == (before + 6, before + 4)


def test_a_server_tells_its_client_how_much_is_read_of_either_text(tmp_path: Path) -> None:
    def events_of(*_asked: Any) -> Iterator[events.Event]:
        cut = {"tokens": 9, "kept": 7, "dropped": "dogs"}
        more = {f"negative_{name}": value for name, value in (cut | {"tokens": 12}).items()}
        yield events.Encoded("two dogs", 0.1, cached=False, **cut, **more)  # type: ignore[arg-type]

    lane = Lane(PictureFolder(tmp_path))
    painter = SimpleNamespace(start=events_of, record=None)
    painters: Any = SimpleNamespace(using=lambda: nullcontext((painter, HostBook([0]))))
    lane.painters = painters
    model, request = SimpleNamespace(is_changed=False), SimpleNamespace(n_images=1)
    resolved = SimpleNamespace(model=model, request=request)
    job: Any = SimpleNamespace(
        ready=SimpleNamespace(recipe=None, recipe_read=lambda _: None), spread=None, lent=None,
        is_cancelled=False, parts=lambda: [(0, resolved)],
    )  # fmt: skip
    said: list[str] = []
    lane.paint(job, lambda kind, fields: said.append(fields["text"]))
    assert said == [
        f"The model reads 7 of the {tokens} tokens of the {what}."
        for tokens, what in ((9, "prompt"), (12, "negative prompt"))
    ]

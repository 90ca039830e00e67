"""openai-python, as people write against it, before a real server with a key and a FLUX.2 model.

`test_serve.py` has the embedded checkpoint and a server's life, `test_serve_deaths.py` what dies
under a stream. Here is one server for all tests.
"""

from __future__ import annotations

import asyncio
import base64
import io
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import openai
import pytest
from openai.types import ImagesResponse
from PIL import Image

from tests.flux2_checkpoint import make_flux2
from tests.integration.conftest import Run, environment
from tests.server_process import ServerProcess, server

KEY = "the-key-of-these-clients"
HEAD = {"authorization": f"Bearer {KEY}"}
PATIENCE = 60.0  # seconds
Small = dict[str, Any]


def small(seed: int = 7, steps: int = 2) -> Small:
    """Settings of a picture that a CPU paints at once."""
    return {"size": "64x64", "extra_body": {"steps": steps, "seed": seed}}


@pytest.fixture(scope="module")
def klein(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model that takes references."""
    return make_flux2(tmp_path_factory.mktemp("models") / "my-klein")


@pytest.fixture(scope="module")
def running(klein: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("serve")
    key = folder / "key"
    key.touch(mode=0o600)
    key.write_text(f"{KEY}\n")
    options = ("--model", klein, "--key-file", key)
    # 200 steps are not over before a test comes to cancel them, or has filled the line behind them.
    env = environment(folder) | {"FLUXMESH_DELAYS": "step=0.2"}
    with server(*options, environment=env, folder=folder) as process:
        yield process
        process.signal()
        assert process.ended() == 0
        assert "Traceback" not in process.log


@pytest.fixture
def client(running: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key=KEY, max_retries=0) as made:
        yield made


def pictures_of(reply: ImagesResponse) -> list[bytes]:
    assert reply.data is not None
    return [base64.b64decode(entry.b64_json or "") for entry in reply.data]


def pixels_of(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as picture:
        return np.asarray(picture.convert("RGB"))


def png(colour: int = 200, *, half_transparent: bool = False) -> bytes:
    """64 x 64; as a mask, its upper half is what is painted anew."""
    pixels = np.full((64, 64, 4), 255, np.uint8)
    pixels[:, :, 0] = np.arange(64) * 4
    pixels[:, :, 1] = colour
    if half_transparent:
        pixels[:32, :, 3] = 0
    out = io.BytesIO()
    Image.fromarray(pixels if half_transparent else pixels[:, :, :3]).save(out, "PNG")
    return out.getvalue()


def wait_for(is_so: Callable[[], bool]) -> None:
    limit = time.monotonic() + PATIENCE
    while not is_so():
        assert time.monotonic() < limit
        time.sleep(0.02)


def queue(running: ServerProcess) -> list[dict[str, Any]]:
    entries = httpx2.get(f"{running.url}/api/status", headers=HEAD).json()["queue"]
    assert isinstance(entries, list)
    return entries


def is_in_line(running: ServerProcess, count: int) -> Callable[[], bool]:
    """Whether so many jobs are there, one of which is painted."""

    def is_so() -> bool:
        states = [entry["state"] for entry in queue(running)]
        return len(states) == count and states.count("running") == 1

    return is_so


def test_one_and_three_in_base64_and_by_url_are_the_same_pictures(
    client: openai.OpenAI, running: ServerProcess
) -> None:
    three = client.images.generate(prompt="a dog", model="my-klein", n=3, **small(seed=6))
    assert three.size == "64x64" and three.output_format == "png"
    assert three.usage is not None and three.usage.total_tokens == 0
    made = pictures_of(three)
    assert len(set(made)) == 3 and all(pixels_of(data).shape == (64, 64, 3) for data in made)
    (second,) = pictures_of(client.images.generate(prompt="a dog", **small(seed=7)))
    assert second == made[1]
    by_url = client.images.generate(prompt="a dog", response_format="url", **small(seed=8))
    assert by_url.data is not None
    url = by_url.data[0].url or ""
    assert url.startswith(f"{running.url}/api/pictures/") and KEY not in url
    assert httpx2.get(url.partition("?")[0]).status_code == 401
    answer = httpx2.get(url, follow_redirects=False)  # as a browser does, which has no key
    assert answer.headers["content-type"] == "image/png"
    assert np.array_equal(pixels_of(answer.content), pixels_of(made[2]))


@pytest.mark.parametrize("kind", ["image_generation", "image_edit"])
def test_a_stream_s_partial_pictures_open_and_its_last_event_is_the_picture(
    client: openai.OpenAI, kind: str
) -> None:
    """As many as were asked for, numbered from 0, each as large as the picture."""
    asked: Any = {"prompt": "a dog", **small(steps=8)}
    image = {"image": ("a.png", png(), "image/png")}
    if kind == "image_generation":
        events = list(client.images.generate(**asked, stream=True, partial_images=2))
        (whole,) = pictures_of(client.images.generate(**asked))
    else:
        events = list(client.images.edit(**image, **asked, stream=True, partial_images=2))
        (whole,) = pictures_of(client.images.edit(**image, **asked))
    partial, done = f"{kind}.partial_image", f"{kind}.completed"
    assert [event.type for event in events] == [partial, partial, done]
    assert [getattr(event, "partial_image_index", None) for event in events] == [0, 1, None]
    shown = [base64.b64decode(event.b64_json) for event in events]
    assert all(pixels_of(data).shape == (64, 64, 3) for data in shown)
    assert shown[-1] == whole
    assert len({pixels_of(data).tobytes() for data in shown}) == 3


def test_a_mask_of_alpha_keeps_what_is_opaque_to_the_byte(client: openai.OpenAI) -> None:
    mask = ("mask.png", png(half_transparent=True), "image/png")
    before = pixels_of(png())
    for image in (("a.png", png(), "image/png"), [("a.png", png(), "image/png")] * 2):
        reply = client.images.edit(image=image, mask=mask, prompt="a dog", **small())
        after = pixels_of(pictures_of(reply)[0])
        assert np.array_equal(after[32:], before[32:])
        assert not np.array_equal(after[:32], before[:32])


def test_two_references_are_both_looked_at_as_the_command_line_does(
    client: openai.OpenAI, fluxmesh: Run, tmp_path: Path, klein: Path
) -> None:
    def edit(*colours: int) -> bytes:
        image = [(f"{k}.png", png(colour), "image/png") for k, colour in enumerate(colours)]
        (data,) = pictures_of(client.images.edit(image=image, prompt="a dog", **small()))
        return data

    both = edit(200, 40)
    assert len({both, edit(200, 90), edit(90, 40), edit(200)}) == 4  # each of them counts
    for name, colour in (("first", 200), ("second", 40)):
        (tmp_path / f"{name}.png").write_bytes(png(colour))
    options = ("--model", klein, "--image-size", "64x64", "--steps", 2, "--seed", 7)
    references = ("--reference", "first.png", "--reference", "second.png")
    done = fluxmesh("generate", "a dog", *options, *references, "--output", "dog.png")
    assert done.code == 0, done.err
    assert np.array_equal(pixels_of(both), pixels_of((tmp_path / "dog.png").read_bytes()))


def test_a_model_is_chosen_by_its_name_and_any_other_name_is_the_loaded_one(
    client: openai.OpenAI, running: ServerProcess
) -> None:
    assert [model.id for model in client.models.list()] == ["my-klein", "tiny", "tiny-klein"]
    assert client.models.retrieve("tiny").owned_by == "fluxmesh"
    with pytest.raises(openai.NotFoundError) as missing:
        client.models.retrieve("dall-e-2")
    assert missing.value.code == "model_not_found"
    (own,) = pictures_of(client.images.generate(prompt="a dog", **small()))
    for name in ("dall-e-3", "gpt-image-1", "../../etc/passwd"):
        (mapped,) = pictures_of(client.images.generate(prompt="a dog", model=name, **small()))
        assert mapped == own
    (tiny,) = pictures_of(client.images.generate(prompt="a dog", model="tiny", **small()))
    assert tiny != own


@pytest.mark.parametrize(
    ("wrong", "setting"),
    [
        ({"prompt": "dog " * 8001}, "prompt"),
        ({"prompt": "   "}, "prompt"),
        ({"prompt": "x", "n": 11}, "n"),
        ({"prompt": "x", "size": "8192x8192"}, "size"),
        ({"prompt": "x", "output_compression": 200}, "output_compression"),
        ({"prompt": "x", "extra_body": {"loras": ["../robot"]}}, "loras"),
    ],
)
def test_what_can_t_be_done_is_a_bad_request_that_names_its_setting(
    client: openai.OpenAI, wrong: dict[str, Any], setting: str
) -> None:
    for stream in (False, True):  # refused before a stream begins: with a status, as OpenAI does
        with pytest.raises(openai.BadRequestError) as refused:
            client.images.generate(**wrong, stream=stream)
        error = refused.value
        assert (error.param, error.type) == (setting, "invalid_request_error")
        assert isinstance(error.body, dict) and error.body["message"].endswith(".")


def test_what_is_no_picture_is_a_bad_request(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.images.edit(image=("a.png", b"a cat, in words", "image/png"), prompt="x")
    assert refused.value.param == "image"


def test_a_wrong_key_is_an_authentication_error(running: ServerProcess) -> None:
    base = f"{running.url}/v1"
    with openai.OpenAI(base_url=base, api_key="a-guess", max_retries=0) as stranger:
        for ask in (
            lambda: stranger.images.generate(prompt="a dog"),
            lambda: stranger.images.edit(image=("a.png", png(), "image/png"), prompt="a dog"),
            stranger.models.list,
        ):
            with pytest.raises(openai.AuthenticationError) as refused:
                ask()
            assert refused.value.code == "wrong_key" and KEY not in str(refused.value)


def test_a_stream_whose_job_is_cancelled_ends_with_an_error_that_is_raised(
    client: openai.OpenAI, running: ServerProcess
) -> None:
    id = "cancelled-by-another"
    events = client.images.generate(
        prompt="a dog", stream=True, partial_images=1, extra_headers={"idempotency-key": id},
        size="128x128", extra_body={"steps": 200},
    )  # fmt: skip
    wait_for(lambda: any(entry["state"] == "running" for entry in queue(running)))
    assert httpx2.delete(f"{running.url}/api/jobs/{id}", headers=HEAD).status_code == 204
    with pytest.raises(openai.APIError, match="The job was cancelled") as raised:
        list(events)
    assert raised.value.code == "cancelled"


def test_several_at_once_each_get_their_own_picture(
    client: openai.OpenAI, running: ServerProcess
) -> None:
    async def ask() -> list[bytes]:
        async with openai.AsyncOpenAI(base_url=f"{running.url}/v1", api_key=KEY) as several:
            replies = await asyncio.gather(
                *(
                    several.images.generate(prompt="a dog", user=f"user {k % 3}", **small(seed=k))
                    for k in range(6)
                )
            )
        return [data for reply in replies for data in pictures_of(reply)]

    made = asyncio.run(asyncio.wait_for(ask(), PATIENCE))
    at_once = pictures_of(client.images.generate(prompt="a dog", n=6, **small(seed=0)))
    assert made == at_once and len(set(made)) == 6


def test_a_full_line_is_a_rate_limit_error_and_whoever_goes_away_makes_room(
    client: openai.OpenAI, running: ServerProcess
) -> None:
    long: Any = {"size": "128x128", "user": "many", "extra_body": {"steps": 200, "seed": 1}}

    async def fill() -> openai.RateLimitError:
        base = f"{running.url}/v1"
        async with openai.AsyncOpenAI(base_url=base, api_key=KEY, max_retries=0) as many:
            waiting = []
            for count in (1, 17):  # one is painted, sixteen wait
                while len(waiting) < count:
                    again = many.images.generate(prompt="a dog", **long)
                    waiting.append(asyncio.create_task(again))
                await asyncio.to_thread(wait_for, is_in_line(running, count))
            with pytest.raises(openai.RateLimitError) as refused:
                await many.images.generate(prompt="a dog", **long)
            # Who else asks from this machine is let in, and painted in turn.
            other = asyncio.create_task(
                many.images.generate(prompt="a dog", **{**long, "user": "another"})
            )
            await asyncio.to_thread(wait_for, is_in_line(running, 18))
            for task in (*waiting, other):
                task.cancel()
            await asyncio.gather(*waiting, other, return_exceptions=True)
        return refused.value

    refused = asyncio.run(fill())
    assert refused.code == "queue_full" and refused.type == "rate_limit_error"
    assert int(refused.response.headers["retry-after"]) >= 1
    wait_for(lambda: queue(running) == [])
    assert pictures_of(client.images.generate(prompt="a dog", **small()))

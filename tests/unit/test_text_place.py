"""Which host reads the prompt, and how: by memory and speed, in turns, layer by layer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from fluxmesh.cluster.snapshot import (
    Holding,
    HostInfo,
    ModelVariant,
    TextHolding,
    TextTiming,
    Timings,
    prompt_mark,
)
from fluxmesh.models import registry
from fluxmesh.planning.candidates import read_elsewhere
from fluxmesh.planning.plan import Plan, plan
from fluxmesh.planning.text_place import TextPlace
from fluxmesh.planning.workload import ModelSizes, Workload
from fluxmesh.request import FilledRequest, GenerateRequest
from tests.unit.meshes import GB, full, mac, reading, won

DEV = ModelSizes(registry.published("flux2-dev"))
KLEIN = ModelSizes(registry.published("flux2-klein-4b"))
GIB = 1 << 30


def ask_dev(sizes: ModelSizes = DEV, **keys: Any) -> FilledRequest:
    return sizes.fill(GenerateRequest(**{"prompt": "a cat", "seed": 0, "model": "m", **keys}))


def bare(rank: int, memory: int, **keys: Any) -> HostInfo:
    """A host with nothing in memory."""
    free = {"memory_bytes": memory * GB, "free_bytes": memory * GB}
    return mac(rank, **{**free, "holds": None, **keys})


def holding(shards: int = 1, shard: int = 0, text: int = 0, **keys: Any) -> Holding:
    """Of the denoiser that `ask_dev(**keys)` wants, and `text` bytes of encoders beside it."""
    work = Workload.of(ask_dev(**keys), DEV)
    nbytes = work.transformer.on_each_of(shards) + work.autoencoder_bytes + text
    return Holding(weights=work.weights, nbytes=nbytes, shards=shards, shard=shard)


def chosen(*hosts: HostInfo, sizes: ModelSizes = DEV, **keys: Any) -> Plan:
    return plan(ask_dev(sizes, **keys), full(*hosts), sizes)


def place(choice: Plan) -> TextPlace:
    text = won(choice).text
    assert text is not None
    return text


# What is counted, against the tables that were made of the published configs


@pytest.mark.parametrize(
    ("model", "gib", "tflop"),
    [
        ("flux2-klein-4b", (5.8 - 0.72, 3.1 - 0.72 / 2, 1.6 - 0.72 / 4), 2.8),
        ("flux2-klein-9b", (10.9 - 1.16, 5.8 - 1.16 / 2, 3.1 - 1.16 / 4), 5.3),
        ("flux2-dev", (32.3 - 1.25, 17.2 - 1.25 / 2, 9.1 - 1.25 / 4), 17.1),
    ],
)
def test_text_encoders_are_counted_as_their_configs_say(
    model: str, gib: tuple[float, ...], tflop: float
) -> None:
    """Without the embedding, whose rows are looked up in the file."""
    sizes = registry.published(model)
    for bits, size in zip((None, 8, 4), gib, strict=True):
        assert sizes.nbytes(("text",), "bfloat16", bits) / GIB == pytest.approx(size, rel=0.05)
    assert sizes.text_flops() / 1e12 == pytest.approx(tflop, rel=0.02)


@pytest.mark.parametrize(("bits", "gib"), [(None, 60.0), (8, 31.9), (4, 16.9)])
def test_the_denoiser_of_dev_is_counted_as_its_config_says(bits: int | None, gib: float) -> None:
    work = Workload.of(ask_dev(bits=bits), DEV)
    assert sum(work.transformer) / GIB == pytest.approx(gib, rel=0.07)


def test_a_base_model_reads_two_texts() -> None:
    """One of them to move away from, as two calls a step do."""
    base = ModelSizes(registry.published("flux2-klein-base-4b"))
    times = [
        place(chosen(bare(0, 100), sizes=sizes, steps=4)).encode_seconds for sizes in (KLEIN, base)
    ]
    assert times[1] == pytest.approx(2 * times[0])


def test_bits_of_text_change_the_text_encoders_alone() -> None:
    half = Workload.of(ask_dev(text_bits=4), DEV)
    assert half.text_bytes < Workload.of(ask_dev(bits=8), DEV).text_bytes
    assert half.transformer == Workload.of(ask_dev(), DEV).transformer


# Where


def test_text_is_read_by_another_host_where_rank_0_is_full_of_its_shard() -> None:
    view = (bare(0, 40), bare(1, 80))
    assert reading(chosen(*view)) == (1, "stays")
    assert reading(chosen(bare(0, 80), bare(1, 40))) == (0, "stays")


def test_the_host_that_has_the_encoders_in_memory_reads() -> None:
    text = TextHolding(weights=ModelVariant("m"), nbytes=33 * GB)
    hosts = [
        mac(0, holds=holding(text=0)),
        mac(1, holds=holding(text=33 * GB), text=text),
    ]
    choice = chosen(*hosts)
    assert reading(choice) == (1, "stays") and place(choice).load_seconds == 0


def test_a_remembered_prompt_costs_nothing_and_is_asked_for_where_it_is_remembered() -> None:
    marks = (prompt_mark("a dog"), prompt_mark("a cat"))
    text = TextHolding(weights=ModelVariant("m"), prompts=marks)
    hosts = [bare(0, 200), bare(1, 200, text=text)]
    choice = chosen(*hosts)
    assert reading(choice) == (1, "remembered")
    assert place(choice).seconds == won(choice).text_seconds == 0
    assert reading(chosen(*hosts, prompt="a fox"))[1] == "stays"
    assert reading(chosen(*hosts, text_bits=4))[1] == "stays"  # others' features
    assert reading(chosen(*hosts, t5_padding=False))[1] == "stays"


def test_the_faster_host_reads_as_it_was_measured_or_by_its_speed() -> None:
    warm = {"holds": holding(), "memory_bytes": 300 * GB, "free_bytes": 200 * GB}
    fast, slow = mac(1, flops_per_second=52e12, **warm), mac(0, flops_per_second=13e12, **warm)
    assert reading(chosen(slow, fast)) == (1, "stays")
    assert place(chosen(slow, fast)).figure == "arithmetic"
    ratio = DEV.architecture.text_flops() / 52e12
    assert place(chosen(slow, fast)).encode_seconds == pytest.approx(ratio)
    view = full(slow, fast)
    texts = tuple(
        TextTiming(rank=rank, model="m", dtype="bfloat16", bits=None, seconds=seconds)
        for rank, seconds in ((0, 0.5), (1, 9.0))
    )
    choice = plan(ask_dev(), replace(view, timings=Timings(texts=texts)), DEV)
    assert reading(choice) == (0, "stays")
    assert (place(choice).encode_seconds, place(choice).figure) == (0.5, "measured")


def test_a_host_that_is_idle_reads_while_the_fast_one_loads() -> None:
    fast, slow = bare(1, 300, flops_per_second=52e12), bare(0, 300, flops_per_second=13e12)
    choice = chosen(slow, fast)
    assert (won(choice).ranks, reading(choice)) == ((1,), (0, "stays"))


def test_of_equal_readers_one_that_paints_is_taken_so_that_no_other_is_leased() -> None:
    warm = {"holds": holding(), "memory_bytes": 300 * GB, "free_bytes": 200 * GB}
    view = full(mac(0, **warm), mac(1, flops_per_second=52e12, **warm))
    texts = tuple(
        TextTiming(rank=rank, model="m", dtype="bfloat16", bits=None, seconds=0.5)
        for rank in range(2)
    )
    choice = plan(ask_dev(), replace(view, timings=Timings(texts=texts)), DEV, placement="data")
    assert (won(choice).ranks, reading(choice)) == ((1,), (1, "stays"))


def test_a_host_that_others_have_is_not_waited_for_where_another_reads() -> None:
    hosts = (bare(0, 300, busy_seconds=500.0), bare(1, 300))
    assert reading(chosen(*hosts))[0] == 1


# How


def test_text_and_denoiser_take_turns_on_a_host_that_holds_one_of_them() -> None:
    """FLUX.1's are read as a whole: layer by layer is FLUX.2's."""
    from tests.unit.meshes import FLUX, ask, held

    view = full(mac(0, memory_bytes=30 * GB, holds=held(), text=None))
    choice = plan(ask(), view, FLUX)
    text = place(choice)
    assert (text.way, text.makes_room) == ("turns", True)
    assert text.reload_seconds == pytest.approx(8.0, rel=0.01)  # 24 GB at 3 GB/s
    again = text.load_seconds + text.encode_seconds + text.reload_seconds
    assert text.again_seconds == pytest.approx(again)
    assert won(choice).text_seconds == pytest.approx(again)
    first = plan(ask(), full(mac(0, memory_bytes=30 * GB, holds=None)), FLUX)
    assert not place(first).makes_room and place(first).reload_seconds == 0
    assert place(first).again_seconds == pytest.approx(again)  # then it would be in the way
    usage = won(choice).usage[0]
    assert usage.text < usage.available < usage.text + usage.denoise


def test_what_fits_no_host_is_read_layer_by_layer_beside_the_denoiser() -> None:
    hosts = [bare(rank, 27, holds=holding(4, rank)) for rank in range(4)]
    hosts = [replace(host, free_bytes=27 * GB - host.held_bytes) for host in hosts]
    choice = chosen(*hosts)
    text = place(choice)
    assert (text.way, text.makes_room) == ("layers", False)
    assert text.nbytes < 1.5 * GB  # 556 M numbers and what they compute
    assert text.load_seconds == pytest.approx(33.3 / 3, rel=0.01)  # the file, each time
    assert text.again_seconds == pytest.approx(text.seconds)
    assert all(max(host.text, host.denoise, host.decode) <= 27 * GB for host in won(choice).usage)


def test_layers_are_preferred_to_turns_where_the_denoiser_would_load_again() -> None:
    hosts = [bare(rank, 48) for rank in range(2)]
    assert reading(chosen(*hosts)) == (0, "layers")
    assert reading(chosen(*hosts, text_bits=4)) == (0, "stays")


def test_encoders_of_earlier_prompts_leave_a_host_that_needs_the_room() -> None:
    text = TextHolding(weights=ModelVariant("m"), nbytes=33 * GB)
    tight = bare(0, 48, text=text, free_bytes=15 * GB)
    choice = chosen(tight, bare(1, 48))
    assert won(choice).text_leaves == (0,)
    roomy = bare(0, 200, text=text, free_bytes=167 * GB)
    assert won(chosen(roomy, bare(1, 48))).text_leaves == ()


def test_where_no_host_can_even_run_a_layer_nothing_is_promised() -> None:
    choice = chosen(bare(0, 1), sizes=KLEIN, height=256, width=256)
    assert choice.winner is None


def test_preloading_asks_for_all_of_it_beside_the_rest() -> None:
    choice = chosen(*(bare(rank, 48) for rank in range(2)), preload=True)
    assert choice.winner is None
    assert "33.3 GB for the text encoders beside the rest" in choice.reason
    assert reading(chosen(*(bare(rank, 90) for rank in range(2)), preload=True))[1] == "stays"


def test_a_prompt_that_is_read_needs_nobody() -> None:
    choice = plan(ask_dev(), full(bare(0, 40), bare(1, 40)), DEV, is_read=True)
    assert (place(choice).nbytes, won(choice).text_seconds) == (0, 0)


# After a loss


def test_another_host_reads_where_the_first_was_lost_and_the_same_where_there_is_none() -> None:
    work = Workload.of(ask_dev(), DEV)
    view = full(bare(0, 40), bare(1, 80), bare(2, 100))
    option = won(plan(ask_dev(), view, DEV))
    assert option.text is not None
    other = read_elsewhere(work, view, option, option.text.rank)
    assert other is not None and other.rank != option.text.rank
    alone = replace(view, hosts=view.hosts[2:])
    same = read_elsewhere(work, alone, option, 2)
    assert same is not None and same.rank == 2
    assert read_elsewhere(work, replace(view, hosts=()), option, 2) is None

"""A ring that ends in the middle of an image: all ranks have run the same collectives."""

from __future__ import annotations

import json

import pytest

from tests.parallel.ring import run_ranks


@pytest.mark.parametrize("devices", ["cuda,cuda", "cuda,cpu", "cpu,cuda", "cuda,metal", "cpu,cpu"])
def test_what_one_rank_begins_early_no_other_misses(tmp_path, devices):
    # A ring that looks ahead hears a step later that it should stop.
    stopped = 2 if "metal" in devices else 3
    for out in run_ranks(2, [devices], tmp_path, 120.0, program="ending"):
        ends = json.loads(out.with_suffix(".json").read_text())
        for placement in ("sequence", "tensor"):
            for way, cut in (("stopped", stopped), ("not finite", 2)):
                assert ends.pop(f"{placement}, {way}") == {
                    "whole": 6,
                    "cut": cut,
                    "gathered": [0, 1],
                    "is_same": True,
                }
        assert not ends

"""Is a step on hosts joined by slow cables as long as predicted, and is the fastest way chosen?

    sudo python -m benchmarks.emulated              # ten meshes; fails where fewer than nine hold
    sudo python -m benchmarks.emulated --small      # one, to try this program

A mesh that one machine of two processors can hold, of two or three hosts, all of them real in what
they send, and none in what it computes:

- *Emulated: computing.* A rank waits as long as it would compute. How long, was measured here: the
  tree's own transformers were run as that rank, alone, with collectives that send nothing, and each
  piece between two collectives timed in seconds of the processor (`steps.py`). So a rank's
  pieces have the proportions that this machine's processor gives them, what is not split included;
  the planner's constants have no part in it. How fast a host is was chosen: it makes a step of
  `tiny` at 128x128 alone in 2.5 ms, a slowed one takes twice as long for everything.
- *Emulated: time.* All of it runs `SLOWER` times slower than it says, computing and cables alike: a
  cable of 1 Gb/s carries 1.25 MB/s. Then what the machine itself takes to send and to wake up is
  small beside it, as it is beside a cable of a real mesh; so is a cable's latency, which no real
  mesh would have as small.
- *Real: what travels, and when.* Processes in network namespaces, a ring of MLX between them, links
  that the kernel limits (`limited.py`), collectives in the number, order and sizes of the model's,
  waited for as on a Mac, with that computed meanwhile which needs nothing of them.
- *Real: the planner.* It is told what a mesh would know: each host's step alone, and the ring's
  collectives as engines time them (`engine/ring_probe.py`). Nothing of a step together.

For each mesh every way that the plan lists is walked, with the shares that the plan gives, and the
least of some steps counts. A mesh holds where every step is predicted within `NEAR`, and the plan's
choice for one image of `STEPS` steps is the fastest that was measured, or as good (`TIE`). What a
request does once is left out: reading the prompt, gathering modulations, decoding. Meshes that do
not hold are measured again, up to `--rounds` times in all, and of all rounds the least counts,
of collectives, pieces and steps: others on the machine can only make them longer.

Needs Linux, root, iproute2 and a C compiler, and says so where one is missing. Two or three minutes
on two processors with nothing else to do.
"""

from __future__ import annotations

import argparse
import itertools
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks import harness
from benchmarks.emulated.report import EmulatedSetting, MeshOutcome, report
from benchmarks.harness import Skipped, say

HOLD = 0.9  # of the meshes must

SETTINGS = (
    EmulatedSetting(2, 1, False, 64, "tiny"),
    EmulatedSetting(2, 1, True, 128, "tiny"),
    EmulatedSetting(2, 5, False, 128, "tiny"),
    EmulatedSetting(2, 5, True, 64, "klein"),
    EmulatedSetting(2, 10, True, 128, "klein"),
    EmulatedSetting(3, 1, False, 128, "klein"),
    EmulatedSetting(3, 5, False, 64, "tiny"),
    EmulatedSetting(3, 5, True, 128, "tiny"),
    EmulatedSetting(3, 10, False, 128, "tiny"),
    EmulatedSetting(3, 10, True, 128, "klein"),
)
SMALL = (EmulatedSetting(2, 10, False, 64, "tiny"),)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="one mesh, to try this program")
    parser.add_argument("--rounds", type=int, default=3, help="for meshes that do not hold")
    parser.add_argument("--json", type=Path, help="write everything measured into this file")
    options = parser.parse_args()
    # Who is told to end takes the namespaces away before.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("It was told to end."))
    os.environ.update({"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"})
    say(f"{harness.machine()}\n")
    try:
        outcomes = measured(SMALL if options.small else SETTINGS, options.rounds)
    except Skipped as reason:
        say(f"Left out, for no mesh can be emulated here: {reason}.")
        return
    say("\n" + report(outcomes))
    harness.write_json(options.json, [outcome.plain for outcome in outcomes])
    held = sum(outcome.holds for outcome in outcomes)
    if held < HOLD * len(outcomes):
        sys.exit(f"{held} of {len(outcomes)} meshes hold.")


def measured(settings: Sequence[EmulatedSetting], rounds: int) -> list[MeshOutcome]:
    """What came of each. Raises `Skipped` where namespaces can't be made."""
    from benchmarks.emulated.mesh import EmulatedMesh, LeastTimings, TracedModels

    outcomes: dict[EmulatedSetting, MeshOutcome] = {}
    models, known = TracedModels(), LeastTimings()
    start = time.monotonic()
    for number in range(rounds):
        left = [s for s in settings if s not in outcomes or not outcomes[s].holds]
        models.begin_round()
        for mesh, group in itertools.groupby(sorted(left), key=lambda setting: setting.mesh):
            hosts, gigabits = mesh
            emulated = EmulatedMesh(hosts, gigabits, models, known)
            for outcome in emulated.outcomes(list(group)):
                outcomes[outcome.setting] = outcome
                judged = "holds" if outcome.holds else "does NOT hold"
                spent = f"round {number + 1}, {time.monotonic() - start:.0f} s"
                say(f"{outcome.setting}: {judged} ({spent})")
    return [outcomes[setting] for setting in settings]


if __name__ == "__main__":
    main()

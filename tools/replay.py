"""Goes through a failed job once more, without hosts: its session hears again what it heard then.

    python -m tools.replay ~/.config/fluxmesh/failed-jobs/ID.msgpack          what was said
    python -m tools.replay --test ~/.config/fluxmesh/failed-jobs/ID.msgpack   a unit test that fails

Prints each input, when it came, and what the session tells hosts and user to do about it. Where
that isn't what it did then, the lines say so: this is another version, or a session is not pure.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fluxmesh.errors import UsageError
from fluxmesh_coordinator.jobs.input_log import brief
from fluxmesh_coordinator.jobs.replay import Replay, from_bytes
from fluxmesh_coordinator.jobs.types import Answered, Back, Gone, Input, Leased, Reported

TEST = '''\
"""A job that failed once: {error}

Put {name} beside this file.
"""

from pathlib import Path

from fluxmesh_coordinator.jobs.replay import from_bytes
from fluxmesh_coordinator.jobs.types import JobFinished, JobStuck


def test_job_{id}_comes_to_a_good_end() -> None:
    replay = from_bytes((Path(__file__).parent / "{name}").read_bytes())
    for now, event, instructions in replay:
        for instruction in instructions:
            assert not isinstance(instruction, JobStuck), (now, event, instruction)
            if isinstance(instruction, JobFinished):
                assert instruction.error is None, (now, event, instruction.error)
'''


def in_words(event: Input) -> str:
    """An input in a line."""
    match event:
        case Reported():
            return f"{event.rank} reports {event.report}"
        case Answered():
            return f"{event.rank} answers {type(event.request).__name__} with {event.answer}"
        case Gone():
            counts = "" if event.counts else ", while the coordinator stood still"
            return f"{event.rank} is gone{counts}: {event.reason}"
        case Back():
            return f"{event.host.rank} is back"
        case Leased():
            return f"leased {[host.rank for host in event.hosts]}"
    return str(event)


def show(replay: Replay) -> int:
    """Prints the whole job; 1 where the session does otherwise now."""
    print(f"fluxmesh {replay.version}: {replay.error}")
    log = replay.log
    if log.missing:
        print(f"{log.missing} inputs before these are lost; what the session did then is shown.")
        for noted in log.noted:
            print(f"{noted.now:10.3f}  {in_words(noted.event)}  ->  {', '.join(noted.said)}")
        return 0
    differences = 0
    for noted, (now, event, instructions) in zip(log.noted, replay, strict=True):
        said = tuple(map(brief, instructions))
        print(f"{now:10.3f}  {in_words(event)}  ->  {', '.join(said)}")
        if said != noted.said:
            differences += 1
            print(f"{'':10}  then: {', '.join(noted.said)}")
    print("The session does the same again." if not differences else f"{differences} differ.")
    return 1 if differences else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--test", action="store_true", help="print a unit test of it")
    options = parser.parse_args()
    try:
        replay = from_bytes(options.file.read_bytes())
    except (OSError, UsageError) as error:
        print(f"{options.file}: {error}", file=sys.stderr)
        return 2
    if not options.test:
        return show(replay)
    if replay.log.missing:
        print(f"{options.file}: {replay.log.missing} inputs are lost; no test.", file=sys.stderr)
        return 2
    name, job = options.file.name, options.file.stem.replace("-", "_")
    print(TEST.format(error=replay.error, name=name, id=job), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())

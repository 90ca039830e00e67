"""Does a change of the code change a picture, a recipe, an adapter or a line of `--json`?

    git worktree add ../before COMMIT
    python -m tools.same_pictures make ../before before.json
    python -m tools.same_pictures make . now.json
    python -m tools.same_pictures compare before.json now.json

`make` runs the command line of a tree in processes of its own: the 25 cases of `same_cases.py`
with no mesh up and on a mesh of three agents on loopback, and a training of 20 updates on each. It
writes what must stay the same: the SHA-256 of each picture's pixels and of its file, the recipe in
it, the SHA-256 of each tensor of the adapter, what the command said of its request and its files,
and which `--json` lines there were, with which fields. Times are in none of it. It takes some
minutes. `compare` prints what differs, and ends with 1 where anything does.

How many hosts a plan takes depends on what they measure, and `tensor` on two rounds otherwise than
on three. Pictures whose plans are not alike in that are counted apart, and not compared.

The interpreter is the one that runs this: both trees are measured with the same libraries.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from fluxmesh.storage.safetensors import read_header
from tests.ports import free_ports
from tools.same_cases import INPUTS, MODEL, PICTURES, TRAINING, write_inputs

HOSTS = 3
PATIENCE = 600.0  # seconds for one command
# Lines of `--json` whose values depend on the request alone; of the others the fields are compared.
FIXED = ("note", "start", "saved", "done", "error", "prepared", "dealt")
ACCIDENTS = ("hostlost", "queued")  # that a loaded machine alone can cause
Json = dict[str, Any]


@dataclass(frozen=True)
class CommandLine:
    """The command line of one tree, for a user who has nothing yet."""

    tree: Path
    folder: Path  # where commands run, and the user's home

    def run(self, *arguments: str) -> tuple[int, list[Json], str]:
        """Exit code, lines of `--json` and stderr."""
        done = subprocess.run(
            [sys.executable, "-m", "fluxmesh_coordinator", *arguments],
            cwd=self.folder,
            env=self.environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        return done.returncode, lines, done.stderr

    def environment(self) -> dict[str, str]:
        """Nothing of the user's, no network, one thread a process."""
        prefixes = ("FLUX", "HF_", "HUGGING", "XDG_", "MLX_")
        kept = {key: value for key, value in os.environ.items() if not key.startswith(prefixes)}
        paths = (self.tree, self.tree / "agent", self.tree / "coordinator")
        home = self.folder / "home"
        return kept | {
            "PYTHONPATH": os.pathsep.join(map(str, paths)),
            "HOME": str(home),
            "FLUXMESH_HOME": str(home / "config"),
            "FLUXMESH_STATE": str(home / "state"),
            "HF_HOME": str(home / "hub"),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("make", help="run a tree's commands, and write what came out")
    making.add_argument("tree", type=Path)
    making.add_argument("file", type=Path)
    making.add_argument("--only", nargs="+", metavar="CASE", help="of same_cases.py; or training")
    making.add_argument("--roads", nargs="+", choices=tuple(ROADS), default=list(ROADS))
    comparing = commands.add_parser("compare", help="print what differs")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("now", type=Path)
    options = parser.parse_args()
    if options.command == "compare":
        return compare(json.loads(options.before.read_text()), json.loads(options.now.read_text()))
    names = options.only or [*(case.name for case in PICTURES), "training"]
    results = {road: make(options.tree.resolve(), road, names) for road in options.roads}
    options.file.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    return 0


# What a tree makes


@contextmanager
def alone(_line: CommandLine) -> Iterator[None]:
    """No mesh is up: each command starts an agent of its own, or trains in its own process."""
    yield


@contextmanager
def three(line: CommandLine) -> Iterator[None]:
    """A mesh of three agents on loopback, which hold the model."""
    hosts = [
        {"ssh": "127.0.0.1", "ips": ["127.0.0.1"], "control": f"127.0.0.1:{port}"}
        for port in free_ports(HOSTS)
    ]
    (line.folder / "mesh.json").write_text(json.dumps(hosts))
    code, _, stderr = line.run("up", "mesh.json", "--model", MODEL)
    if code:
        raise SystemExit(f"The mesh did not come up: {stderr}")
    try:
        yield
    finally:
        line.run("down", "--force")


ROADS = {"alone": alone, "three": three}


def make(tree: Path, road: str, names: Iterable[str]) -> Json:
    """Results of one road by case, and the fields of the lines that were said on it."""
    folder = Path(tempfile.mkdtemp(prefix="fluxmesh-same-"))
    line = CommandLine(tree, folder)
    write_inputs(folder / INPUTS)
    (folder / "home").mkdir()
    results: Json = {}
    painting: list[Json] = []
    training: list[Json] = []
    try:
        with ROADS[road](line):
            for case in PICTURES:
                if case.name in names:
                    (folder / case.name).mkdir()
                    command = case.command(on_mesh=road != "alone")
                    results[case.name] = timed(line, road, case.name, command, painting)
            if "training" in names:
                result = timed(line, road, "training", TRAINING, training)
                result["tensors"] = tensors_of(folder / "trained" / "final_adapters.safetensors")
                results["training"] = result
    finally:
        shutil.rmtree(folder)
    return {**results, "lines": {"generate": fields_of(painting), "train": fields_of(training)}}


def timed(line: CommandLine, road: str, name: str, command: list[str], said: list[Json]) -> Json:
    """One command's code, values and pictures; its lines go to `said`."""
    start = time.monotonic()
    code, lines, stderr = line.run(*command)
    print(f"{road:6} {name:10} {time.monotonic() - start:5.1f} s, exit {code}", file=sys.stderr)
    said += lines
    folder = line.folder / ("trained" if name == "training" else name)
    return {
        "exit": code,
        "problem": stderr if code else "",
        "values": sorted(line_as_text(each) for each in lines if each["event"] in FIXED),
        "plans": [
            f"{each['placement']} on {', '.join(map(str, each['hosts']))}"
            for each in lines
            if each["event"] == "planned"
        ],
        "pictures": {
            str(path.relative_to(line.folder)): picture_of(path)
            for path in sorted(folder.rglob("*.png"))
        },
    }


def line_as_text(line: Json) -> str:
    """A line; files in order of their names, for hosts finish them in any."""
    files = {"files": sorted(line["files"])} if "files" in line else {}
    return json.dumps(line | files, sort_keys=True)


def picture_of(path: Path) -> Json:
    """What must stay the same of a PNG; `file` is the hash of all its bytes."""
    with Image.open(path) as image:
        pixels = np.asarray(image)
        recipe = json.loads(getattr(image, "text", {}).get("fluxmesh", "null"))
    return {
        "size": "x".join(map(str, pixels.shape)),
        "pixels": hashlib.sha256(pixels.tobytes()).hexdigest(),
        "file": hashlib.sha256(path.read_bytes()).hexdigest(),
        "recipe": recipe,
    }


def tensors_of(path: Path) -> dict[str, str]:
    """dtype, shape and SHA-256 of each tensor of a safetensors file; none where it is missing."""
    if not path.exists():
        return {}
    data = path.read_bytes()
    return {
        key: f"{entry.dtype} {list(entry.shape)} "
        + hashlib.sha256(data[entry.begin : entry.end]).hexdigest()
        for key, entry in read_header(path).entries.items()
    }


def fields_of(lines: Iterable[Json]) -> dict[str, dict[str, list[str]]]:
    """By event, every field that any line had, with the types of its values."""
    shape: dict[str, dict[str, set[str]]] = {}
    for line in lines:
        if line["event"] in ACCIDENTS:
            continue
        fields = shape.setdefault(line["event"], {})
        for name, value in line.items():
            fields.setdefault(name, set()).add(type(value).__name__)
    return {event: {name: sorted(t) for name, t in f.items()} for event, f in shape.items()}


# What differs


def compare(before: Json, now: Json) -> int:
    """Prints a table of what differs; 1 where anything does, 0 where nothing does."""
    apart = set_apart(before, now)
    table = Table("where", "before", "now", show_lines=True)
    for where, old, new in differences(before, now):
        table.add_row(where, str(old)[:400], str(new)[:400])
    pictures = sum(len(case.get("pictures", ())) for road in now.values() for case in road.values())
    if table.row_count:
        Console().print(table)
    for where, plans in apart.items():
        print(f"{where}: not compared, planned as {plans[0]} before and {plans[1]} now.")
    print(f"{pictures - len(apart)} pictures compared; differences: {table.row_count}.")
    return 1 if table.row_count else 0


def set_apart(before: Json, now: Json) -> dict[str, tuple[list[str], list[str]]]:
    """Takes away the bytes of pictures that more or fewer hosts made, and which ranks made any.

    Returns the plans of those pictures by their place.
    """
    apart: dict[str, tuple[list[str], list[str]]] = {}
    for road in before.keys() & now.keys():
        for name in sorted(before[road].keys() & now[road].keys()):
            cases = before[road][name], now[road][name]
            plans = [case.pop("plans", []) for case in cases]
            if not all(plans) or len({tuple(map(kind_of, each)) for each in plans}) == 1:
                continue
            for path in sorted(cases[0]["pictures"].keys() & cases[1]["pictures"].keys()):
                apart[f"{road} / {path}"] = (plans[0], plans[1])
                for case in cases:
                    case["pictures"][path] |= {"pixels": "", "file": ""}
    return apart


def kind_of(plan: str) -> tuple[str, int]:
    """("tensor", 2) for "tensor on 0, 2"; by `data` the number of hosts changes no byte."""
    placement, _, hosts = plan.partition(" on ")
    return placement, 1 if placement == "data" else hosts.count(",") + 1


ABSENT = "(absent)"


def differences(before: Any, now: Any, where: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(path, old, new) of each leaf of two JSON values that is not the same."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in sorted({*before, *now}):
            name = f"{where} / {key}" if where else str(key)
            yield from differences(before.get(key, ABSENT), now.get(key, ABSENT), name)
    elif isinstance(before, list) and isinstance(now, list):
        gone = [value for value in before if value not in now]
        new = [value for value in now if value not in before]
        if gone or new:
            yield where, gone, new
    elif before != now:
        yield where, before, now


if __name__ == "__main__":
    sys.exit(main())

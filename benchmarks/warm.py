"""Is a mesh that is up warm, and does it become so again after an engine was killed?

    python -m benchmarks.warm --hosts 4 --backend nccl       # 4 GPUs, 34 GB of disk or memory
    python -m benchmarks.warm --hosts 4 --backend nccl --no-warm   # the same, with weights alone
    python -m benchmarks.warm --hosts 4 --model schnell      # with a model that you have
    python -m benchmarks.warm --hosts 3 --small              # with `tiny`, to try this program

FLUX.1-dev at full size with random weights, on agents of this machine, all through the command
line. For each placement a mesh is brought up anew, and requests with a prompt of their own follow
one another: the first should take no longer than the others. Then an engine is killed in the middle
of a job: what each host holds from then on, and what the next request takes. Agents have a home and
a state of their own, with no kernels in it that an earlier run compiled.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.folders import scratch, temporary, write_models
from benchmarks.harness import ROOT, Result, say
from benchmarks.sizes import FULL
from fluxmesh.errors import FluxmeshError
from tests.ports import free_ports

PLACEMENTS = ("chosen", "data", "sequence", "tensor")  # "chosen" is whichever the plan prefers
LIMIT = 900.0  # seconds that a command may take
LOOK = 1.0  # seconds between two looks at the hosts


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hosts", type=int, default=2, help="agents of this machine")
    parser.add_argument("--backend", choices=("ring", "nccl"), default="ring")
    parser.add_argument("--folder", type=Path, default=scratch(), help="for the time of the run")
    parser.add_argument("--model", help="instead of one that is written for this")
    parser.add_argument("--size", help="HEIGHTxWIDTH of requests and of `up`  [the model's own]")
    parser.add_argument("--steps", type=int, default=8, help="of a request")
    parser.add_argument("--images", type=int, default=1, help="of a request")
    parser.add_argument("--requests", type=int, default=3, help="after each `up`")
    parser.add_argument("--placements", nargs="*", choices=PLACEMENTS, default=PLACEMENTS)
    parser.add_argument("--no-warm", action="store_true", help="`up` loads weights and no more")
    parser.add_argument("--no-kill", action="store_true", help="leave the second part out")
    parser.add_argument("--kill-by", choices=PLACEMENTS[1:], default="sequence")
    parser.add_argument("--kill-steps", type=int, default=120, help="of the job that is hurt")
    parser.add_argument("--kills", type=int, default=1, help="one after another")
    parser.add_argument(
        "--after", type=float, default=60.0, help="seconds until the hosts are told"
    )
    parser.add_argument("--small", action="store_true", help="`tiny`, to try this program")
    parser.add_argument("--json", type=Path, help="write everything measured into this file")
    options = parser.parse_args()
    options.model = options.model or ("tiny" if options.small else None)
    say(f"{harness.machine()}\n")
    folder = temporary("fluxmesh-warm-", options.folder)
    results: list[Result] = []

    def tell(result: Result) -> None:
        results.append(result)
        say(line_of(result))
        harness.write_json(options.json, results)

    try:
        if options.model is None:
            written = write_models(folder, FULL)
            say(f"wrote {written / 1e9:.1f} GB")
        mesh = LocalMesh(folder, options)
        for placement in options.placements:
            with mesh.up(tell):
                measure_requests(mesh, placement, tell)
        if not options.no_kill:
            with mesh.up(tell):
                measure_loss(mesh, tell)
    finally:
        shutil.rmtree(folder)
    say("\n" + report(results))


@dataclass
class LocalMesh:
    """Agents of this machine, and the options of the run."""

    folder: Path
    options: argparse.Namespace
    _prompts: int = 0

    @property
    def model(self) -> str:
        return self.options.model or str(self.folder / "dev")

    @property
    def env(self) -> dict[str, str]:
        home = self.folder / "home"
        home.mkdir(exist_ok=True)
        env = {key: value for key, value in os.environ.items() if not key.startswith("FLUXMESH_")}
        paths = (ROOT, ROOT / "agent", ROOT / "coordinator", *filter(None, [env.get("PYTHONPATH")]))
        return env | {
            "HF_HOME": env.get("HF_HOME", str(Path.home() / ".cache" / "huggingface")),
            "HOME": str(home),
            "FLUXMESH_HOME": str(home / "config"),
            "FLUXMESH_STATE": str(home / "state"),
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": os.pathsep.join(map(str, paths)),
        }

    @contextmanager
    def up(self, tell: Callable[[Result], None]) -> Iterator[None]:
        """A mesh whose agents are new, and what `up` says that it made ready."""
        path = self.folder / "mesh.json"
        hosts = [
            {"ssh": "127.0.0.1", "ips": ["127.0.0.1"], "control": f"127.0.0.1:{port}"}
            for port in free_ports(self.options.hosts)
        ]
        path.write_text(json.dumps({"backend": self.options.backend, "hosts": hosts}))
        command = ["up", str(path), "--model", self.model, "--json"]
        if self.options.no_warm:
            command.append("--no-warm")
        elif self.options.size:
            command += ["--warm", self.options.size]
        shutil.rmtree(self.folder / "home", ignore_errors=True)
        start = time.perf_counter()
        try:
            events = self.fluxmesh(*command)
            seconds = time.perf_counter() - start
            ready = [event for event in events if event["event"] == "warmed"]
            tell({"what": "up", "seconds": seconds, "ready": ready})
            yield
        finally:
            self.fluxmesh("down", "--force")

    def request(self, placement: str, steps: int) -> list[str]:
        """A command that paints with a prompt that no host has read."""
        self._prompts += 1
        command = ["generate", f"an astronaut on moon number {self._prompts}", "--seed", "7"]
        command += ["--model", self.model, "--steps", str(steps), "--force", "--json"]
        command += ["--n-images", str(self.options.images)]
        command += ["--output", str(self.folder / "out.png")]
        if self.options.size:
            command += ["--image-size", self.options.size]
        return command + (["--placement", placement] if placement != "chosen" else [])

    def fluxmesh(self, *arguments: str) -> list[dict[str, Any]]:
        """What the command line says in JSON. Raises `FluxmeshError` where it fails."""
        command = [sys.executable, "-m", "fluxmesh_coordinator", *arguments]
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=LIMIT)
        if done.returncode:
            raise FluxmeshError(f"fluxmesh {arguments[0]}: {done.returncode}: {done.stderr}")
        return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]

    def hosts(self) -> list[dict[str, Any]]:
        statuses: list[dict[str, Any]] = self.fluxmesh("status", "--json")[-1]["hosts"]
        return statuses

    def timed(self, placement: str, steps: int) -> Result:
        """A request: its seconds, how it was done, and what had to load for it."""
        start = time.perf_counter()
        events = self.fluxmesh(*self.request(placement, steps))
        seconds = time.perf_counter() - start
        planned = [event for event in events if event["event"] == "planned"]
        loads = sorted({event["component"] for event in events if event["event"] == "loading"})
        how = planned[-1]["placement"] if planned else ""
        ranks = planned[-1]["hosts"] if planned else []
        return {"seconds": seconds, "how": how, "ranks": ranks, "loads": loads}


def measure_requests(mesh: LocalMesh, placement: str, tell: Callable[[Result], None]) -> None:
    """The first request after `up`, and those after it."""
    for number in range(1, mesh.options.requests + 1):
        try:
            timing = mesh.timed(placement, mesh.options.steps)
        except FluxmeshError as error:
            tell({"what": "request", "placement": placement, "skipped": str(error).strip()})
            return
        tell({"what": "request", "placement": placement, "number": number, **timing})


@dataclass
class RunningRequest:
    """A request that runs, and what it has told so far."""

    process: subprocess.Popen[str]
    events: list[dict[str, Any]] = field(default_factory=list)

    def read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.events.append(json.loads(line))

    def last_of_ring(self) -> int:
        """The host whose rank is the last one in the plan that is followed now."""
        plans: list[list[int]] = [e["hosts"] for e in list(self.events) if e["event"] == "planned"]
        return plans[-1][-1]

    def step(self) -> int:
        """The last one that was acknowledged."""
        return max((e["step"] for e in list(self.events) if e["event"] == "step"), default=0)


def measure_loss(mesh: LocalMesh, tell: Callable[[Result], None]) -> None:
    """SIGKILL of an engine in a job; what the hosts hold, until they hold all and some time on."""
    options = mesh.options
    command = [sys.executable, "-m", "fluxmesh_coordinator"]
    with subprocess.Popen(
        [*command, *mesh.request(options.kill_by, options.kill_steps)],
        env=mesh.env,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        job = RunningRequest(process)
        reader = threading.Thread(target=job.read, daemon=True)
        reader.start()
        began = struck = time.perf_counter()
        for kill in range(1, options.kills + 1):
            target = options.kill_steps * kill // (2 * options.kills + 1)
            while job.step() < max(1, target):
                if process.poll() is not None or time.perf_counter() - began > LIMIT:
                    tell({"what": "loss", "skipped": f"the job ended at step {job.step()}"})
                    return
                time.sleep(0.02)
            victim = job.last_of_ring()
            os.kill(mesh.hosts()[victim]["engine_pid"], signal.SIGKILL)
            struck = time.perf_counter()
            tell({"what": "kill", "host": victim, "step": job.step()})
        whole: float | None = None
        is_reported = False
        while not (is_reported and process.poll() is not None):
            hosts, now = mesh.hosts(), time.perf_counter() - struck
            if whole is None and now > 2 * LOOK and all(map(is_whole, hosts)):
                whole = now
            if not is_reported and now >= options.after:
                is_reported = True
                tell({"what": "hosts", "seconds": now, "hosts": [held(host) for host in hosts]})
            if now > LIMIT:
                process.kill()
            time.sleep(LOOK)
        reader.join()
    seconds = time.perf_counter() - began
    plans = [[e["placement"], e["hosts"]] for e in job.events if e["event"] == "planned"]
    is_done = any(event["event"] == "done" for event in job.events)
    tell({"what": "loss", "seconds": seconds, "done": is_done, "plans": plans, "whole": whole})
    for number in (1, 2):
        timing = mesh.timed(options.kill_by, options.steps)
        tell({"what": "request", "placement": "after the kill", "number": number, **timing})


def is_whole(host: dict[str, Any]) -> bool:
    """Whether a host's engine holds a transformer and an autoencoder now."""
    return bool(host["holds"]) and {"transformer", "autoencoder"} <= set(host["components"])


def held(host: dict[str, Any]) -> str:
    """What a host says that its engine holds."""
    what = host["holds"]
    if host["loading"]:
        part = host["loading"]
        done, total = part["done_bytes"] / 1e9, part["total_bytes"] / 1e9
        return f"{host['state']}: loading {part['component']}, {done:.2f} of {total:.2f} GB"
    if what is None:
        return f"{host['state']}: nothing"
    return f"{host['state']}: {', '.join(host['components'])}, {what['nbytes'] / 1e9:.2f} GB"


# What is printed


def line_of(result: Result) -> str:
    """One result as it comes."""
    what = result["what"]
    if "skipped" in result:
        return f"{what} {result.get('placement', '')}: skipped: {result['skipped']}"
    if what == "up":
        ready = ", ".join(
            f"{e['placement']} {e['height']}x{e['width']} on {len(e['hosts'])} in {e['seconds']} s"
            for e in result["ready"]
        )
        return f"up: {result['seconds']:.1f} s; ready: {ready or 'nothing'}"
    if what == "request":
        loads = f"; loads {', '.join(result['loads'])}" if result["loads"] else ""
        return (
            f"request {result['number']}, {result['placement']} ({result['how']} on "
            f"{len(result['ranks'])}): {result['seconds']:.2f} s{loads}"
        )
    if what == "kill":
        return f"SIGKILL of the engine of host {result['host']} at step {result['step']}"
    if what == "hosts":
        lines = [f"  host {rank}: {text}" for rank, text in enumerate(result["hosts"])]
        return "\n".join([f"{result['seconds']:.0f} s after the kill:", *lines])
    whole = "never" if result["whole"] is None else f"{result['whole']:.0f} s after the kill"
    done = "done" if result["done"] else "FAILED"
    return f"the job: {done} in {result['seconds']:.1f} s, {result['plans']}; all hold: {whole}"


def report(results: list[Result]) -> str:
    """First against later requests, by placement."""
    seconds: dict[str, list[Result]] = {}
    for result in results:
        if result["what"] == "request" and "seconds" in result:
            seconds.setdefault(result["placement"], []).append(result)
    rows = []
    for placement, requests in seconds.items():
        first, later = requests[0], requests[1:]
        warm = min((request["seconds"] for request in later), default=first["seconds"])
        rows.append(
            [
                placement,
                f"{first['how']} on {len(first['ranks'])}",
                f"{first['seconds']:.2f}",
                f"{warm:.2f}",
                f"{first['seconds'] / warm:.2f}",
                ", ".join(first["loads"]) or "nothing",
            ]
        )
    header = ["placement", "how", "first s", "warm s", "first / warm", "the first one loads"]
    return harness.table(header, rows)


if __name__ == "__main__":
    main()

#!/bin/bash
# What an owner of a Mac can try in ten minutes and a program can't look at: run it in a clone.
#
#   tools/mac_check.sh [--no-tests] [--no-demo] [--no-mesh] [--no-measure] [--small] [--out FILE]
#
# It prints one report, and writes it to FILE (mac-report.txt), to be pasted into an issue. Names of
# the user and of the machine, the home folder and addresses are masked; no prompt of yours is in
# it. Nothing of yours is touched: its agents have keys and state in a folder of their own, which
# goes when it ends. What a machine lacks is left out, so that it runs on Linux too.
#
# For macOS's own bash (3.2) and BSD tools. A step that fails is part of the report, not its end.

set -u
cd "$(dirname "$0")/.." || exit 1

tests=yes demo=yes mesh=yes measure=yes small="" out=mac-report.txt
[ "$(uname -s)" = Darwin ] || small=--small
while [ $# -gt 0 ]; do
  case "$1" in
    --no-tests) tests=no ;;
    --no-demo) demo=no ;;
    --no-mesh) mesh=no ;;
    --no-measure) measure=no ;;
    --small) small=--small ;;
    --out) out="${2:?--out needs a file}"; shift ;;
    -h | --help) sed -n '2,12s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) echo "$0: there is no option $1; see --help." >&2; exit 2 ;;
  esac
  shift
done

python=.venv/bin/python
work="$(mktemp -d "${TMPDIR:-/tmp}/fluxmesh-check.XXXXXX")" || exit 1
work="$(cd "$work" && pwd -P)"  # as programs print it: macOS's own has a link and a // in it
report="$work/report"
# Of this run alone, with ports of its own: a mesh of yours that is up is not touched.
export FLUXMESH_HOME="$work/home" FLUXMESH_STATE="$work/state"

running=""
finish() {
  trap - EXIT INT TERM
  [ -n "$running" ] && kill -- "-$running" 2>/dev/null
  [ -x "$python" ] && "$python" -m fluxmesh_coordinator down --force >/dev/null 2>&1
  rm -rf "$work"
}
trap finish EXIT
trap 'exit 130' INT TERM

# Words that say who and where this is -> what they are. Longer ones first.
mask() {
  local host short name
  host="$(hostname)"
  short="${host%%.*}"
  name="$(scutil --get ComputerName 2>/dev/null || echo "$short")"
  LC_ALL=C sed -E -e "s#$(literal "$PWD")#CLONE#g" -e "s#$(literal "$work")#TMP#g" \
    -e "s#$(literal "$HOME")#HOME#g" -e "s#$(literal "$name")#MACHINE#g" \
    -e "s#$(literal "$host")#MACHINE#g" -e "s#$(literal "$short")#MACHINE#g" \
    -e "s#(^|[^[:alnum:]])$(literal "$(id -un)")([^[:alnum:]]|\$)#\1USER\2#g" \
    -e 's#(^|[^0-9.])(10|100|169|172|192)(\.[0-9]{1,3}){3}#\1ADDRESS#g' \
    -e 's#([0-9a-f]{2}:){5}[0-9a-f]{2}#ADDRESS#g'
}

# A text as the pattern that means it, for sed -E with # between; of an empty one, one that never is.
literal() {
  [ -n "$1" ] || { printf '%s' 'no such text'; return; }
  printf '%s' "$1" | sed 's/[][\.*^$(){}+?|#]/\\&/g'
}

# limit SECONDS COMMAND ...: macOS has no timeout(1). 124 where it takes longer; then all ends that
# the command has started.
limit() {
  local seconds="$1" spent=0 pid
  shift
  set -m  # it gets a process group of its own
  "$@" &
  pid=$!
  set +m
  running=$pid
  while kill -0 "$pid" 2>/dev/null; do
    if [ "$spent" -ge "$seconds" ]; then
      kill -- "-$pid" 2>/dev/null
      sleep 5
      kill -9 -- "-$pid" 2>/dev/null
      wait "$pid" 2>/dev/null
      running=""
      return 124
    fi
    sleep 1
    spent=$((spent + 1))
  done
  running=""
  wait "$pid"
}

# step TITLE SECONDS LINES COMMAND ...: its last LINES, how it ended and how long it took.
step() {
  local title="$1" seconds="$2" lines="$3" begin code
  shift 3
  echo "  $title ..." >&2
  begin="$(date +%s)"
  limit "$seconds" "$@" >"$work/said" 2>&1 </dev/null
  code=$?
  {
    echo "### $title"
    echo '```'
    tail -n "$lines" "$work/said"
    echo "(exit $code, $(($(date +%s) - begin)) s)"
    echo '```'
  } >>"$report"
}

has() { command -v "$1" >/dev/null 2>&1; }

system() {
  has sw_vers && sw_vers
  uname -srm
  has sysctl && sysctl -n hw.model hw.memsize machdep.cpu.brand_string iogpu.wired_limit_mb 2>/dev/null
  has memory_pressure && memory_pressure | tail -n 1
  "$python" - <<'END'
import platform
from importlib import metadata
import mlx.core as mx
from fluxmesh_coordinator.agents import macos
print("Python", platform.python_version(), platform.machine(), platform.mac_ver()[0])
print("MLX", metadata.version("mlx"), "for macOS", macos.wheel())
print({key: value for key, value in mx.device_info().items() if key != "uuid"})
END
}

identity() {
  for place in "LC_ALL=C TZ=UTC0" "LC_ALL=de_DE.UTF-8 TZ=Asia/Tokyo"; do
    # shellcheck disable=SC2086
    env $place "$python" -c "from fluxmesh.storage.processes import started_at; print(started_at($$))"
  done
  echo "(the two lines must be equal)"
}

cli() { "$python" -m fluxmesh_coordinator "$@"; }

# The doctor's own line of keys shows those of this run, which are gone after it.
doctor() { cli doctor | grep -v ' keys '; return "${PIPESTATUS[0]}"; }

paint() {
  cli generate "a red apple" --model tiny --seed 7 --placement "$1" --output "$work/$1.png" --force
}

# One picture by three placements. tensor and sequence may differ in their last bits.
same() {
  "$python" - "$work" <<'END'
import sys
import numpy as np
from PIL import Image
data, *others = (
    np.asarray(Image.open(f"{sys.argv[1]}/{name}.png")).astype(int)
    for name in ("data", "sequence", "tensor")
)
for name, other in zip(("sequence", "tensor"), others):
    print(f"{name}: no value differs from data's by more than {abs(data - other).max()} of 255")
END
}

# Whether anything keeps this Mac awake while a job runs.
awake() {
  # Not by `cli`: its shell would end, and not what it runs.
  "$python" -m fluxmesh_coordinator generate "a red apple" --model tiny --steps 400 --seed 1 \
    --output "$work/long.png" --force >/dev/null 2>&1 &
  local job=$! tries=0
  while [ $tries -lt 20 ] && kill -0 $job 2>/dev/null; do
    sleep 1
    tries=$((tries + 1))
    if pmset -g assertions | grep -i 'PreventUserIdleSystemSleep named.*' | grep -i caffeinate; then
      break
    fi
  done
  pmset -g assertions | grep -i '^ *PreventUserIdleSystemSleep'
  kill $job 2>/dev/null  # not by SIGINT, which what runs in the background does not hear
  wait $job 2>/dev/null
  echo "(a line with caffeinate is wanted, and after it a 1)"
}

# How an agent ends that is asked to: 0, without a word and without a crash report.
sigterm() {
  "$python" - <<'END'
import json, signal, subprocess, sys, tempfile, time
command = [sys.executable, "-m", "fluxmesh_agent", "run", "--ephemeral", "--keys-stdin"]
for seconds in (0.0, 0.5, 3.0):
    with tempfile.TemporaryDirectory() as state, tempfile.TemporaryFile() as said:
        agent = subprocess.Popen([*command, "--state", state + "/agent"], stdin=subprocess.PIPE,
                                 stdout=subprocess.PIPE, stderr=said)
        agent.stdin.write(json.dumps({"authorized": {}}).encode() + b"\n")
        agent.stdin.flush()
        agent.stdout.readline()
        time.sleep(seconds)
        agent.send_signal(signal.SIGTERM)
        code = agent.wait(30)
        said.seek(0)
        text = said.read().decode(errors="replace").strip()
        print(f"SIGTERM after {seconds} s: exit {code}", text.splitlines()[-1:] or "")
END
}

crashes() { find "$HOME/Library/Logs/DiagnosticReports" -iname 'python*' -newer "$work/begin" | wc -l; }

touch "$work/begin"
if [ ! -x "$python" ] || [ "$demo" = yes ]; then
  step "make demo" 900 8 make demo
fi
if [ ! -x "$python" ]; then
  cat "$report"
  echo "$0: .venv was not made; that is the report." >&2
  exit 1
fi
step "This machine" 120 40 system
step "fluxmesh doctor" 120 60 doctor
step "One process under two languages and time zones" 60 5 identity
[ "$tests" = yes ] && step "make test" 3600 25 make test
if [ "$mesh" = yes ]; then
  agent='{"ssh": "127.0.0.1", "ips": ["127.0.0.1"], "control": "127.0.0.1:'
  echo "[${agent}47190\"}, ${agent}47191\"}]" >"$work/two.json"
  step "Two agents: up" 300 30 cli up "$work/two.json" --model tiny
  for placement in data sequence tensor; do
    step "Two agents: $placement" 180 6 paint "$placement"
  done
  step "Two agents: one picture" 60 5 same
  has pmset && step "Awake while a job runs" 120 6 awake
  step "Two agents: doctor" 120 60 doctor
  step "Two agents: down" 60 5 cli down
  step "An agent that is asked to end" 120 6 sigterm
fi
if [ "$measure" = yes ]; then
  # shellcheck disable=SC2086
  step "Times by dtype" 300 5 "$python" -m tools.mac_measure times $small
  # shellcheck disable=SC2086
  step "Memory of a decode" 600 5 "$python" -m tools.mac_measure decode $small
  # shellcheck disable=SC2086
  step "A ring whose second host comes 8 s late" 180 5 "$python" -m tools.mac_measure late $small
fi
[ -d "$HOME/Library/Logs/DiagnosticReports" ] && step "Crash reports of Python since it began" 30 3 crashes

mask <"$report" >"$out"
echo "------------------------------------------------------------------ $out" >&2
cat "$out"

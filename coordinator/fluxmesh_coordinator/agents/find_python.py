"""The shell script that finds a Python with fluxmesh on a host that ssh reaches.

It tries in turn: the path that this machine's own Python has; the `fluxmesh` of a login shell's
PATH; the places where pipx, `uv tool` and Homebrew put theirs; the `fluxmesh` of an interactive
shell, since many set their PATH in .zshrc or .bashrc; `python3`. A `fluxmesh` is a script (or a
link to one) that names its interpreter in its first line, or, where that has a space or is long, in
the second.

The script is one argument, in single quotes, of whatever login shell the user has: so it holds no
backslash, which fish takes as its own even there. It runs in `sh`.
"""

from __future__ import annotations

import shlex

STUB, TOOLS = "/usr/bin/python3", "/usr/bin/xcode-select"  # of macOS

_SCRIPT = """\
m={module}
q='"'
try() {{
  case $1 in /*|python3) ;; *) return;; esac
  said=$("$1" -c "import $m" </dev/null 2>&1) && exec "$1" -m "$m"
  case $said in *"not permitted"*) denied=$1;; esac
}}
script() {{
  case $1 in /*) ;; *) return;; esac
  [ -e "$1" ] || return
  first=$(sed -n 1p "$1" 2>/dev/null | tr -d "[:cntrl:]")
  second=$(sed -n 2p "$1" 2>/dev/null | tr -d "[:cntrl:]")
  case $first in
  "#!/bin/sh") second=${{second#*"$q"}}; second=${{second%%"$q"*}}; try "$second";;
  "#!"*python*) try "${{first#??}}";;
  esac
  try "${{1%/*}}/python"
}}
shell() {{
  "${{SHELL:-/bin/sh}}" "$1" "command -v fluxmesh" </dev/null 2>/dev/null | tail -n 1
}}
try {own}
script "$(shell -lc)"
for place in "$HOME/.local/bin" /opt/homebrew/bin /usr/local/bin; do
  script "$place/fluxmesh"
done
script "$(shell -ic)"
if [ "$(command -v python3)" != {stub} ] || ! [ -x {tools} ] || {tools} -p >/dev/null 2>&1; then
  try python3
fi
[ -z "$denied" ] || echo "$denied: Operation not permitted" >&2
exit 127"""


def script(own: str, module: str) -> str:
    """It runs `module` by the first Python that can import it, or exits with 127.

    `own` is tried first. Where macOS keeps a Python out of reach, that is the last line of stderr.
    """
    return _SCRIPT.format(own=shlex.quote(own), module=module, stub=STUB, tools=TOOLS)

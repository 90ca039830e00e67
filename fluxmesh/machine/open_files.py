"""How many files and sockets this process may have open: macOS says 256 to a login's programs.

A mesh of sixty hosts, or ssh to thirty at once, needs more. Agents, their engines and the command
line ask for it as they start.
"""

from __future__ import annotations

import contextlib
import resource

WANTED = 10_240  # macOS's OPEN_MAX: it refuses more, whatever it says is allowed


def allow_many_files() -> None:
    """Raises the soft limit as far as the hard one allows; what is refused stays as it was."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = WANTED if hard == resource.RLIM_INFINITY else min(hard, WANTED)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))

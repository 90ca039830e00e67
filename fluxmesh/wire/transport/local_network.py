"""What macOS's Local Network privacy does to a connection, and the sentence about it.

Since macOS 15 a process reaches other machines of the local network only where its user allows it,
or where it is a daemon of launchd, or runs over ssh (Apple's TN3179). One that may not gets
EHOSTUNREACH at once ("No route to host", 65 on macOS), as if no cable led there. Connections that
come in are not concerned. So it meets what dials: a link's probe, the rings of an engine, and a
coordinator that was not started from Apple's Terminal.
"""

from __future__ import annotations

import errno
import platform
import socket

from fluxmesh.deadlines import DEADLINES

REMEDY = (
    "allow its Python in System Settings > Privacy & Security > Local Network of that Mac, or keep "
    "open the ssh connection that starts its agent, or have launchd start it (docs/macos.md)"
)
SENTENCE = (
    "No route to host: macOS keeps this Python out of the local network, or no cable leads there; "
    f"look at the cable, and {REMEDY}"
)


def is_kept_out(error: OSError) -> bool:
    """Whether macOS may have forbidden this connection."""
    return platform.system() == "Darwin" and error.errno == errno.EHOSTUNREACH


def reason(error: OSError) -> str:
    """Why a connection failed, without a full stop: the system's words, or our sentence."""
    return SENTENCE if is_kept_out(error) else error.strerror or str(error) or "it took too long"


def explained(text: str) -> str:
    """What a library says of a connection ("Couldn't connect (error: 65)"), with our sentence."""
    codes = (f"(error: {errno.EHOSTUNREACH})", f"[Errno {errno.EHOSTUNREACH}]", "No route to host")
    if platform.system() == "Darwin" and any(code in text for code in codes):
        return f"{text.rstrip('.')}. {SENTENCE}"
    return text


def keeps_out(address: str, port: int) -> bool:
    """Whether macOS forbids this process a connection to that place; tries it for a second.

    For who dials by a library that does not tell why it failed. Always False on other systems.
    """
    if platform.system() != "Darwin":
        return False
    try:
        socket.create_connection((address, port), timeout=DEADLINES.port_answers).close()
    except OSError as error:
        return is_kept_out(error)
    return False

"""`fluxmesh`, and `python -m fluxmesh_coordinator`: the program's first lines."""

import os
import signal

if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Before anything of ours is loaded, which takes its time: no traceback.
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

from fluxmesh.storage import interrupts

interrupts.begin()

from fluxmesh_coordinator.cli import main  # noqa: E402

if __name__ == "__main__":
    main()

"""For all tests."""

from __future__ import annotations

import signal

# Whoever runs the tests in the background may have them ignore Ctrl-C, and so would every command
# that they start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

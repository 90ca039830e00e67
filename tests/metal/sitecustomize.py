"""Runs as an engine starts that has this folder in its path: its machine is an emulated Mac."""

import json
import os

from tests.watchdog import Metal

Metal(*json.loads(os.environ["EMULATED_METAL"])).emulate()

"""Runs as an engine starts that has this folder in its path: its backends are false."""

import json
import os
import sys

if "fluxmesh_agent.engine" in sys.orig_argv:  # not in agents and command lines around it
    from tests.false_backends import FalseBackends

    FalseBackends(json.loads(os.environ["FALSE_BACKENDS"])).install()

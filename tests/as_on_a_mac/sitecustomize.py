"""Python runs this at its start where this folder is on PYTHONPATH: see `as_on_a_mac`."""

import as_on_a_mac

as_on_a_mac.install()

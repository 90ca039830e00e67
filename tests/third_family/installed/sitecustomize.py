"""Python runs this at its start where this folder is on PYTHONPATH: see `row.py`."""

from tests.third_family import row

row.install()

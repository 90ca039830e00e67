"""A mesh of hosts that compute by waiting, joined by links that are limited: see `__main__`."""

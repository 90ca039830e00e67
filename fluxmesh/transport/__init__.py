"""How messages travel between coordinators and agents: one small interface, several carriers.

`base` is the interface; `curve` the real one (ZeroMQ with CURVE); `inproc` a twin inside of one
process; `broken` a wrapper that loses, repeats, delays and cuts, for tests. Importing this package
loads none of them.
"""

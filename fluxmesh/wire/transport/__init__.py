"""How messages travel between coordinators and agents: one small interface, several carriers.

    base      the interface: `Connection`, `Listener`, `Dialer`, `ConnectionClosed`
    listener  the agent's side of the real one: `await CurveListener.open(address, keys, allowlist)`
    dialer    the coordinator's: `await CurveDialer(keys).connect(address, server_key)`
    gate      who is let in; `options` and `mailbox` serve both sides
    local_network  what macOS does to who dials without permission, and the sentence about it
    inproc    a twin inside of one process: `Network().listen()`, `.dialer()`
    broken    a wrapper that loses, repeats, delays and cuts, for tests

Importing this package loads none of them.
"""

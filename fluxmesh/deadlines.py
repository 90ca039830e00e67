"""How long agent, coordinator and engine wait for one another: one table. Pure.

Whoever waits takes a `Deadlines`, and is given `DEADLINES` where nobody says otherwise; a test that
can't wait so long gives its own (`replace(DEADLINES, silence=0.5)`). What is measured stands with
what measures it instead: how many times a step may take what the last one took, how long a unit of
work may be at all. So do sizes, and times that nobody waits for.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Deadlines:
    """All in seconds. A pair is a first pause, doubled after each failure up to the second."""

    # Signs of life
    heartbeat: float = 1.0  # between two, of whoever has to give one
    silence: float = 5.0  # without one: a coordinator, an agent, work that ticks is given up
    left: float = 1.5  # a coordinator whose connection has ended may have another one
    tick: float = 0.25  # between two looks at the clock
    standstill: float = 2.0  # without a look at it, in which this process can't have run
    waking: float = 10.0  # after that, hosts may turn out to have given us up

    # An agent answers
    answer: float = 30.0  # whatever a command asks it
    order: float = 15.0  # an order of a job: it is taken in, not done
    note: float = 2.0  # what needs no answer
    session_body: float = 15.0  # the few bytes by which a page shows a server its key
    own_server: float = 2.0  # a server on this machine, which says what stands in its line
    server_ends: float = 90.0  # once it is asked to: it finishes what runs
    first_word: float = 20.0  # `Hello`, by when an engine that was just started has told what it is
    tell_place: float = 2.0  # between two words to a coordinator that waits in line
    hear_place: float = 5.0  # without one, it asks again
    others: float = 1.0  # that the first agent that answers waits for the others
    reconnect: tuple[float, float] = (0.3, 5.0)  # between two attempts
    answer_again: float = 3.0  # of one that answered before and was lost
    look: float = 1.0  # between two looks at who is there
    comes_back: float = 15.0  # a lost host, if no other can do the work
    rewrite: float = 5.0  # between two writes of what jobs have measured
    record: tuple[float, float] = (0.01, 10.0)  # between two looks whether another process has
    # let go of the mesh's record, and all of them

    # An agent looks after its engine
    letting_go: float = 3.0  # at least, to stop for a coordinator that is gone
    idle: float = 2.0  # without a lease, before it loads by itself what is missing
    left_out: float = 3.0  # in which a job that ended the engine may have a use for the next one
    load_again: tuple[float, float] = (15.0, 960.0)  # after a load that failed
    engine_idle: float = 1.0  # without work, before an engine gives freed memory back
    process_ends: float = 5.0  # after SIGKILL, where nobody waits with us
    engine_ends: float = 10.0  # after SIGKILL, and the memory that it held is free

    # A job waits for its hosts
    first_sign: float = 60.0  # of a new engine: it imports MLX, or joins a ring
    load_moves: float = 60.0  # in which one byte is loaded, at least
    first_step: float = 30.0  # of an image, at least: kernels compile
    kill: float = 12.0  # that an agent takes to end its engine, or to say that this does not end
    stop: float = 1.2  # to let go of it, for whoever stops it; its agents see to the rest
    first_micro_batch: float = 300.0  # of a new ring
    micro_batch: float = 30.0  # of one that has done some, at least
    forgiven: float = 300.0  # after which a host's failure counts no more

    # `up` and `doctor` get hosts ready
    engine_sign: float = 60.0  # of an engine that loads, measures or tries
    timed_step: float = 450.0  # a step that is measured; kernels compile
    tried_step: float = 600.0  # a step and a decode of `doctor`
    link: float = 60.0  # measuring one: a slow one is a link too
    cable: float = 10.0  # one byte over one
    link_open: float = 20.0  # a port waits for its probe, and each read and write
    link_connect: float = 4.0  # where no cable leads, packets are often lost without a word
    full_line: float = 5.0  # a peer that reads nothing of what it is sent
    handshake: float = 5.0  # a stranger proves a key
    linger: float = 1.0  # what was sent last may still leave

    # Checkpoints and data sets come
    parcel: float = 60.0  # without a byte or a sign: a disk that is slow to take bytes needs some
    push_word: float = 0.25  # between two words of how far a push is
    push_reason: float = 5.0  # a receiver tells why it ends, when its sender has ended
    hub_lists: float = 10.0  # the Hub says what a data set is

    # Hosts are reached
    ask_look: float = 60.0  # over ssh, each with the time in which the host does it
    ask_start: float = 120.0
    ask_stop: float = 60.0
    ask_logs: float = 30.0
    ask_dial: float = 30.0
    ask_pull: float = 86400.0
    agent_listens: float = 60.0  # after its start
    agent_ends: float = 8.0  # when it is asked to, before it is killed
    port_answers: float = 1.0  # on this machine, or where macOS forbids it: at once
    keeper_looks: float = 1.0  # between two looks at an agent for which ssh is kept open
    tool: float = 5.0  # of the system; they take milliseconds
    tools: float = 40.0  # all of a Mac's together, well within `ask_look`
    mlx_loads: float = 30.0  # from a cold disk, to say what it computes on
    watch: float = 1.0  # between two looks of `status --watch`

    # A command is cancelled
    puts_right: float = 5.0  # what runs in its event loops
    starter_ends: float = 3.0  # one that looks at a host, or starts an agent there
    undoes: float = 12.0  # a host ends the agent that was started there
    impatience: float = 15.0  # from then on, another Ctrl-C ends the process whatever it does


DEADLINES = Deadlines()

"""What Ctrl-C, SIGTERM and a terminal that closes do to a program, in processes of their own."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from fluxmesh.storage.interrupts import SIGNALS

BEGIN = "import os, signal, sys, time\nfrom fluxmesh.storage import interrupts\n"
STRIKE = "lambda: os.kill(os.getpid(), signal.SIGINT)"


def run(code: str, *, ignored: bool = False) -> subprocess.CompletedProcess[str]:
    def prepare() -> None:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN if ignored else signal.SIG_DFL)

    return subprocess.run(
        [sys.executable, "-c", BEGIN + code],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        preexec_fn=prepare,
    )


@pytest.mark.parametrize("number", SIGNALS)
def test_before_a_command_begins_a_signal_ends_the_process_without_a_word_of_python(
    number: signal.Signals,
) -> None:
    done = run(f"interrupts.begin()\nos.kill(os.getpid(), {int(number)})\ntime.sleep(9)\n")
    assert (done.returncode, done.stderr) == (130, "Cancelled.\n")


def test_the_first_signal_is_heard_and_those_after_it_do_not_break_off_what_it_began() -> None:
    done = run(
        f"strike = {STRIKE}\n"
        "interrupts.cancel_from_now()\n"
        "try:\n"
        "    try:\n"
        "        strike()\n"
        "    finally:\n"
        "        strike(); strike()\n"
        "        print('put right', interrupts.happened())\n"
        "except KeyboardInterrupt:\n"
        "    interrupts.handled()\n"
        "try:\n"
        "    strike()\n"
        "except KeyboardInterrupt:\n"
        "    print('again')\n"
    )
    assert done.stdout == "put right True\nagain\n", done.stderr


def test_who_presses_on_and_on_gets_out() -> None:
    done = run(
        f"strike = {STRIKE}\n"
        "from dataclasses import replace\n"
        "from fluxmesh import deadlines\n"
        "deadlines.DEADLINES = replace(deadlines.DEADLINES, impatience=0.3)\n"
        "interrupts.cancel_from_now()\n"
        "try:\n"
        "    strike()\n"
        "finally:\n"
        "    while True:\n"
        "        strike(); time.sleep(0.05)\n"
    )
    assert done.returncode == 130


def test_a_signal_waits_for_what_must_not_be_left_half() -> None:
    done = run(
        f"strike = {STRIKE}\n"
        "interrupts.cancel_from_now()\n"
        "try:\n"
        "    with interrupts.uninterrupted():\n"
        "        with interrupts.uninterrupted():\n"
        "            strike()\n"
        "            print('inner')\n"
        "        print('outer')\n"
        "    print('never')\n"
        "except KeyboardInterrupt:\n"
        "    print('heard')\n"
    )
    assert done.stdout == "inner\nouter\nheard\n", done.stderr


def test_one_that_comes_where_python_can_raise_nothing_comes_again() -> None:
    done = run(
        f"strike = {STRIKE}\n"
        "interrupts.cancel_from_now()\n"
        "class Told:\n"
        "    def __del__(self):\n"
        "        strike()\n"
        "told = Told()\n"
        "del told\n"
        "try:\n"
        "    time.sleep(9)\n"
        "except KeyboardInterrupt:\n"
        "    print('heard')\n"
    )
    assert (done.stdout, done.stderr) == ("heard\n", "")


def test_what_nobody_holds_any_more_is_ended_the_last_first_whatever_fails() -> None:
    done = run(
        "forget = interrupts.at_end(lambda: print('a'))\n"
        "interrupts.at_end(lambda: print('b'))\n"
        "interrupts.at_end(lambda: 1 / 0)\n"
        "interrupts.at_end(lambda: print('c'))\n"
        "forget()\n"
        "interrupts.put_right()\n"
        "interrupts.put_right()\n"
    )
    assert done.stdout == "c\nb\n", done.stderr


def test_a_signal_that_was_ignored_when_the_program_began_stays_so() -> None:
    done = run(
        "interrupts.begin()\n"
        "os.kill(os.getpid(), signal.SIGHUP)\n"
        "interrupts.cancel_from_now()\n"
        "os.kill(os.getpid(), signal.SIGINT)\n"
        "print('goes on')\n",
        ignored=True,
    )
    assert done.stdout == "goes on\n", done.stderr


def test_a_child_that_starts_hears_nothing_of_a_terminal() -> None:
    done = run(
        "import subprocess\n"
        "child = 'import signal; print(sorted(map(int, signal.pthread_sigmask(0, ()))))'\n"
        "with interrupts.not_for_children():\n"
        "    subprocess.run([sys.executable, '-c', child])\n"
        "print(signal.pthread_sigmask(0, ()))\n"
    )
    assert done.stdout == f"[{int(signal.SIGHUP)}, {int(signal.SIGINT)}]\nset()\n", done.stderr


def test_a_program_that_goes_on_after_ctrl_c_ends_for_the_others() -> None:
    done = run(
        "interrupts.cancel_from_now()\n"
        "for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):\n"
        "    try:\n"
        "        os.kill(os.getpid(), number)\n"
        "    except KeyboardInterrupt:\n"
        "        try:\n"
        "            interrupts.handled()\n"
        "            print('goes on', flush=True)\n"
        "        except KeyboardInterrupt:\n"
        "            print('ends', flush=True)\n"
    )
    assert done.stdout == "goes on\ngoes on\nends\n", done.stderr

"""Whether the hosts of a job hold one model under its name, and hold it to the end."""

from __future__ import annotations

from fluxmesh_coordinator.jobs.model_check import ModelCheck


def test_hosts_that_hold_the_same_files_may_tell_it_as_often_as_they_like() -> None:
    check = ModelCheck("mine")
    assert not any(check.hear(rank, f"mac{rank}", "a" * 16) for rank in (0, 1, 0, 1))


def test_a_host_with_other_files_is_named() -> None:
    check = ModelCheck("mine")
    assert check.hear(0, "mac0", "a" * 16) is None
    error = check.hear(1, "mac1", "b" * 16)
    assert error is not None and "host 1 (mac1) bbbbbbbb" in str(error)


def test_files_that_change_under_a_job_end_it_though_no_other_host_tells() -> None:
    """As where an engine dies and the next one opens what is there by then."""
    check = ModelCheck("mine")
    assert check.hear(0, "mac0", "a" * 16) is None
    error = check.hear(0, "mac0", "b" * 16)
    assert error is not None and "were changed while this job used them" in str(error)

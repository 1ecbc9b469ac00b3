"""The result of one check of the doctor."""

import typing as tp


class Finding(tp.NamedTuple):
    """One line of the doctor."""

    level: tp.Literal["ok", "warn", "fail", "skip"]
    what: str
    """What was checked."""
    found: str
    """The result, in at most one sentence."""
    remedy: str = ""
    """What to do about it; "" if nothing is wrong."""


def ok(what: str, found: str) -> Finding:
    """Nothing is wrong."""
    return Finding("ok", what, found)


def warn(what: str, found: str, remedy: str) -> Finding:
    """It may stop a run, or could not be checked."""
    return Finding("warn", what, found, remedy)


def fail(what: str, found: str, remedy: str) -> Finding:
    """It stops every run."""
    return Finding("fail", what, found, remedy)


def skipped(what: str, found: str) -> Finding:
    """Not checked, on purpose."""
    return Finding("skip", what, f"not checked: {found}")

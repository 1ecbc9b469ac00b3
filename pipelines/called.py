"""How a user calls the client's commands, for messages: with make, or as `saevit-client`."""

from pathlib import Path

_IN_CHECKOUT = (Path(__file__).parents[1] / "Makefile").exists()
"""Whether there is a Makefile. Where the distribution saevit-client is installed, there is none."""
_VARIABLES = {"submit": "DATASET", "unschedule": "NAME"}
"""The variable of make that a command's main argument is; RUN for other commands."""

PROG = "python -m pipelines" if _IN_CHECKOUT else "saevit-client"
"""What starts the client."""
NAME = "pipelines" if _IN_CHECKOUT else PROG
"""What errors begin with."""
WAIT = "WAIT=1" if _IN_CHECKOUT else "--wait"
"""What is added to a command so that it waits."""


def by(command: str, argument: str = "") -> str:
    """The words to type, such as ``make status RUN=x`` or ``saevit-client status x``.

    Args:
        command: the command.
        argument: its main argument: a run, the name of a schedule, or a dataset.
    """
    if _IN_CHECKOUT:
        variable = _VARIABLES.get(command, "RUN")
        return f"make {command}" + (f" {variable}={argument}" if argument else "")
    flag = "--dataset " if command == "submit" else ""
    return f"{PROG} {command}" + (f" {flag}{argument}" if argument else "")

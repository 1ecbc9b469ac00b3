"""The entry point of the command `saev`: signals, the environment, `--version`.

It is not in `__main__`, because the other distribution of a package saev would overwrite that file.
"""

import sys

from saev import distributions, interrupts


def main() -> None:
    """Entry point. Signal handlers are installed first, because importing saev takes a second."""
    interrupts.end_at_once("saev")
    if sentence := distributions.conflict():
        sys.stderr.write(f"saev: error: {sentence}\n")
        sys.exit(1)
    if sys.argv[1:] == ["--version"]:
        print(distributions.version())  # noqa: T201 - what was asked for
        return
    from saev import cli

    cli.main()

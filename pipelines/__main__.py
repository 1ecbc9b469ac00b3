"""`python -m pipelines`, which is also `saevit-client`."""

import sys

from pipelines import called
from saev import distributions, interrupts


def main() -> None:
    """Entry point. Signals are handled first, because importing the rest takes a second."""
    interrupts.end_at_once(called.NAME)
    if sys.argv[1:] == ["--version"]:
        print(distributions.version())  # noqa: T201 - what was asked for
        return
    from pipelines import cli

    cli.main()


if __name__ == "__main__":
    main()

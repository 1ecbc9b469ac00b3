"""The commands `saev` and `python -m saev`."""

from saev import interrupts


def main() -> None:
    """Entry point. Signals are handled first, because importing the rest takes a second."""
    interrupts.end_at_once("saev")
    from saev import cli

    cli.main()


if __name__ == "__main__":
    main()

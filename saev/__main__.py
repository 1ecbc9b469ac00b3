"""`python -m saev`, the same as `saev`."""

from saev.cli import main

if __name__ == "__main__":
    main()

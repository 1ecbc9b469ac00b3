"""`python -m saev`."""

from saev.entry import main

if __name__ == "__main__":
    main()

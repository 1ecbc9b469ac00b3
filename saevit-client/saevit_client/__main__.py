"""`python -m saevit_client`."""

from saevit_client import main

if __name__ == "__main__":
    main()

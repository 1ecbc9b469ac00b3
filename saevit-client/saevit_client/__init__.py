"""The commands of saev's client, which submit, watch and schedule runs on a cluster.

This distribution has private copies of what it needs of saev (the folder ``lib``). So it may be
installed beside saevit: the two have no file in common.
"""

import sys
from pathlib import Path


def main() -> None:
    """Entry point of `saevit-client`."""
    sys.path.insert(0, str(Path(__file__).parent / "lib"))
    from pipelines.__main__ import main as run

    run()

"""The second step of the probe: says what it got from the first."""

import sys

print(f"second: got {sys.argv[1]}", flush=True)

"""What all tests share."""

import os

# Two pytest workers on two cores: one thread of arithmetic each.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A model hub cannot be reached; say so at once instead of after retries.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

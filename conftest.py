"""Environment of every test in the repository, set before torch or tokenizers load.

Knows nothing of the packages under test; fixtures live beside the tests that use them.
"""

from __future__ import annotations

import os

# OpenMP workers that spin while another process has the core slow everything down by an order of magnitude.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Tests take nothing from the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

"""Environment of every test in the repository, set before torch or tokenizers load.

Knows nothing of the packages under test; fixtures live beside the tests that use them.
"""

from __future__ import annotations

import os
from contextlib import suppress

# OpenMP workers that spin while another process has the core slow everything down by an order of magnitude.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# As `drift serve` has it: with its fork handlers a process that is started while gRPC works may end by a fault.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
# Tests take nothing from the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Where hypothesis is not installed, tests that need it say so themselves.
with suppress(ImportError):
    from hypothesis import HealthCheck, settings

    # How long an example takes, and how many are drawn in a second, is the machine's doing.
    anyhow = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.register_profile("any-machine", anyhow)
    settings.load_profile("any-machine")

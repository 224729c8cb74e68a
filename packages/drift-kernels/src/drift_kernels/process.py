"""What a process must settle before torch loads. Imports nothing but the standard library."""

from __future__ import annotations

import os
import sys

# Spinning workers cost 90x when another process, or the other lane, wants their core.
_WAITING = {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}


def prepare_process() -> str | None:
    """Make OpenMP workers sleep while they wait; to be called before torch is imported.

    Returns one line of warning when that came too late or the environment says otherwise, else None. A policy
    that the user has set is left alone. Child processes inherit the setting.
    """
    late = "torch" in sys.modules
    wanted = _WAITING["OMP_WAIT_POLICY"]
    policy = os.environ.get("OMP_WAIT_POLICY")
    if policy is not None and policy.upper() != wanted:
        return f"OMP_WAIT_POLICY is {policy}: OpenMP workers spin and take cores from the other lane; set {wanted}"
    for name, value in _WAITING.items():
        os.environ.setdefault(name, value)
    if late and policy is None:
        return (
            "torch was imported before prepare_process(): OpenMP workers spin and take cores from the other lane; "
            f"call it first, or set OMP_WAIT_POLICY={wanted} in the environment"
        )
    return None

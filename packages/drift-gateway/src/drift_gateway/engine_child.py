"""`python -m drift_gateway.engine_child SOCKET`: body of the engine process, its configuration as JSON on stdin.

A plain child and not a `multiprocessing` one: nothing is pickled, and no helper process outlives the gateway.
"""

from __future__ import annotations

import sys

import msgspec

from drift_core.engine import EngineConfig
from drift_core.engine_process import run_engine


def main() -> None:
    """Read the configuration and serve the gateway at the socket until it is gone."""
    config = msgspec.json.decode(sys.stdin.buffer.read(), type=EngineConfig)
    sys.stdin.close()
    run_engine(config, sys.argv[1])


if __name__ == "__main__":
    main()

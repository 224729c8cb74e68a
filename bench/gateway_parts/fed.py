"""`drift serve` as it is, but for its engine, which is `gateway_parts.source`.

python -m gateway_parts.fed STEP_MS [OPTION OF DRIFT SERVE ...]
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from drift_core.engine import EngineConfig
from drift_core.model.config import model_directory
from drift_gateway.supervisor import ChildProcess
from drift_scheduler.cli import main


async def _spawn(cls: type[ChildProcess], config: EngineConfig, socket_path: Path) -> ChildProcess:
    arguments = (os.fspath(socket_path), os.fspath(model_directory("demo")), STEP_MS)
    return await cls.spawn_module("gateway_parts.source", arguments, b"")


if __name__ == "__main__":
    STEP_MS = sys.argv.pop(1)
    os.environ["PYTHONPATH"] = os.fspath(Path(__file__).parents[1])  # where the engine finds its module
    ChildProcess.spawn = classmethod(_spawn)  # type: ignore[method-assign, assignment]
    sys.argv[1:1] = ["serve", "--device", "simulated"]
    main()

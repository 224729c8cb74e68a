"""An engine whose steps nobody reads, to run beside an echo: it takes of the machine what a gateway's engine takes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import TracebackType

from drift_core.frames import Submit, encode_frame
from drift_core.model.config import model_directory
from drift_core.sampling_params import MAX_OUTPUT_TOKENS, SamplingParams
from gateway_parts.processes import PARTS, PATIENCE_S

LOOK_EVERY_S = 0.002
"""What came is thrown away so often, in large pieces: it is to cost next to nothing."""


class UnreadEngine:
    """`gateway_parts.source` with `streams` requests that do not end for minutes, while the context is open."""

    def __init__(self, step_ms: float, streams: int) -> None:
        self._step_ms, self._streams = step_ms, streams

    def __enter__(self) -> UnreadEngine:
        self._directory = tempfile.TemporaryDirectory(prefix="drift-")
        path = Path(self._directory.name) / "engine.sock"
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            listener.bind(os.fspath(path))
            listener.listen()
            listener.settimeout(PATIENCE_S)
            command = [sys.executable, "-m", "gateway_parts.source", os.fspath(path)]
            command += [os.fspath(model_directory("demo")), f"{self._step_ms:g}"]
            self._process = subprocess.Popen(command, cwd=PARTS.parent)
            try:
                self._socket, _ = listener.accept()
            except TimeoutError as error:
                self._process.kill()
                raise SystemExit("the engine beside the echo did not start") from error
        self._socket.sendall(b"".join(map(encode_frame, self._requests())))
        self._reader = threading.Thread(target=self._throw_away, daemon=True)
        self._reader.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)  # the engine's end, too
        self._process.wait(PATIENCE_S)
        self._reader.join()
        self._socket.close()
        self._directory.cleanup()

    def _requests(self) -> list[Submit]:
        sampling = SamplingParams(max_tokens=MAX_OUTPUT_TOKENS, ignore_eos=True)
        now = time.monotonic()
        return [
            Submit(f"{number}#0", [1], sampling, 60.0, 0.1, None, "default", 0, "", now)
            for number in range(self._streams)
        ]

    def _throw_away(self) -> None:
        room = bytearray(1 << 20)
        while self._socket.recv_into(room):
            time.sleep(LOOK_EVERY_S)

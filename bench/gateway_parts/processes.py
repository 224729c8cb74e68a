"""Server processes of the benchmarks: started, waited for, watched through /proc, ended."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

PARTS = Path(__file__).parent
PATIENCE_S = 60.0
_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass
class Server:
    """A running server on `port`. `pid` is the process that speaks gRPC, `engine` its engine's, if it has one."""

    process: subprocess.Popen[str]
    port: int
    engine: int | None = None
    said: deque[str] = field(default_factory=lambda: deque(maxlen=50))

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.port}"

    def end(self) -> None:
        """SIGTERM, and SIGKILL after a while."""
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def start_gateway(simulate: str, max_running: int, *options: str) -> Server:
    """`drift serve --device simulated`, ready to serve."""
    command = [str(Path(sys.executable).parent / "drift")]
    command += ["serve", "--device", "simulated", "--simulate", simulate, "--listen", "127.0.0.1:0"]
    command += ["--max-running", str(max_running), "--max-in-flight", str(4 * max_running), "--grace", "1"]
    server = _started([*command, *options], r"serving on 127\.0\.0\.1:(\d+)")
    server.engine = _child(server.pid, "engine_child")
    return server


def start_fed_gateway(step_ms: float, max_running: int) -> Server:
    """A gateway that an engine feeds which takes next to nothing itself, see `gateway_parts.fed`."""
    command = [sys.executable, "-m", "gateway_parts.fed", f"{step_ms:g}", "--listen", "127.0.0.1:0"]
    command += ["--max-in-flight", str(4 * max_running), "--grace", "1"]
    server = _started(command, r"serving on 127\.0\.0\.1:(\d+)")
    server.engine = _child(server.pid, "gateway_parts.source")
    return server


def start_echo(step_ms: float, hold: float, ready: bool = False) -> Server:
    """The bare echo, see `gateway_parts.echo`."""
    command = [sys.executable, "-m", "gateway_parts.echo", "--step-ms", str(step_ms), "--hold", str(hold)]
    command += ["--ready"] if ready else []
    return _started(command, r"port (\d+)")


def cpu_seconds(pid: int) -> float:
    """User and system time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def resident_bytes(pid: int) -> int:
    """Resident set of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE


def descriptors(pid: int) -> int:
    """Open file descriptors of a process."""
    return len(os.listdir(f"/proc/{pid}/fd"))


class Watch:
    """Samples a process's memory every `every` seconds, from its start to its end."""

    def __init__(self, pid: int, every: float = 1.0) -> None:
        self.samples: list[tuple[float, int]] = []
        self._pid = pid
        self._every = every
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Take no more samples."""
        self._over.set()
        self._thread.join()

    def slope(self, skip_s: float) -> float:
        """Least squares over the samples after the first `skip_s` seconds, bytes per second."""
        if not self.samples:
            return 0.0
        begun = self.samples[0][0] + skip_s
        kept = [(at, size) for at, size in self.samples if at >= begun]
        if len(kept) < 3:
            return 0.0
        mean_at = sum(at for at, _ in kept) / len(kept)
        mean_size = sum(size for _, size in kept) / len(kept)
        spread = sum((at - mean_at) ** 2 for at, _ in kept)
        return sum((at - mean_at) * (size - mean_size) for at, size in kept) / spread

    def _run(self) -> None:
        while not self._over.wait(self._every):
            try:
                self.samples.append((time.monotonic(), resident_bytes(self._pid)))
            except (OSError, IndexError):
                return


def _started(command: list[str], pattern: str) -> Server:
    environment = {**os.environ, "COLUMNS": "200", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=PARTS.parent,
        env=environment,
    )
    assert process.stdout is not None
    said: deque[str] = deque(maxlen=50)
    deadline = time.monotonic() + PATIENCE_S
    for line in process.stdout:
        said.append(line.rstrip())
        if (found := re.search(pattern, line)) is not None:
            server = Server(process, int(found[1]), said=said)
            threading.Thread(target=said.extend, args=(process.stdout,), daemon=True).start()
            return server
        if time.monotonic() > deadline:
            break
    process.kill()
    raise SystemExit("a server did not start:\n" + "\n".join(said))


def _child(pid: int, word: str) -> int | None:
    """The child process of `pid` with `word` in its command line."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == pid and word in (entry / "cmdline").read_text():
                return int(entry.name)
        except (OSError, ValueError, IndexError):
            continue
    return None

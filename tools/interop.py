"""Run clients nobody here wrote against a real `drift serve` of the demo model, and compare what they stream.

`nox -s interop` installs the clients and calls this. Every client's text must be exactly what Drift's own client gets
for the same prompt with greedy sampling. Knows processes and ports; what a client does is in examples/clients/.
"""

from __future__ import annotations

import argparse
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from drift_gateway.client import DriftClient

CLIENTS = Path(__file__).resolve().parent.parent / "examples" / "clients"
PROMPT = "A list is"
QUESTION = "Tell me of a river."
TOKENS = 40
PATIENCE_S = 180.0


@contextmanager
def running(name: str, command: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that is ended at the end; its output goes to `log`, which is shown if it ends by itself."""
    with log.open("wb") as sink:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sink, stderr=subprocess.STDOUT)
    try:
        yield process
        if process.poll() is not None:
            raise SystemExit(f"{name} ended by itself, with {process.returncode}:\n{log.read_text()[-3000:]}")
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def until(what: str, log: Path, process: subprocess.Popen[bytes], ready: Callable[[], bool]) -> None:
    """Wait until `ready()`; SystemExit with the log when the process ends first or it takes too long."""
    deadline = time.monotonic() + PATIENCE_S
    while not ready():
        if process.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(f"{what} did not start:\n{log.read_text()[-3000:]}")
        time.sleep(0.2)


def free_port() -> int:
    """A port nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def answers(url: str, needle: str) -> bool:
    """Whether a page is there and has this in it."""
    try:
        with urllib.request.urlopen(url, timeout=5) as page:
            return needle in page.read().decode()
    except (urllib.error.URLError, OSError):
        return False


def text_of(command: list[str], path: str | None = None) -> str:
    """What a client prints. SystemExit when it fails."""
    env = os.environ if path is None else {**os.environ, "PATH": os.pathsep.join((path, os.environ["PATH"]))}
    done = subprocess.run(command, capture_output=True, timeout=PATIENCE_S, check=False, env=env)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr.decode()[-3000:]}")
    return done.stdout.decode().removesuffix("\n")


def clients(given: argparse.Namespace, target: str, http: str) -> Iterator[tuple[str, bool, str]]:
    """Name, whether it chats, and the text, of every client that was given."""
    if given.buf:
        folder = str(Path(given.buf).resolve().parent)
        yield (
            "buf curl",
            False,
            text_of([str(CLIENTS / "drift_curl.sh"), target, PROMPT, str(TOKENS)], folder),
        )
    if given.node_modules:
        with tempfile.TemporaryDirectory() as folder:
            yield "@grpc/grpc-js", False, text_of(node_command(Path(folder), given.node_modules, target))
    if given.triton:
        for how in ("sync", "stream", "aio", "aio-stream"):
            script = [given.triton, str(CLIENTS / "triton_client.py"), target, PROMPT]
            yield f"tritonclient {how}", False, text_of([*script, "--tokens", str(TOKENS), "--how", how])
    if given.openai:
        script = [given.openai, str(CLIENTS / "openai_client.py"), http, QUESTION, "--tokens", str(TOKENS)]
        yield "openai through smg, stream", True, text_of(script)
        yield "openai through smg, complete", True, text_of([*script, "--complete"])


def node_command(folder: Path, modules: Path, target: str) -> list[str]:
    """The client in JavaScript, in a folder that has the protos and the packages where it looks for them."""
    (folder / "proto").symlink_to(CLIENTS.parent.parent / "proto")
    (folder / "node_modules").symlink_to(modules.resolve())
    script = folder / "examples" / "clients" / "drift_client.mjs"
    script.parent.mkdir(parents=True)
    script.write_bytes((CLIENTS / script.name).read_bytes())
    return ["node", str(script), target, PROMPT, str(TOKENS)]


def main() -> int:
    """Run them all; the exit status says whether one streamed another text."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--buf", help="path of the program buf")
    parser.add_argument("--node-modules", type=Path, help="folder with @grpc/grpc-js and @grpc/proto-loader")
    parser.add_argument("--triton", help="a Python that has tritonclient[grpc]")
    parser.add_argument("--openai", help="a Python that has openai, with smg beside it")
    given = parser.parse_args()
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        serve_log, smg_log = Path(folder) / "serve.log", Path(folder) / "smg.log"
        serve = ["drift", "serve", "--listen", "127.0.0.1:0", "--profile", "none", "--compat", "kserve,vllm"]
        with running("drift serve", serve, serve_log) as server:
            until("drift serve", serve_log, server, lambda: "serving on" in serve_log.read_text())
            target = re.findall(r"serving on (\S+);", serve_log.read_text())[0]
            port = free_port()
            with smg(given.openai, target, port, smg_log):
                wanted = expected(target)
                for name, chats, text in clients(given, target, f"http://127.0.0.1:{port}/v1"):
                    same = text == wanted[chats]
                    print(f"{'same text' if same else 'WRONG TEXT':12}{name}", flush=True)
                    if not same:
                        wrong += 1
                        print(f"  wanted {wanted[chats]!r}\n  got    {text!r}")
    return 1 if wrong else 0


@contextmanager
def smg(python: str | None, target: str, port: int, log: Path) -> Iterator[None]:
    """smg in front of the server, where it is wanted; it gets the tokenizer from the server."""
    if python is None:
        yield
        return
    program = str(Path(python).parent / "smg")
    command = [
        program,
        "launch",
        "--backend",
        "vllm",
        "--worker-urls",
        f"grpc://{target}",
        "--host",
        "127.0.0.1",
    ]
    command += ["--prometheus-host", "127.0.0.1"]  # it listens on every address otherwise
    for flag in ("--port", "--prometheus-port", "--health-check-port"):
        command += [flag, str(port if flag == "--port" else free_port())]
    with running("smg", command, log) as process:
        models = f"http://127.0.0.1:{port}/v1/models"
        until(
            "smg", log, process, lambda: answers(models, "demo") and "Successfully loaded" in log.read_text()
        )
        yield


def expected(target: str) -> dict[bool, str]:
    """The texts of Drift's own client: of the prompt, and of the question in a chat."""
    with DriftClient(target) as client:
        plain = client.generate(PROMPT, max_tokens=TOKENS, temperature=0.0).complete()
        question = [{"role": "user", "content": QUESTION}]
        chat = client.generate(messages=question, max_tokens=TOKENS, temperature=0.0).complete()
    assert plain.text
    assert chat.text
    return {False: plain.text, True: chat.text}


if __name__ == "__main__":
    sys.exit(main())

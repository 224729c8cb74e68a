"""`drift serve` at the command line: bad input is one line and exit code 2, before anything is started."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import trustme
from click.testing import CliRunner

from drift_gateway import serving
from drift_gateway.commands.serve import serve as serve_command
from drift_gateway.server import Address, check_address, parse_address
from drift_gateway.supervisor import ChildProcess
from drift_scheduler.errors import DriftError


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[serving.ServeOptions]:
    """What `serve` would have been started with; nothing is."""
    options: list[serving.ServeOptions] = []

    def remember(given: serving.ServeOptions, console: Any) -> int:
        options.append(given)
        return 0

    monkeypatch.setattr(serving, "serve", remember)
    return options


def serve(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(serve_command, arguments)
    return result.exit_code, result.output


def test_the_defaults(asked: list[serving.ServeOptions]) -> None:
    assert serve() == (0, "")
    (options,) = asked
    assert options.address == Address("127.0.0.1", 50051)
    assert not options.insecure_bind
    engine = options.engine
    assert (engine.model, engine.device, engine.dispatch, engine.partition) == (
        "demo",
        "auto",
        "drift",
        "tightest-decode",
    )
    assert (engine.slo_ttft, engine.slo_tbt, engine.kv_memory_bytes, engine.profile) == (
        2.0,
        0.1,
        None,
        "short",
    )


def test_flags_reach_the_engine(asked: list[serving.ServeOptions]) -> None:
    flags = (
        "--model /m --device cpu --dtype float32 --listen [::1]:7 --dispatch chunked-prefill:token_budget=64"
    )
    flags += (
        " --partition static:decode_units=1 --slo-ttft 0.5 --slo-tbt 0.02 --kv-memory 1.5GiB --max-running 8"
        " --served-model-name mine"
    )
    flags += " --cores 2 --profile none --grace 3 --max-in-flight 9"
    assert serve(*flags.split()) == (0, "")
    (options,) = asked
    assert (options.address, options.grace, options.limits.max_in_flight) == (Address("::1", 7), 3.0, 9)
    engine = options.engine
    assert (engine.model, engine.device, engine.dtype, engine.cores) == ("/m", "cpu", "float32", 2)
    assert (engine.dispatch, engine.dispatch_options) == ("chunked-prefill", {"token_budget": 64})
    assert (engine.partition, engine.partition_options) == ("static", {"decode_units": 1})
    assert (engine.slo_ttft, engine.slo_tbt, engine.kv_memory_bytes) == (0.5, 0.02, 3 * 2**29)
    assert (engine.max_running, engine.profile) == (8, "none")
    assert (engine.model, engine.served_model_name) == ("/m", "mine")


def test_the_configuration_file_gives_defaults_and_flags_win(
    asked: list[serving.ServeOptions], tmp_path: Path
) -> None:
    config = tmp_path / "drift.toml"
    config.write_text(
        'model = "/m"\nslo-tbt = 0.25\nkv-memory = "64MB"\nmax-running = 5\ninsecure-bind = true\n'
        'partition = "static:decode_units=3"\n[dispatch]\nname = "chunked-prefill"\ntoken_budget = 32\n'
    )
    assert serve("--config", str(config), "--max-running", "6") == (0, "")
    (options,) = asked
    engine = options.engine
    assert options.insecure_bind
    assert (engine.model, engine.slo_tbt, engine.kv_memory_bytes, engine.max_running) == (
        "/m",
        0.25,
        64_000_000,
        6,
    )
    assert (engine.dispatch, engine.dispatch_options) == ("chunked-prefill", {"token_budget": 32})
    assert (engine.partition, engine.partition_options) == ("static", {"decode_units": 3})


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("modle = 1", "no option 'modle'; there are: .*model"),
        ("slo-ttft = 'soon'", "'soon' is not a valid float"),
        ("slo-ttft = ", "is not TOML"),
        (
            "compat = ['kserve', 'vllm']",
            "drift.toml: compat is a list; write it as the flag has it, in one text",
        ),
        ("grace = nan", "'nan' is no number"),
        ("[dispatch]\ntoken_budget = 3", "needs its name"),
    ],
)
def test_a_wrong_configuration_file(
    asked: list[serving.ServeOptions], tmp_path: Path, text: str, complaint: str
) -> None:
    config = tmp_path / "drift.toml"
    config.write_text(text)
    status, output = serve("--config", str(config))
    assert status == 2

    assert re.search(complaint, " ".join(output.split())), output
    assert asked == []


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ("--config /no/such.toml", "cannot read /no/such.toml"),
        ("--listen 50051", "'50051' is no address to listen on; give HOST:PORT"),
        ("--listen 127.0.0.1:70000", "is no address"),
        ("--listen ::1:70", "is no address"),
        ("--kv-memory much", "'much' is no size"),
        ("--max-running 0", "--max-running"),
        ("--served-model-name=", "served_model_name: Expected `str` of length >= 1"),
        ("--slo-tbt -1", "'--slo-tbt': -1.0 is not in the range 0<x<=86400"),
        ("--slo-ttft nan", "'--slo-ttft': 'nan' is no number"),
        ("--grace nan", "'--grace': 'nan' is no number"),
        ("--kv-promise nan", "'--kv-promise': 'nan' is no number"),
        ("--lame-duck nan", "'--lame-duck': 'nan' is no number"),
        ("--hang-timeout nan", "'--hang-timeout': 'nan' is no number"),
        ("--dispatch gang:fast", "NAME:option=value"),
        ("--dispatch fastest", "no dispatch policy 'fastest'"),
        ("--dispatch gang:speed=9", "'gang'"),
        ("--partition half", "no partition policy 'half'"),
        ("--no-such-flag", "--no-such-flag"),
    ],
)
def test_wrong_flags_are_named(asked: list[serving.ServeOptions], flags: str, complaint: str) -> None:
    status, output = serve(*flags.split())
    assert status == 2
    assert complaint in output
    assert "Traceback" not in output
    assert asked == []


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:0", Address("127.0.0.1", 0)),
        ("localhost:50051", Address("localhost", 50051)),
        ("[::1]:80", Address("::1", 80)),
    ],
)
def test_addresses(text: str, address: Address) -> None:
    assert parse_address(text) == address
    assert str(address) == text


def test_addresses_that_others_reach_need_a_flag() -> None:
    with pytest.raises(DriftError, match=r"neither TLS nor authentication.*--insecure-bind"):
        check_address(Address("0.0.0.0", 0), insecure_bind=False)
    check_address(Address("0.0.0.0", 0), insecure_bind=True)
    check_address(Address("localhost", 0), insecure_bind=False)


def test_addresses_nobody_has() -> None:
    with pytest.raises(DriftError, match=r"cannot listen on no\.such\.host\.invalid:1"):
        check_address(Address("no.such.host.invalid", 1), insecure_bind=False)
    with pytest.raises(DriftError, match=r"cannot listen on 203\.0\.113\.7:0"):
        check_address(Address("203.0.113.7", 0), insecure_bind=True)


@contextmanager
def server(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """`drift serve` in a process of its own, killed at the end if it is still there."""
    process = subprocess.Popen(
        [sys.executable, "-m", "drift_gateway", "serve", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("option", ["--listen", "--http", "--admin"])
def test_a_port_in_use_is_said_with_the_option_that_named_it(option: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        free = () if option == "--listen" else ("--listen", "127.0.0.1:0")
        status, output = serve(*free, option, f"127.0.0.1:{port}")
    assert status == 2
    assert output.strip().endswith(f"in use; stop what listens there or give another {option}")


def test_a_port_in_use_is_one_line_and_exit_code_2_before_any_engine_starts() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with server("--listen", f"127.0.0.1:{port}") as process:
            output, _ = process.communicate(timeout=120)
    assert process.returncode == 2
    (line,) = output.strip().splitlines()
    assert (
        line == f"Error: port {port} on 127.0.0.1 is in use; stop what listens there or give another --listen"
    )


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--model", "/no/such/model"], "/no/such/model"),
        (["--device", "abacus"], "abacus"),
    ],
)
def test_what_the_engine_refuses_is_one_line_and_exit_code_2(flags: list[str], complaint: str) -> None:
    with server("--listen", "127.0.0.1:0", *flags) as process:
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 2, output
    assert complaint in output.strip().splitlines()[-1]
    assert "Traceback" not in output
    assert "serving on" not in output


def test_a_log_that_cannot_be_written_is_said_before_any_engine_starts(tmp_path: Path) -> None:
    path = tmp_path / "nowhere" / "log.jsonl"
    status, output = serve("--listen", "127.0.0.1:0", "--log", str(path))
    assert (status, output) == (2, f"Error: --log {path}: No such file or directory\n")
    assert list(tmp_path.iterdir()) == []


def test_places_where_no_log_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path, fault in ((tmp_path, "Is a directory"), (tmp_path / "file" / "log", "Not a directory")):
        with pytest.raises(DriftError, match=f"^--log {path}: {fault}$"):
            serving.check_output("--log", path)


def test_a_log_that_can_be_written_is_not_touched_by_the_check(tmp_path: Path) -> None:
    (tmp_path / "old.jsonl").write_text("{}")
    for name in ("old.jsonl", "new.jsonl"):
        serving.check_output("--log", tmp_path / name)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("old.jsonl", "{}")]


@pytest.mark.skipif(not Path("/bin/sh").exists(), reason="no shell")
def test_the_last_line_of_the_start_up_is_a_command_that_works(tmp_path: Path) -> None:
    folder = tmp_path / "it's $HOME `of` \\ ours"
    folder.mkdir()
    made = trustme.CA().issue_cert("localhost", "127.0.0.1")
    made.private_key_and_cert_chain_pem.write_to_path(folder / "server.pem")
    security = ("--tls-cert", str(folder / "server.pem"), "--tls-key", str(folder / "server.pem"))
    ports = ("--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0", "--http", "127.0.0.1:0")
    with server(*ports, *security, "--device", "simulated", "--simulate", "step_ms=1") as process:
        assert process.stdout is not None
        said = []
        for line in process.stdout:
            said.append(line)
            if "python -c" in line:
                break
        command = said[-1].replace("python", sys.executable, 1)
        done = subprocess.run(["/bin/sh", "-c", command], check=False, capture_output=True, timeout=120)
        process.send_signal(signal.SIGINT)
        after, _ = process.communicate(timeout=120)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout
    assert "stopping" in after.splitlines()[0], after
    assert [line for line in said if line.startswith(("dashboard on", "administration on"))] == said[-4:-2]


def test_a_gateway_process_never_loads_torch() -> None:
    check = "import sys, drift_gateway.serving, drift_gateway.commands.serve"
    check += "; from drift_scheduler import plugins; plugins.load(); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True, timeout=120)


def test_no_module_is_taken_from_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "struct.py").write_text("raise SystemExit('a module of the working directory ran')")
    (tmp_path / "stray.py").write_text("print('so did this one')")
    monkeypatch.chdir(tmp_path)  # `cd model && drift serve --model .`, and the model brings a struct.py

    async def told() -> str:
        process = await ChildProcess.spawn_module("stray", (), b"")
        return await asyncio.wait_for(process.wait(), 60.0)

    assert "No module named stray" in asyncio.run(told())


def _children(pid: int) -> list[int]:
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            found.append(int(status.parent.name))
    return found


def _gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_however_the_server_ends_no_engine_is_left(how: signal.Signals) -> None:
    with server("--listen", "127.0.0.1:0", "--profile", "none") as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("serving on 127.0.0.1:"):
                break
        else:
            pytest.fail("it never served")
        (engine,) = _children(process.pid)
        os.kill(process.pid, how)
        process.communicate(timeout=60)
        assert process.returncode == (0 if how is not signal.SIGKILL else -signal.SIGKILL)
        deadline = time.monotonic() + 30
        while not _gone(engine):
            assert time.monotonic() < deadline, "the engine outlived its gateway"
            time.sleep(0.05)

"""A gateway in front of fake engines, on a real port, for tests: started, handed to a coroutine, taken down.

The tokenizer made here knows 256 bytes as tokens of the same numbers, so that any character can be split.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
from fake_engine import READY, FakeEngine

from drift_core.frames import Ready
from drift_gateway import client as client_module
from drift_gateway.access.security import Security
from drift_gateway.client import AsyncDriftClient
from drift_gateway.connection import Tls
from drift_gateway.event_loop import new_event_loop
from drift_gateway.gate import GateLimits
from drift_gateway.server import Address, Gateway
from drift_gateway.supervisor import Backoff, EngineProcess, Supervisor

PATIENCE_S = 30.0
QUICK = Backoff(first=0.01, longest=0.02, attempts=3)
END_OF_TEXT = 256
CHAT_TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}]{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


NARROW = (
    ("grpc.http2.lookahead_bytes", 1024),
    ("grpc.http2.bdp_probe", 0),
    ("grpc.use_local_subchannel_pool", 1),
)
"""Channel options of a client that has room for little of what it does not read."""


class FakeProcess:
    """A fake engine as the supervisor sees a process."""

    def __init__(self, engine: FakeEngine) -> None:
        self._engine = engine

    async def wait(self) -> str:
        while not self._engine.ended.is_set():
            await asyncio.sleep(0.01)
        return "exit status 0"

    def terminate(self) -> None:
        self._engine.crash()

    def kill(self) -> None:
        self._engine.crash()


@dataclass
class UnderTest:
    """A running gateway, a client of it, and the engines it has started, latest last."""

    gateway: Gateway
    supervisor: Supervisor
    client: AsyncDriftClient
    engines: list[FakeEngine] = field(default_factory=list)

    @property
    def engine(self) -> FakeEngine:
        return self.engines[-1]

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.gateway.port}"

    async def until(self, condition: Callable[[FakeEngine], bool]) -> None:
        """Wait, boundedly, until the engine received what makes the condition true."""
        await asyncio.to_thread(self.engine.until, condition)


@asynccontextmanager
async def narrow_client(target: str) -> AsyncIterator[AsyncDriftClient]:
    """A client whose unread streams stall the server's writes after some kilobytes."""
    usual = client_module.CHANNEL_OPTIONS
    client_module.CHANNEL_OPTIONS = (*usual, *NARROW)  # type: ignore[misc, assignment]
    try:
        client = AsyncDriftClient(target)
    finally:
        client_module.CHANNEL_OPTIONS = usual  # type: ignore[misc]
    async with client:
        yield client


@asynccontextmanager
async def gateway_running(
    max_in_flight: int = 1024,
    compat: Sequence[str] = (),
    port: int = 0,
    security: Security | None = None,
    token: str | None = None,
    tls: Tls | None = None,
    hang_timeout: float = 10.0,
    limits: GateLimits | None = None,
    **engine: Any,
) -> AsyncIterator[UnderTest]:
    """A gateway whose engine is ready; `engine` are fields of FakeEngine, `token` and `tls` are the client's."""
    engines: list[FakeEngine] = []

    async def spawn(path: Path) -> EngineProcess:
        engines.append(await asyncio.to_thread(FakeEngine, path, **engine))
        return FakeProcess(engines[-1])

    supervisor = Supervisor(spawn, backoff=QUICK, hang_timeout=hang_timeout)
    gateway = Gateway(supervisor, max_in_flight, security, compat, limits)
    await gateway.open(Address("127.0.0.1", port))
    keeping: asyncio.Task[None] | None = None
    try:
        await asyncio.wait_for(supervisor.start(), PATIENCE_S)
        keeping = asyncio.create_task(supervisor.keep_running())
        async with AsyncDriftClient(f"127.0.0.1:{gateway.port}", token, tls) as client:
            yield UnderTest(gateway, supervisor, client, engines)
    finally:
        if keeping is not None:
            keeping.cancel()
        await gateway.close(grace=0.0)


def run_with_gateway(body: Callable[[UnderTest], Awaitable[None]], **options: Any) -> None:
    """Run a test's coroutine with a running gateway; `options` as of `gateway_running`."""

    async def run() -> None:
        async with gateway_running(**options) as under_test:
            await asyncio.wait_for(body(under_test), 4 * PATIENCE_S)

    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(run())


def ready_in(directory: Path, **changes: Any) -> Ready:
    """The facts of a model in `directory`, which gets a tokenizer of bytes."""
    write_byte_tokenizer(directory)
    return msgspec.structs.replace(READY, directory=str(directory), eos_token_ids=[END_OF_TEXT], **changes)


def write_byte_tokenizer(directory: Path) -> None:
    """tokenizer.json and tokenizer_config.json whose token ids 0 to 255 are the bytes of UTF-8."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    letters = _byte_letters()
    vocabulary = {letters[byte]: byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True)])
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "chat_template": CHAT_TEMPLATE,
        "eos_token": "<|end|>",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


def _byte_letters() -> list[str]:
    """The letter that byte-level BPE writes for each byte: printable ones stand for themselves."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(256) if byte not in printable]
    moved = {byte: 256 + place for place, byte in enumerate(others)}
    return [chr(moved.get(byte, byte)) for byte in range(256)]

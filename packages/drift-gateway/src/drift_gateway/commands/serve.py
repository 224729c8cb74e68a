"""`drift serve`: its options, and the configuration file behind the flags.

Option parsing only; grpc and the engine's configuration load when a command runs.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from drift_gateway.commands.entry import Refused, entry
from drift_gateway.commands.number import Number
from drift_gateway.commands.serve_operations import operations_options
from drift_gateway.commands.serve_security import security_options
from drift_scheduler.errors import DriftError

if TYPE_CHECKING:
    from drift_core.engine import EngineConfig
    from drift_gateway.access.security import SecurityOptions
    from drift_gateway.serve_options import OperationsOptions

    # Older releases of click have no type parameters here.
    _SizeType = click.ParamType[int]
    _ChoiceType = click.ParamType[tuple[str, dict[str, Any]]]
else:
    _SizeType = _ChoiceType = click.ParamType

LONGEST_TARGET_S: Final = 86400

SIZE_UNITS: Final = {
    "": 1,
    "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12,
    "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40,
}  # fmt: skip


class ByteSize(_SizeType):
    """Bytes, as 512MB, 4GiB or 1000000."""

    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The number of bytes."""
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?", str(value).strip().upper())
        if found is None or found[2] not in SIZE_UNITS:
            self.fail(f"'{value}' is no size; write it as 512MB, 4GiB or 1000000", param, ctx)
        return int(float(found[1]) * SIZE_UNITS[found[2]])


class PolicySpec(_ChoiceType):
    """NAME, or NAME:option=value:..., or in the configuration file a table with `name` and the options."""

    name = "NAME"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, dict[str, Any]]:
        """The name, and its options."""
        from drift_scheduler.simulation.run import parse_choice

        if isinstance(value, tuple):
            return value
        if isinstance(value, dict):
            options = dict(value)
            name = options.pop("name", None)
            if not isinstance(name, str):
                self.fail("a policy's table needs its name, as name = 'gang'", param, ctx)
            return name, options
        try:
            return parse_choice(str(value))
        except DriftError as error:
            self.fail(str(error), param, ctx)


def _read_config(ctx: click.Context, param: click.Parameter, path: str | None) -> None:
    """Make the keys of a TOML file the defaults of the flags of the same names."""
    if path is None:
        return
    try:
        values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise Refused(f"cannot read {path}: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise Refused(f"{path} is not TOML: {error}") from error
    known = {(option.name or ""): option for option in ctx.command.params if option.name != "config"}
    defaults = {key.replace("-", "_"): value for key, value in values.items()}
    for key, value in defaults.items():
        if key not in known:
            names = ", ".join(sorted(name.replace("_", "-") for name in known))
            raise Refused(f"{path}: no option '{key.replace('_', '-')}'; there are: {names}")
        if isinstance(value, list):
            raise Refused(
                f"{path}: {key.replace('_', '-')} is a list; write it as the flag has it, in one text"
            )
    ctx.default_map = defaults


@click.command()
@click.option(
    "--model", default="demo", show_default=True, metavar="DIR|demo|random:SHAPE",
    help="A Hugging Face directory, the model inside, or a published shape with random weights.",
)  # fmt: skip
@click.option(
    "--served-model-name", metavar="NAME", help="What clients call the model. Default: what --model says."
)
@click.option(
    "--device", default="auto", show_default=True, metavar="NAME", help="auto, cpu, cuda or simulated."
)
@click.option(
    "--simulate", metavar="SPEC",
    help="What --device simulated pretends to be: DEVICE/MODEL as h200/llama-3.1-8b, or step_ms=10[:token_us=10].",
)  # fmt: skip
@click.option(
    "--dtype", default="auto", show_default=True, metavar="NAME", help="auto, float32, bfloat16, float16."
)
@click.option(
    "--load-format", type=click.Choice(("auto", "dummy")), default="auto", show_default=True,
    help="auto reads the checkpoint, dummy makes random weights of its shape.",
)  # fmt: skip
@click.option(
    "--listen",
    default="127.0.0.1:50051",
    show_default=True,
    metavar="HOST:PORT",
    help="Port 0 takes a free one.",
)
@click.option(
    "--http", metavar="HOST:PORT", help="Metrics, health and the dashboard over HTTP.  [default: off]"
)
@click.option(
    "--compat", default="", metavar="NAMES",
    help="Others' protocols to serve too: kserve (Triton's clients), vllm (smg); with commas.",
)  # fmt: skip
@click.option(
    "--insecure-bind",
    is_flag=True,
    help="Allow --listen on addresses that other machines reach, without TLS or without login.",
)
@security_options
@operations_options
@click.option(
    "--dispatch",
    type=PolicySpec(),
    default="drift",
    show_default=True,
    help="Dispatch policy: NAME[:option=value].",
)
@click.option(
    "--partition",
    type=PolicySpec(),
    default="tightest-decode",
    show_default=True,
    help="Partition policy, likewise.",
)
@click.option(
    "--slo-ttft",
    type=Number(0, LONGEST_TARGET_S, min_open=True),
    default=2.0,
    show_default=True,
    help="Default target: first token, seconds.",
)
@click.option(
    "--slo-tbt",
    type=Number(0, LONGEST_TARGET_S, min_open=True),
    default=0.1,
    show_default=True,
    help="Default target: between tokens, seconds.",
)
@click.option(
    "--kv-memory", type=ByteSize(), help="Memory of the KV pool, as 512MB.  [default: what is free]"
)
@click.option(
    "--max-running", type=click.IntRange(1, 4096), default=64, show_default=True, help="Requests holding KV."
)
@click.option(
    "--max-in-flight", type=click.IntRange(1, 65536), default=1024, show_default=True,
    help="Outputs let in, those in the queue included; more are refused.",
)  # fmt: skip
@click.option(
    "--max-queued", type=click.IntRange(1, 65536),
    help="Outputs of one SLO class that may wait for their first token.  [default: half of --max-in-flight]",
)  # fmt: skip
@click.option(
    "--kv-promise", type=Number(0.1, 10_000), default=16.0, show_default=True,
    help="Pages promised to requests in flight, the waiting ones included, in KV pools; more are refused.",
)  # fmt: skip
@click.option(
    "--max-context", type=click.IntRange(2), help="Tokens of prompt and output.  [default: the model's]"
)
@click.option(
    "--gateways", type=click.IntRange(1, 64), default=1, show_default=True,
    help="Gateway processes that share the port, in front of one engine.",
)  # fmt: skip
@click.option("--cores", type=click.IntRange(1), help="CPU cores to use.  [default: all allowed ones]")
@click.option(
    "--profile", default="short", show_default=True, metavar="short|none|PATH",
    help="Measure at start, do not, or read the table that `drift profile` wrote.",
)  # fmt: skip
@click.option(
    "--cost", type=PolicySpec(), default="auto", show_default=True, help="Cost model; auto fits the profile."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of requests that bring none.")
@click.option("--log", "log", metavar="PATH", help="Write one JSON line per scheduler step.")
@click.option("--grace", type=Number(0, 3600), default=10.0, show_default=True, help="Seconds to finish in.")
@click.option(
    "--config", metavar="PATH", callback=_read_config, is_eager=True, expose_value=False,
    help="TOML file with any of these options; flags win.",
)  # fmt: skip
@entry
def serve(
    listen: str,
    insecure_bind: bool,
    max_in_flight: int,
    max_queued: int | None,
    kv_promise: float,
    gateways: int,
    grace: float,
    http: str | None,
    compat: str,
    security: SecurityOptions,
    operations: OperationsOptions,
    kv_memory: int | None,
    dispatch: tuple[str, dict[str, Any]],
    partition: tuple[str, dict[str, Any]],
    cost: tuple[str, dict[str, Any]],
    **engine: Any,
) -> int:
    """Serve a model over gRPC (drift.v1), prefill and decode side by side on one device."""
    from rich.console import Console

    from drift_core.engine import engine_config
    from drift_gateway import serving
    from drift_gateway.compat import parse_compat
    from drift_gateway.gate import GateLimits
    from drift_gateway.serve_options import ServeOptions
    from drift_gateway.server import parse_address

    protocols = parse_compat(compat)
    config = engine_config(
        **engine,
        kv_memory_bytes=kv_memory,
        dispatch=dispatch[0],
        dispatch_options=dispatch[1],
        partition=partition[0],
        partition_options=partition[1],
        cost=cost[0],
        cost_options=cost[1],
    )
    _check_policies(config)
    pages = None if http is None else parse_address(http)
    options = ServeOptions(
        config,
        parse_address(listen),
        insecure_bind,
        GateLimits(max_in_flight, max_queued, kv_promise),
        grace,
        pages,
        protocols,
        security,
        operations,
        gateways,
    )
    return serving.serve(options, Console(stderr=True))


def _check_policies(config: EngineConfig) -> None:
    """Unknown policies and wrong options are said before anything is started. Raises DriftError."""
    from drift_scheduler import plugins

    registry = plugins.load(strict=False)  # the engine names the plugins that cannot be loaded
    registry.create("dispatch policy", config.dispatch, **config.dispatch_options)
    registry.create("partition policy", config.partition, **config.partition_options)

"""`drift generate` and `drift profile`: the engine without a server.

Option parsing and printing only; torch loads when a command runs, so that `drift --help` stays quick.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from drift_scheduler.cli import writable
from drift_scheduler.errors import DriftError


def _model_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that say what to run and on what."""
    for option in (
        click.option(
            "--cores", type=click.IntRange(min=1), help="CPU cores to use; default: all allowed ones."
        ),
        click.option(
            "--load-format",
            type=click.Choice(("auto", "dummy")),
            default="auto",
            show_default=True,
            help="auto reads the checkpoint, dummy makes random weights of its shape.",
        ),
        click.option(
            "--dtype", default="auto", show_default=True, help="auto, float32, bfloat16 or float16."
        ),
        click.option(
            "--device", default="auto", show_default=True, help="auto, or an installed executor (cpu)."
        ),
        click.option("--model", default="demo", show_default=True, help="A Hugging Face directory, or demo."),
    ):
        command = option(command)
    return command


@click.command()
@_model_options
@click.option("--prompt", "prompts", multiple=True, help="Text to continue; may be given several times.")
@click.option(
    "--chat", is_flag=True, help="Each prompt is a user's message: apply the model's chat template."
)
@click.option("--max-tokens", type=int, default=64, show_default=True)
@click.option(
    "--temperature", type=float, default=0.0, show_default=True, help="0 takes the likeliest token."
)
@click.option("--top-p", type=float, default=1.0, show_default=True)
@click.option("--top-k", type=int, default=0, show_default=True, help="0 means all.")
@click.option("--seed", type=int, default=None, help="Of the sampling; same seed, same text.")
@click.option("--stop", multiple=True, help="End at this text; may be given several times.")
@click.option("--n", type=int, default=1, show_default=True, help="Outputs per prompt.")
@click.option(
    "--dispatch", default="drift", show_default=True, help="Dispatch policy (see `drift plugins list`)."
)
@click.option(
    "--json",
    "json_path",
    default=None,
    metavar="PATH|-",
    callback=writable,
    help="Write the outputs as JSON.",
)
def generate(
    model: str,
    device: str,
    dtype: str,
    load_format: str,
    cores: int | None,
    prompts: tuple[str, ...],
    chat: bool,
    dispatch: str,
    json_path: str | None,
    stop: tuple[str, ...],
    **sampling: Any,
) -> None:
    """Continue prompts offline, all of them at once."""
    from drift_core.llm import LLM
    from drift_core.sampling_params import SamplingParams

    texts = prompts or _standard_input()
    params = SamplingParams(stop=stop or None, **sampling)
    with (
        _progress_bar() as progress,
        LLM(
            model,
            device=device,
            dtype=dtype,
            load_format=load_format,
            cores=cores,
            dispatch=dispatch,
            progress=progress,
        ) as llm,
    ):
        progress("", 1.0)
        if chat:
            outputs = llm.chat([[{"role": "user", "content": text}] for text in texts], params)
        else:
            outputs = llm.generate(list(texts), params)
    if json_path is not None:
        _write(json_path, json.dumps([output.as_dict() for output in outputs], indent=1))
        return
    for output in outputs:
        for completion in output.outputs:
            click.secho("" if chat else output.prompt or "", nl=False, dim=True)
            click.echo(f"{completion.text}  [{completion.finish_reason}]\n")


@click.command()
@_model_options
@click.option("--full", is_flag=True, help="Every split and all layers; minutes instead of seconds.")
@click.option("--max-running", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--max-context", type=click.IntRange(min=2), default=None, help="Default: the model's.")
@click.option("--out", default=None, metavar="PATH", callback=writable, help="Write the cost table here.")
@click.option(
    "--json", "json_path", default=None, metavar="PATH|-", callback=writable,
    help="The same table, - for standard output.",
)  # fmt: skip
def profile(
    model: str,
    device: str,
    dtype: str,
    load_format: str,
    cores: int | None,
    full: bool,
    max_running: int,
    max_context: int | None,
    out: str | None,
    json_path: str | None,
) -> None:
    """Measure prefill and decode under each split of the device and write the cost table."""
    from drift_kernels.process import prepare_process

    prepare_process()  # before the next line loads torch
    from drift_core.composition import measure_table
    from drift_core.engine import engine_config
    from drift_scheduler.cost.table import encode

    config = engine_config(
        model=model, device=device, dtype=dtype, load_format=load_format, cores=cores, max_running=max_running,
        max_context=max_context,
    )  # fmt: skip
    with _progress_bar() as progress:
        table = measure_table(config, progress, full=full)
    for path in (out, json_path):
        if path is not None:
            _write(path, encode(table).decode())
    if json_path != "-":
        _print_table(table)


def _print_table(table: Any) -> None:
    """The fit and its errors, for people."""
    from rich.console import Console
    from rich.table import Table

    from drift_scheduler.cost.fitted import FittedCost

    fit = FittedCost(table)
    shown = Table(title=f"{table.model} on {table.device}")
    for heading in ("units", "prefill 512 tokens", "decode 8 x 512 tokens"):
        shown.add_column(heading, justify="right")
    from drift_scheduler.domain import DecodeShape, PrefillShape

    for units in sorted({row.units for row in table.prefill}):
        prefill = fit.prefill(PrefillShape.of([(512, 0)]), units)
        decode = fit.decode(DecodeShape(8, 8 * 512), units)
        shown.add_row(str(units), f"{prefill * 1e3:.1f} ms", f"{decode * 1e3:.2f} ms")
    console = Console()
    console.print(shown)
    for row in table.slowdown:
        console.print(
            f"side by side at {row.prefill_units}+{row.decode_units}: prefill x{row.prefill_factor:.2f}, "
            f"decode x{row.decode_factor:.2f}"
        )
    for phase, deviation in fit.deviations().items():
        console.print(f"fit of {phase}: {deviation.mean:.1%} off on average, {deviation.worst:.1%} at worst")


@contextmanager
def _progress_bar() -> Iterator[Callable[[str, float], None]]:
    """A bar on the terminal's standard error for start-up phases; ends when told of the phase ""."""
    from rich.console import Console
    from rich.progress import Progress

    bar = Progress(console=Console(stderr=True), transient=True)
    tasks: dict[str, Any] = {}

    def show(phase: str, fraction: float) -> None:
        if not phase:
            bar.stop()
            return
        if phase not in tasks:
            for task in tasks.values():
                bar.update(task, completed=1.0)
            tasks[phase] = bar.add_task(phase, total=1.0)
        bar.update(tasks[phase], completed=fraction)

    bar.start()
    try:
        yield show
    finally:
        bar.stop()


def _standard_input() -> tuple[str, ...]:
    if sys.stdin.isatty():
        raise DriftError("nothing to continue: give --prompt TEXT, or text on standard input")
    return (sys.stdin.read(),)


def _write(path: str, text: str) -> None:
    if path == "-":
        click.echo(text)
        return
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise DriftError(f"cannot write {path}: {error.strerror or error}") from error

"""`drift doctor`: what this machine has, what Drift makes of it, and a line of help for each thing that is amiss.

Tries things rather than guessing: it loads the kernels, divides the devices and gives them back. A thing that is not
here, such as a GPU, is no fault; one that is here and does not work is. Knows nothing of models but the embedded one.
"""

from __future__ import annotations

import json
import os
import platform
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import click

Status = Literal["ok", "absent", "limited", "broken"]
"""absent: not here, and nothing wrong; limited: works with less than it could; broken: is here and does not work."""

SCHEMA = "drift.doctor/1"
PACKAGES = ("drift-scheduler", "drift-kernels", "drift-core", "drift-gateway")
OPTIONAL = ("triton", "cuda-bindings", "nvidia-ml-py", "transformers")
OLDEST_PYTHON, OLDEST_TORCH = (3, 11), (2, 11)
INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16", "i8mm", "sve")
_KERNEL_DRIVER = ("/proc/driver/nvidia/version", "/dev/nvidiactl", "/dev/dxg")
_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at. fix: what to do, for everything that is limited or broken. facts: for programs."""

    section: str
    name: str
    status: Status
    detail: str
    fix: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Machine:
    """Where the doctor looks; tests put others in place.

    cuda: makes a `drift_kernels.driver.Driver`; None takes the installed bindings. nvml: as for `Sampler`.
    kernel_driver: whether the operating system runs NVIDIA's driver, so that CUDA ought to work.
    """

    cuda: Callable[[], Any] | None = None
    nvml: Any = None
    cpuinfo: Path = Path("/proc/cpuinfo")
    kernel_driver: bool = field(default_factory=lambda: any(Path(p).exists() for p in _KERNEL_DRIVER))
    torch_cuda: Callable[[], bool] | None = None
    version: Callable[[str], str] = metadata.version
    requires: Callable[[str], list[str] | None] = metadata.requires


def examine(machine: Machine | None = None) -> list[Finding]:
    """Everything, in the order it is shown. A look that fails in an unforeseen way is itself a broken finding."""
    machine = machine or Machine()
    findings: list[Finding] = []
    for section, look in SECTIONS:
        try:
            findings += look(machine)
        except Exception as error:  # the rest must still be seen
            findings.append(
                Finding(
                    section,
                    "look",
                    "broken",
                    f"{type(error).__name__}: {_line(error)}",
                    "report this as a bug",
                )
            )
    return findings


def healthy(findings: Sequence[Finding]) -> bool:
    """Whether whatever is here works."""
    return not any(finding.status == "broken" for finding in findings)


# ------------------------------------------------------------------------------------------------ software


def look_at_software(machine: Machine) -> Iterator[Finding]:
    """Python, torch, Drift's packages and what they need."""
    python = platform.python_version()
    old = sys.version_info[:2] < OLDEST_PYTHON
    fix = f"use Python {_dotted(OLDEST_PYTHON)} or newer" if old else None
    yield Finding("software", "python", "broken" if old else "ok", f"{python}, {sys.executable}", fix)
    yield _torch(machine)
    for package in PACKAGES:
        yield _package(package, machine)
    for name in OPTIONAL:
        installed = _version(name, machine)
        status: Status = "ok" if installed else "absent"
        yield Finding("software", name, status, installed or "not installed", facts={"version": installed})


def _torch(machine: Machine) -> Finding:
    try:
        import torch
    except Exception as error:
        return Finding(
            "software", "torch", "broken", f"does not import: {_line(error)}", "pip install 'torch>=2.11'"
        )
    version, cuda = str(torch.__version__), torch.version.cuda
    facts = {"version": version, "cuda": cuda, "threads": torch.get_num_threads()}
    detail = f"{version}, {'built for CUDA ' + cuda if cuda else 'built for CPU'}, {facts['threads']} threads"
    if _numbers(version) < OLDEST_TORCH:
        return Finding("software", "torch", "broken", detail, "pip install -U 'torch>=2.11'", facts)
    return Finding("software", "torch", "ok", detail, None, facts)


def _package(package: str, machine: Machine) -> Finding:
    """One of Drift's, and whether all it declares is installed."""
    version = _version(package, machine)
    if version is None:
        return Finding("software", package, "absent", "not installed", facts={"version": None})
    lines = [line for line in machine.requires(package) or () if "extra ==" not in line]
    needs = [_requirement(line) for line in lines if ";" not in line or _version(_requirement(line), machine)]
    missing = [name for name in needs if _version(name, machine) is None]
    if missing:
        fix = f"pip install {' '.join(missing)}"
        return Finding("software", package, "broken", f"{version}, without {', '.join(missing)}", fix)
    there = {name: _version(name, machine) for name in needs}
    detail = f"{version}, with " + ", ".join(
        f"{n} {v}" for n, v in there.items() if not n.startswith("drift-")
    )
    return Finding("software", package, "ok", detail, None, {"version": version, "needs": there})


# ----------------------------------------------------------------------------------------------------- CPU


def look_at_cpu(machine: Machine) -> Iterator[Finding]:
    """Cores this process may use, instruction sets, memory, pinning, and the ops that were chosen."""
    from drift_core.memory import available_bytes, readable
    from drift_kernels.affinity import CpuAffinity

    affinity = CpuAffinity()
    model, flags = _cpu(machine.cpuinfo)
    has = [name for name in INSTRUCTIONS if name in flags]
    memory = available_bytes()
    facts = {"cores": list(affinity.cores), "machine_cores": os.cpu_count(), "instructions": has}
    detail = (
        f"{model}: {affinity.units} of {os.cpu_count()} cores, {', '.join(has) or 'no vector instructions known'}, "
        f"{'memory unknown' if memory is None else readable(memory) + ' of memory available'}"
    )
    yield Finding("cpu", "processor", "ok", detail, None, facts | {"model": model, "memory_bytes": memory})
    menu = {"menu": [list(split) for split in affinity.menu()]}
    if affinity.units == 1:
        why = f"{affinity.description}: with one core the lanes take turns"
        yield Finding("cpu", "cpu-affinity", "limited", why, "allow this process two cores or more", menu)
    elif affinity.unpinned is not None:
        fix = "allow sched_setaffinity in the container or sandbox, or run on Linux"
        yield Finding("cpu", "cpu-affinity", "limited", affinity.description, fix, menu)
    else:
        detail = f"{affinity.description}; splits {_splits(affinity.menu())}"
        yield Finding("cpu", "cpu-affinity", "ok", detail, None, menu)
    yield _openmp()
    yield from _cpu_ops()


def _openmp() -> Finding:
    policy = os.environ.get("OMP_WAIT_POLICY")
    facts = {"OMP_WAIT_POLICY": policy}
    if policy is None or policy.upper() == "PASSIVE":
        return Finding("cpu", "openmp", "ok", "workers sleep while they wait", None, facts)
    why = f"OMP_WAIT_POLICY is {policy}: workers spin and take cores from the other lane"
    return Finding("cpu", "openmp", "limited", why, "set OMP_WAIT_POLICY=PASSIVE", facts)


def _cpu_ops() -> Iterator[Finding]:
    import torch

    from drift_kernels.ops import ReferenceOps, select_ops

    for dtype in (torch.bfloat16, torch.float32):
        ops = select_ops("cpu", dtype)
        slow = isinstance(ops, ReferenceOps)
        name = f"kernels, {str(dtype).removeprefix('torch.')}"
        fix = "install a C compiler (`cc`), or name one in CC" if slow else None
        yield Finding("cpu", name, "limited" if slow else "ok", ops.description, fix)


# ----------------------------------------------------------------------------------------------------- GPU


def look_at_gpu(machine: Machine) -> Iterator[Finding]:
    """The driver, every visible device, its partitions, kernels and clocks."""
    from drift_kernels.driver import CudaError, Driver, DriverUnavailable, version_text

    try:
        driver = Driver() if machine.cuda is None else machine.cuda()
        version = driver.version()
        driver.initialize()
        count = driver.device_count()
    except (DriverUnavailable, CudaError) as error:
        yield _no_driver(error, machine)
        return
    facts = {"cuda": version_text(version), "devices": count}
    release = _driver_release()
    detail = f"CUDA {version_text(version)}{', release ' + release if release else ''}, {count} devices"
    if not count:
        yield Finding("gpu", "driver", "absent", detail, None, facts)
        return
    yield Finding("gpu", "driver", "ok", detail, None, facts | {"release": release})
    yield _torch_sees(machine)
    for index in range(count):
        yield from _device(driver, index, machine)


def _no_driver(error: Exception, machine: Machine) -> Finding:
    """No fault where there is no GPU; a fault where the operating system runs NVIDIA's driver."""
    reason, fix = getattr(error, "reason", str(error)), getattr(error, "fix", "see `nvidia-smi`")
    if getattr(error, "code", None) == 100:  # CUDA_ERROR_NO_DEVICE
        return Finding("gpu", "driver", "absent", "the driver sees no device")
    if not machine.kernel_driver:
        return Finding("gpu", "driver", "absent", "no NVIDIA driver runs here", facts={"reason": reason})
    return Finding("gpu", "driver", "broken", f"NVIDIA's driver runs, but {reason}", fix)


def _torch_sees(machine: Machine) -> Finding:
    import torch

    if (machine.torch_cuda or torch.cuda.is_available)():
        return Finding("gpu", "torch", "ok", f"torch {torch.__version__} uses the devices")
    why = f"torch {torch.__version__} is built for {'CUDA ' + torch.version.cuda if torch.version.cuda else 'CPU'}"
    fix = "install the torch build for the driver's CUDA version (see pytorch.org)"
    return Finding("gpu", "torch", "broken", f"{why} and finds no device", fix)


def _device(driver: Any, index: int, machine: Machine) -> Iterator[Finding]:
    device = driver.device(index)
    (major, minor), sms = driver.capability(device), driver.multiprocessors(device)
    name, memory, bus = driver.name(device), driver.memory_bytes(device), driver.pci_bus_id(device)
    facts = {
        "name": name,
        "capability": [major, minor],
        "sms": sms,
        "memory_bytes": memory,
        "pci_bus_id": bus,
    }
    detail = f"{name}: compute capability {major}.{minor}, {sms} SMs, {memory // _MIB} MiB"
    label = f"device {index}"
    if (major, minor) < (8, 0):
        fix = "use a device of compute capability 8.0 (Ampere) or newer; the CPU serves meanwhile"
        yield Finding("gpu", label, "limited", f"{detail}; Drift's kernels need 8.0", fix, facts)
        return
    yield Finding("gpu", label, "ok", detail, None, facts)
    yield _partitions(driver, index, label)
    yield _gpu_ops(index, label)
    yield _clocks(bus, label, machine)


def _partitions(driver: Any, index: int, label: str) -> Finding:
    """Make the whole menu and give it back."""
    from drift_kernels.driver import CudaError
    from drift_kernels.green_contexts import GreenContexts, PartitionUnavailable

    name = f"{label}, green contexts"
    try:
        with GreenContexts(index, driver=driver) as contexts:
            menu, notes = contexts.menu(), list(contexts.notes)
            detail = f"{contexts.description}: {_splits(menu)}" + "".join(f"; {note}" for note in notes)
            facts = {"menu": [list(split) for split in menu], "notes": notes}
    except PartitionUnavailable as why:
        return Finding("gpu", name, "limited", f"not here: {why.reason}", why.fix)
    except CudaError as error:
        return Finding("gpu", name, "broken", f"could not be given back: {error}", "see `nvidia-smi`")
    return Finding("gpu", name, "ok", detail, None, facts)


def _gpu_ops(index: int, label: str) -> Finding:
    import torch

    from drift_kernels.native_library import NativeUnavailable
    from drift_kernels.ops import select_ops

    try:
        ops = select_ops(f"cuda:{index}", torch.bfloat16, native=True)
    except NativeUnavailable as why:
        fix = "pip install 'drift-kernels[cuda]', with the torch build for the driver's CUDA version"
        return Finding("gpu", f"{label}, kernels", "broken", f"no Triton kernels: {why}", fix)
    return Finding("gpu", f"{label}, kernels", "ok", ops.description)


def _clocks(bus: str, label: str, machine: Machine) -> Finding:
    from drift_kernels.nvml import Sampler

    with Sampler(bus, interval_s=60.0, nvml=machine.nvml) as sampler:
        pass
    summary = sampler.summary()
    name = f"{label}, clocks"
    if summary.unavailable is not None:
        reason, _, fix = summary.unavailable.partition("; ")
        return Finding("gpu", name, "limited", f"not known: {reason}", fix or "see `nvidia-smi`")
    parts = [
        f"{label} {spread[1]:.0f} {unit}"
        for label, spread, unit in (
            ("SMs at", summary.sm_clock_mhz, f"of {summary.sm_clock_max_mhz} MHz"),
            ("power", summary.power_w, "W"),
            ("temperature", summary.temperature_c, "C"),
        )
        if spread is not None
    ]
    if not summary.throttled:
        return Finding("gpu", name, "ok", ", ".join(parts), None, summary.as_dict())
    detail = f"{', '.join(parts)}; throttled by {', '.join(summary.throttled)}"
    return Finding(
        "gpu",
        name,
        "limited",
        detail,
        "check power limit and cooling (`nvidia-smi -q -d PERFORMANCE`)",
        summary.as_dict(),
    )


# --------------------------------------------------------------------------------------------------- Drift


def look_at_drift(machine: Machine) -> Iterator[Finding]:
    """Plugins and the embedded model."""
    yield from _plugins()
    yield _demo_model()


def _plugins() -> Iterator[Finding]:
    from drift_scheduler import plugins
    from drift_scheduler.errors import PluginError

    try:
        registry = plugins.load(strict=False)
    except PluginError as error:
        yield Finding("drift", "plugins", "broken", str(error), "uninstall one of the two plugins")
        return
    for problem in registry.problems:
        yield Finding("drift", "plugins", "broken", str(problem), "update that plugin, or uninstall it")
    names = {kind: sorted(registry.names[kind]) for kind in plugins.KINDS}
    detail = ", ".join(f"{kind}: {len(found)}" for kind, found in names.items())
    yield Finding("drift", "registry", "ok", detail, None, names)


def _demo_model() -> Finding:
    from drift_core.model.config import load_config, model_directory
    from drift_scheduler.errors import DriftError

    directory = model_directory("demo")
    fix = "pip install --force-reinstall --no-deps drift-core"
    missing = [
        f for f in ("config.json", "model.safetensors", "tokenizer.json") if not (directory / f).is_file()
    ]
    if missing:
        return Finding("drift", "demo model", "broken", f"{directory} lacks {', '.join(missing)}", fix)
    try:
        config = load_config(directory)
    except DriftError as error:
        return Finding("drift", "demo model", "broken", str(error), fix)
    size = (directory / "model.safetensors").stat().st_size
    detail = f"{config.num_layers} layers, {config.num_parameters / 1e6:.1f} M parameters, {size // 1024} KiB"
    return Finding("drift", "demo model", "ok", detail, None, {"directory": str(directory), "bytes": size})


SECTIONS: tuple[tuple[str, Callable[[Machine], Iterator[Finding]]], ...] = (
    ("software", look_at_software),
    ("cpu", look_at_cpu),
    ("gpu", look_at_gpu),
    ("drift", look_at_drift),
)


# ------------------------------------------------------------------------------------------------- command


@click.command()
@click.option(
    "--json",
    "json_path",
    default=None,
    metavar="PATH|-",
    help="Write the findings as JSON; - in place of the table.",
)
@click.pass_context
def doctor(context: click.Context, json_path: str | None) -> None:
    """Report what this machine has and what Drift makes of it, with a line of help for each thing amiss.

    Exit code 0 when all that is here works (no GPU is no fault), 1 when something does not.
    """
    from drift_kernels.process import prepare_process

    prepare_process()  # before anything loads torch
    findings = examine()
    if json_path is not None:
        _write(json_path, json.dumps(as_json(findings), indent=1))
    if json_path != "-":
        show(findings)
    context.exit(0 if healthy(findings) else 1)


def as_json(findings: Sequence[Finding]) -> dict[str, Any]:
    """The findings for programs."""
    return {"schema": SCHEMA, "healthy": healthy(findings), "findings": [asdict(f) for f in findings]}


def show(findings: Sequence[Finding]) -> None:
    """The findings for people, a line each and its fix below."""
    marks = {
        "ok": ("ok", "green"),
        "absent": ("--", None),
        "limited": ("!", "yellow"),
        "broken": ("X", "red"),
    }
    section = ""
    for finding in findings:
        if finding.section != section:
            section = finding.section
            click.secho(f"\n{section}", bold=True)
        mark, colour = marks[finding.status]
        click.echo(f"  {click.style(f'{mark:>2}', fg=colour)}  {finding.name}: {finding.detail}")
        if finding.fix is not None:
            click.echo(f"      fix: {finding.fix}")
    broken = sum(finding.status == "broken" for finding in findings)
    click.echo(f"\n{broken} of {len(findings)} are broken." if broken else "\nAll that is here works.")


def _write(path: str, text: str) -> None:
    from drift_scheduler.errors import DriftError

    if path == "-":
        click.echo(text)
        return
    try:
        Path(path).write_text(text + "\n")
    except OSError as error:
        raise DriftError(f"cannot write {path}: {error.strerror or error}") from error


# --------------------------------------------------------------------------------------------------- facts


def _version(name: str, machine: Machine) -> str | None:
    try:
        return machine.version(name)
    except metadata.PackageNotFoundError:
        return None


def _requirement(line: str) -> str:
    """The distribution's name of a requirement such as `grpcio>=1.68; python_version > "3"`."""
    found = re.match(r"[A-Za-z0-9][A-Za-z0-9._-]*", line)
    return found.group() if found else line


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def _cpu(cpuinfo: Path) -> tuple[str, frozenset[str]]:
    """Model name and instruction sets, of the first core."""
    try:
        text = cpuinfo.read_text().split("\n\n")[0]
    except OSError:
        return platform.processor() or platform.machine(), frozenset()
    lines = dict(re.findall(r"^([^:\n]*?)\s*: (.*)$", text, re.MULTILINE))
    flags = lines.get("flags") or lines.get("Features") or ""
    return lines.get("model name") or platform.machine(), frozenset(flags.split())


def _driver_release() -> str | None:
    """570.86.15, say; where Linux tells."""
    try:
        found = re.search(r"Kernel Module.*?\s(\d+\.\d+(?:\.\d+)?)\s", Path(_KERNEL_DRIVER[0]).read_text())
    except OSError:
        return None
    return found.group(1) if found else None


def _splits(menu: Sequence[tuple[int, int]]) -> str:
    return " ".join(f"{prefill}+{decode}" for prefill, decode in menu)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__

"""Device and model descriptions: data files, what follows from them, and nothing measured.

Built-in descriptions live in `drift_scheduler/data/{devices,models}/*.toml`; a path to a TOML file of the same
keys works wherever a name does. `8xa100-80gb` is eight of a device as one, tensor parallel. This module does not
know how long anything takes; `drift_scheduler.cost.roofline` does.
"""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec

from drift_scheduler.domain import Device, Partition, Sharing
from drift_scheduler.errors import DriftError, UnknownNameError
from drift_scheduler.toml_lines import Source

Positive = Annotated[float, msgspec.Meta(gt=0)]
NotNegative = Annotated[float, msgspec.Meta(ge=0)]
Share = Annotated[float, msgspec.Meta(gt=0, le=1)]
Factor = Annotated[float, msgspec.Meta(ge=1, le=100)]
Count = Annotated[int, msgspec.Meta(ge=1, le=1_000_000_000)]
Units = Annotated[int, msgspec.Meta(ge=1, le=4096)]


class DeviceSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One accelerator (or `count` of them, tensor parallel). Rates are per accelerator, with all units.

    `tflops`: dense, 16 bit. `matmul_efficiency`, `attention_efficiency`: shares of it that prefill reaches; both scale
    with units. `bandwidth_saturation`: share of the units that already draws all of the memory bandwidth.
    `kv_efficiency`: share of the bandwidth at which decode attention reads KV on all units; scales with units.
    `layer_us`: fixed time of a layer, `step_us` of a forward pass, whatever the units; `block_us`: launching one more
    prefill block. `launch_layer_us`: the host's time to launch a layer of a prefill, kernel by kernel, and
    `launch_link_us` each all-reduce in it; a decode step is a captured graph of 1, 2, 4 or a multiple of `graph_step`
    requests (0: no graphs). `link_*`: all-reduce between the `count` devices. `slowdown_*`: worst factors when both
    lanes run. `min_units`, `multiple_units`: what the hardware can split; `step_units`: the menu's stride.
    """

    name: str
    unit: str
    units: Units
    memory_gb: Positive
    bandwidth_gb_s: Positive
    tflops: Positive
    matmul_efficiency: Share
    attention_efficiency: Share
    bandwidth_efficiency: Share
    bandwidth_saturation: Share
    kv_efficiency: Share
    layer_us: NotNegative
    step_us: NotNegative
    block_us: NotNegative
    link_gb_s: Positive = 50.0
    link_latency_us: NotNegative = 20.0
    slowdown_prefill: Factor
    slowdown_decode: Factor
    min_units: Count
    multiple_units: Count
    step_units: Count
    switch_us: NotNegative = 0.0
    launch_layer_us: NotNegative = 0.0
    launch_link_us: NotNegative = 100.0
    graph_step: Annotated[int, msgspec.Meta(ge=0, le=1024)] = 0
    count: Count = 1

    @property
    def launch_seconds(self) -> float:
        """The host's time to launch one layer of a prefill or a fused pass, its two all-reduces included."""
        return 1e-6 * (self.launch_layer_us + (2 * self.launch_link_us if self.count > 1 else 0.0))

    @property
    def label(self) -> str:
        """The name people use, with the number of devices."""
        return f"{self.count}x{self.name}" if self.count > 1 else self.name


class ModelSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A dense decoder: the numbers of its config.json."""

    name: str
    num_layers: Count
    hidden: Count
    heads: Count
    kv_heads: Count
    head_dim: Count
    intermediate: Count
    vocab: Count
    tied_embeddings: bool = False
    bytes_per_weight: Positive = 2.0
    bytes_per_kv: Positive = 2.0
    max_context: Count = 131072

    @property
    def layer_weights(self) -> int:
        """Weights of one layer: attention and gated MLP."""
        attention = (
            2 * self.hidden * self.heads * self.head_dim + 2 * self.hidden * self.kv_heads * self.head_dim
        )
        return attention + 3 * self.hidden * self.intermediate

    @property
    def body_weights(self) -> int:
        """Weights every token passes: the layers, without embeddings."""
        return self.num_layers * self.layer_weights

    @property
    def head_weights(self) -> int:
        """Weights of the output projection, passed once per sampled token."""
        return self.hidden * self.vocab

    @property
    def weight_bytes(self) -> float:
        """Everything that is kept in memory."""
        embeddings = self.head_weights * (1 if self.tied_embeddings else 2)
        return (self.body_weights + embeddings) * self.bytes_per_weight

    @property
    def kv_bytes(self) -> float:
        """KV cache of one token position, all layers."""
        return 2 * self.num_layers * self.kv_heads * self.head_dim * self.bytes_per_kv

    @property
    def attention_flops(self) -> float:
        """FLOPs of one (query, key) pair, all heads and layers: scores and values."""
        return 4.0 * self.num_layers * self.heads * self.head_dim


Spec = TypeVar("Spec", DeviceSpec, ModelSpec)


def device_spec(name: str) -> DeviceSpec:
    """The device `name`: built in, a TOML file's path, or either with `Nx` in front.

    Raises DriftError (an unreadable or invalid file) and UnknownNameError (lists the built-in ones).
    """
    match = re.fullmatch(r"(\d{1,4})x(.+)", name)
    if match is None:
        return _load(name, "devices", "device", DeviceSpec)
    count = int(match[1])
    if not 1 <= count <= 1024:
        raise DriftError(f"device '{name}': {count} devices as one; 1 to 1024 are possible")
    return msgspec.structs.replace(_load(match[2], "devices", "device", DeviceSpec), count=count)


def model_spec(name: str) -> ModelSpec:
    """The model `name`: built in or a TOML file's path. Raises as `device_spec`."""
    return _load(name, "models", "model", ModelSpec)


def installed(folder: str) -> list[str]:
    """Names of the built-in descriptions in `devices`, `models` or `tables`."""
    entries = resources.files("drift_scheduler").joinpath("data", folder).iterdir()
    return sorted(
        entry.name.rsplit(".", 1)[0] for entry in entries if entry.name.endswith((".toml", ".json"))
    )


def menu(spec: DeviceSpec) -> tuple[Partition, ...]:
    """Partitions to prepare: decode takes multiples of `step_units`, prefill what is left, and each all of it.

    Both parts have at least `min_units`; decode's is a multiple of `multiple_units`; the remainder is prefill's and
    need not be one.
    """
    stride = math.lcm(spec.step_units, spec.multiple_units)
    first = -(-spec.min_units // stride) * stride
    decodes = range(first, spec.units - spec.min_units + 1, stride)
    splits = tuple(Partition(spec.units - decode, decode) for decode in decodes)
    return (Partition(spec.units, 0), *splits, Partition(0, spec.units))


def simulated_device(spec: DeviceSpec, model: ModelSpec, table_menu: tuple[Partition, ...] = ()) -> Device:
    """What a simulated executor offers for a device and a model; `table_menu` replaces the derived menu."""
    device = Device(
        total_units=spec.units,
        menu=table_menu or menu(spec),
        num_layers=model.num_layers,
        sharings=frozenset(Sharing),
        name=f"{spec.label} (simulated)",
    )
    return device if device.splits() else replace(device, sharings=device.sharings - {Sharing.SPATIAL})


def kv_tokens(spec: DeviceSpec, model: ModelSpec, utilisation: float = 0.9) -> int:
    """Token positions of KV that fit beside the weights in `utilisation` of the memory, 5% kept for activations.

    Raises DriftError when the weights do not fit.
    """
    budget = spec.count * spec.memory_gb * 1e9 * utilisation
    left = 0.95 * (budget - model.weight_bytes)
    if left < model.kv_bytes * 1024:
        raise DriftError(
            f"model '{model.name}' needs {model.weight_bytes / 1e9:.1f} GB for its weights; device '{spec.label}' "
            f"offers {budget / 1e9:.1f} GB ({utilisation:.0%} of its memory): use more devices (Nx{spec.name})"
        )
    return int(left / model.kv_bytes)


def _load(name: str, folder: str, kind: str, spec: type[Spec]) -> Spec:
    path = Path(name)
    if path.suffix == ".toml" or "/" in name or "\\" in name:
        try:
            text = path.read_bytes().decode()
        except (OSError, UnicodeDecodeError) as error:
            raise DriftError(f"{kind} file {name}: {_reason(error)}") from error
        return _parse(text, name, spec)
    names = installed(folder)
    if name not in names:
        raise UnknownNameError(kind, name, names)
    return _parse(
        resources.files("drift_scheduler").joinpath("data", folder, f"{name}.toml").read_text(), name, spec
    )


def _parse(text: str, where: str, spec: type[Spec]) -> Spec:
    source = Source(where, text)
    try:
        values: Mapping[str, Any] = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError, ValueError) as error:
        raise DriftError(f"{where}: not TOML: {' '.join(str(error).split())}") from error
    for key, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise DriftError(f"{source.at(key)}: field {key}: {value} is not a finite number")
    try:
        return msgspec.convert(values, spec)
    except msgspec.ValidationError as error:
        message, _, at = str(error).partition(" - at `$.")
        raise DriftError(f"{source.of(at.rstrip('`'), message)}: {plain(error)}") from error


def plain(error: msgspec.ValidationError) -> str:
    """msgspec's message with the field first: `field units: Expected ...`."""
    message, _, at = str(error).partition(" - at `$.")
    return f"field {at.rstrip('`')}: {message}" if at else message


def _reason(error: Exception) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else "not UTF-8 text"

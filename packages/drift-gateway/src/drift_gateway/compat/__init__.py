"""Others' protocols in front of drift.v1, so that their clients work unchanged; served only when asked for.

Each adapter turns a request of its protocol into a drift.v1 GenerateRequest, and the answers back. It knows no engine
and no admission of its own: what drift.v1 refuses is refused here, with the status that protocol's clients expect.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

from drift_scheduler.errors import DriftError

if TYPE_CHECKING:
    import grpc

    from drift_gateway.generation import Generations
    from drift_gateway.supervisor import Supervisor

NAMES: Final = ("kserve", "vllm")


def parse_compat(text: str) -> tuple[str, ...]:
    """The protocols of a list such as "kserve,vllm", each once, in our order. Raises DriftError."""
    wanted = {name.strip() for name in text.split(",")} - {""}
    for name in sorted(wanted):
        if name not in NAMES:
            raise DriftError(f"no protocol '{name}' to be compatible with; there are: {', '.join(NAMES)}")
    return tuple(name for name in NAMES if name in wanted)


def add_services(
    names: Sequence[str], server: grpc.aio.Server, supervisor: Supervisor, generations: Generations
) -> list[str]:
    """Register the services of these protocols; their full names, for health and reflection.

    Only what is served is imported: the messages have their protocols' names, and a process that also loads another
    package's copy of them (tritonclient's, smg's) could not load both.
    """
    return [_ADDERS[name](server, supervisor, generations) for name in names]


def _add_kserve(server: grpc.aio.Server, supervisor: Supervisor, generations: Generations) -> str:
    from drift_gateway.compat.kserve import InferenceService
    from drift_gateway.compat.wire import kserve_pb2, kserve_pb2_grpc

    add: Callable[[Any, grpc.aio.Server], None] = kserve_pb2_grpc.add_GRPCInferenceServiceServicer_to_server
    add(InferenceService(supervisor, generations), server)
    return str(kserve_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name)


def _add_vllm(server: grpc.aio.Server, supervisor: Supervisor, generations: Generations) -> str:
    from drift_gateway.compat.vllm_engine import VllmEngineService
    from drift_gateway.compat.wire import vllm_engine_pb2, vllm_engine_pb2_grpc

    add: Callable[[Any, grpc.aio.Server], None] = vllm_engine_pb2_grpc.add_VllmEngineServicer_to_server
    add(VllmEngineService(supervisor, generations), server)
    return str(vllm_engine_pb2.DESCRIPTOR.services_by_name["VllmEngine"].full_name)


_ADDERS: Final = {"kserve": _add_kserve, "vllm": _add_vllm}

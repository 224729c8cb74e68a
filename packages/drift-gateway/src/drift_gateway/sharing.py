"""What the gateways of one service have to know of each other, beyond what the engine's frames tell them.

What tenants use, how outputs fared, and which requests were in the engine at a crash: gathered as `News` in the
gateway where it happens, taken in by every other. With it tenants' limits, the numbers shown and the quarantine are
the whole service's. Knows no sockets and reads no clock; times are seconds of the monotonic clock.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

from drift_gateway.access.security import Security
from drift_gateway.access.tenants import Tenant, Usage
from drift_gateway.observe.service_stats import EndedOutput, Floats
from drift_gateway.supervisor import Supervisor


class TenantUse(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What a tenant used of a gateway since its last news; `in_flight` may be less than before."""

    tenant: str
    requests: int = 0
    refused: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    in_flight: int = 0

    @property
    def usage(self) -> Usage:
        """As tenants count it."""
        return Usage(self.requests, self.refused, self.prompt_tokens, self.output_tokens, self.in_flight)


class OutputEnded(msgspec.Struct, frozen=True, array_like=True):
    """How an output fared: `gaps` between its tokens, in order of size, as float64; targets in seconds."""

    ended: EndedOutput
    gaps: bytes
    slo_ttft: float
    slo_tbt: float


class Blamed(msgspec.Struct, frozen=True, array_like=True):
    """Requests that were inside when an engine crashed, by its process id."""

    fingerprints: list[bytes]
    engine: int


class News(msgspec.Struct, frozen=True, array_like=True, tag="news"):
    """What happened in a gateway."""

    tenants: list[TenantUse] = []
    ended: list[OutputEnded] = []
    blamed: list[Blamed] = []
    acquitted: list[bytes] = []


class Sharing:
    """One gateway's part: `take` what is to be told to the others, `learn` what they tell."""

    def __init__(self, supervisor: Supervisor, security: Security) -> None:
        self._supervisor = supervisor
        self._security = security
        self._told: dict[str, Usage] = {}
        self._ended: list[OutputEnded] = []
        self._blamed: list[Blamed] = []
        self._acquitted: list[bytes] = []
        supervisor.stats.on_ended = self._output_ended
        supervisor.quarantine.on_blame = self._suspects
        supervisor.quarantine.on_acquit = self._acquitted.append

    def take(self) -> News | None:
        """What happened since the last call, if anything did."""
        tenants = self._uses()
        if not (tenants or self._ended or self._blamed or self._acquitted):
            return None
        news = News(tenants, self._ended.copy(), self._blamed.copy(), self._acquitted.copy())
        for told in (self._ended, self._blamed, self._acquitted):
            told.clear()
        return news

    def learn(self, news: News, now: float) -> None:
        """Take in what happened in another gateway."""
        for use in news.tenants:
            tenant = self._named(use.tenant)
            if tenant is not None:
                tenant.used_elsewhere(now, use.usage)
        for output in news.ended:
            gaps = np.frombuffer(output.gaps, dtype=np.float64)
            self._supervisor.stats.add(output.ended, gaps, (output.slo_ttft, output.slo_tbt))
        for blamed in news.blamed:
            self._supervisor.quarantine.blame(blamed.fingerprints, blamed.engine)
        for fingerprint in news.acquitted:
            self._supervisor.quarantine.acquit(fingerprint)

    def _named(self, name: str) -> Tenant | None:
        return None if self._security.tenants is None else self._security.tenants.named(name)

    def _uses(self) -> list[TenantUse]:
        uses = []
        for tenant in self._security.known_tenants():
            told, usage = self._told.get(tenant.name, Usage()), tenant.usage
            if usage != told:
                uses.append(TenantUse(tenant.name, *usage.minus(told).values()))
                self._told[tenant.name] = usage.plus(Usage())
        return uses

    def _output_ended(self, ended: EndedOutput, gaps: Floats, targets: tuple[float, float]) -> None:
        self._ended.append(OutputEnded(ended, gaps.tobytes(), *targets))

    def _suspects(self, fingerprints: Sequence[bytes], engine: int) -> None:
        self._blamed.append(Blamed(list(fingerprints), engine))

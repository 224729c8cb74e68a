"""What gateways that share an engine know of each other: the ledger, the load, tenants, numbers, the quarantine."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from drift_core.engine import engine_config
from drift_core.frames import (
    FinishedItem,
    LoadItem,
    OtherItem,
    Others,
    StepFrame,
    Submit,
    TokensItem,
    pack_ids,
)
from drift_core.sampling_params import SamplingParams
from drift_gateway.access.security import Security, SecurityOptions
from drift_gateway.access.tenants import Limits, Tenant, Usage, new_token, token_entry
from drift_gateway.gate import GateLimits
from drift_gateway.observe.elsewhere import Elsewhere
from drift_gateway.observe.timeline import Timeline
from drift_gateway.refusal import Refusal
from drift_gateway.serve_options import OperationsOptions, ServeOptions, decoded, encoded
from drift_gateway.server import Address
from drift_gateway.sharing import News, Sharing
from drift_gateway.supervisor import Supervisor
from drift_gateway.workload_ahead import Newcomer, WorkloadAhead

OTHER = OtherItem("2#x#0", prompt_tokens=1000, max_tokens=10, priority=0, slo_tbt=0.1, slo_class="chat")


def told(now: float, **others: Any) -> StepFrame:
    return StepFrame(now, load=LoadItem(0, 0, 1000), others=Others(**others))


async def nobody(path: Path) -> Any:
    raise AssertionError("no engine is started here")


def supervisor() -> Supervisor:
    return Supervisor(nobody)


# ---------------------------------------------------------------------------------- the engine's frames


def test_what_others_have_before_a_newcomer_counts_in_its_forecast() -> None:
    ahead = WorkloadAhead()
    rate = ((100, 0.1), (1000, 1.0))
    ahead.engine(total_pages=1000, page_tokens=10, max_running=4, prefill_seconds=rate)
    ahead.step(told(0.0, accepted=[OTHER]))
    assert (ahead.outputs, ahead.waiting_tokens, ahead.queued["chat"]) == (1, 1000, 1)
    assert ahead.forecast(Newcomer(500, 10), 0.0).ttft == pytest.approx(1.5)
    assert ahead.promised_pages > 0
    ahead.step(told(1.0, first=["2#x#0"], tokens=1))
    assert (ahead.outputs, ahead.waiting_tokens) == (1, 0)
    ahead.step(told(2.0, finished=[FinishedItem("2#x#0", "length", output_tokens=10)]))
    assert (ahead.outputs, ahead.promised_pages) == (0, 0)


def test_others_that_cannot_end_sooner_are_expected_to_hold_as_many_pages_as_own_ones() -> None:
    def promised(**fields: int) -> int:
        ahead = WorkloadAhead()
        ahead.engine(total_pages=1000, page_tokens=10, max_running=4)
        other = msgspec.structs.replace(OTHER, prompt_tokens=100, max_tokens=1000, **fields)
        ahead.step(told(0.0, accepted=[other]))
        return ahead.promised_pages

    assert promised(min_tokens=900) == 10 + 90
    assert promised(min_tokens=0) < 10 + 90


def test_the_length_of_steps_is_learned_from_others_tokens_too() -> None:
    def gap_of(steps: list[StepFrame]) -> float | None:
        ahead = WorkloadAhead()
        ahead.engine(total_pages=1000, page_tokens=10, max_running=64, prefill_seconds=((10, 0.01),))
        ahead.add(["own"], Newcomer(10, 100), 0.0)
        ahead.step(StepFrame(0.0, tokens=[TokensItem(["own"], pack_ids([1]), True)], decode_requests=1))
        for frame in steps:
            ahead.step(frame)
        return ahead.forecast(Newcomer(10, 2), 2.0).gap

    own = [
        StepFrame(0.01 * k, tokens=[TokensItem(["own"], pack_ids([1]))], decode_requests=1)
        for k in range(1, 80)
    ]
    others = [StepFrame(0.01 * k, decode_requests=1, others=Others(tokens=1)) for k in range(1, 80)]
    assert gap_of(own) == gap_of(others) == pytest.approx(0.02), "two at once, by what one took"


def test_others_in_flight_are_counted_and_gone_with_the_engine() -> None:
    elsewhere = Elsewhere()
    elsewhere.step(told(0.0, accepted=[OTHER, msgspec.structs.replace(OTHER, id="2#y#0", prompt_tokens=5)]))
    assert (elsewhere.in_flight, elsewhere.waiting_prefill_tokens) == (2, 1005)
    elsewhere.step(told(0.1, first=["2#x#0"], tokens=1))
    elsewhere.step(told(0.2, finished=[FinishedItem("2#y#0", "cancelled")]))
    assert (elsewhere.in_flight, elsewhere.waiting_prefill_tokens) == (1, 0)
    elsewhere.engine_gone()
    assert (elsewhere.in_flight, elsewhere.waiting_prefill_tokens) == (0, 0)


def test_counters_are_of_the_whole_engine() -> None:
    timeline, stats = Timeline(), supervisor().stats
    frame = StepFrame(
        1.0,
        tokens=[TokensItem(["a"], pack_ids([1]))],
        others=Others(tokens=7, finished=[FinishedItem("2#x#0", "stop", prompt_tokens=9, cached_tokens=4)]),
    )
    timeline.step(frame)
    stats.step(frame)
    assert (timeline.tokens_generated, timeline.requests_finished) == (8, 1)
    assert (stats.prompt_tokens, stats.cached_tokens, stats.ended_by_reason["stop"]) == (9, 4, 1)


# --------------------------------------------------------------------------------------------- news


def ended_in(service: Supervisor) -> None:
    """An output of class "chat" with three tokens 50 ms apart."""
    now = time.monotonic()
    sampling = SamplingParams(max_tokens=3)
    submit = Submit("a#0", [1, 2], sampling, 2.0, 0.04, None, "chat", 0, "", now)
    service.stats.submitted(submit, SimpleNamespace(times=[now + 0.1, now + 0.15, now + 0.2]))
    item = FinishedItem("a#0", "length", arrival=now, finished=now + 0.2, prompt_tokens=2, output_tokens=3)
    service.stats.step(StepFrame(now + 0.2, finished=[item]))


def test_how_an_output_fared_here_is_known_there() -> None:
    here, there = supervisor(), supervisor()
    mine, theirs = Sharing(here, Security()), Sharing(there, Security())
    ended_in(here)
    news = mine.take()
    assert news is not None
    assert mine.take() is None
    theirs.learn(msgspec.msgpack.decode(msgspec.msgpack.encode(news), type=News), time.monotonic())
    assert theirs.take() is None, "what was learned is not told again"
    now = time.monotonic()
    assert there.stats.classes(now) == here.stats.classes(now)
    assert (
        there.stats.by_target == here.stats.by_target == {("chat", "ttft"): [1, 1], ("chat", "tbt"): [0, 1]}
    )
    for one, other in (
        (there.stats.histograms.first_token, here.stats.histograms.first_token),
        (there.stats.histograms.inter_token, here.stats.histograms.inter_token),
    ):
        assert one.cumulative() == other.cumulative()
        assert one.total == pytest.approx(other.total)


def test_suspects_are_counted_once_a_crash_wherever_they_were() -> None:
    here, there = supervisor(), supervisor()
    mine, theirs = Sharing(here, Security()), Sharing(there, Security())

    def crash(engine: int) -> None:
        here.quarantine.crashed_here([b"poison"], engine)
        there.quarantine.crashed_here([b"poison"], engine)
        tell(mine, theirs)

    def tell(one: Sharing, other: Sharing) -> None:
        news, more = one.take(), other.take()
        for sharing, heard in ((other, news), (one, more)):
            if heard is not None:
                sharing.learn(heard, 0.0)

    crash(engine=7)
    here.quarantine.check(b"poison")
    there.quarantine.check(b"poison")
    there.quarantine.ended_here(b"poison")
    tell(mine, theirs)
    crash(engine=8)
    here.quarantine.check(b"poison")
    crash(engine=9)
    for quarantine in (here.quarantine, there.quarantine):
        with pytest.raises(Refusal, match="quarantined"):
            quarantine.check(b"poison")


def test_what_a_tenant_uses_here_is_paid_for_there(tmp_path: Path) -> None:
    file = tmp_path / "tenants.toml"
    limits = "requests-per-second = 2\ntokens-per-second = 10\nmax-in-flight = 3\nburst-seconds = 1\n"
    file.write_text(f"[tenants.acme]\n{limits}\n{token_entry('acme', new_token())}")
    file.chmod(0o600)
    options = SecurityOptions(tenants=file)
    securities = Security(options), Security(options)
    here, there = (Sharing(supervisor(), security) for security in securities)
    mine, theirs = (tenant for security in securities for tenant in security.known_tenants())
    mine.begin(0.0, prompt_tokens=4, outputs=3)
    news = here.take()
    assert news is not None
    there.learn(news, 0.0)
    assert theirs.total == Usage(requests=1, prompt_tokens=4, in_flight=3)
    theirs.check(0.0, outputs=0)
    with pytest.raises(Refusal, match="3 outputs in flight, and at most 3"):
        theirs.check(0.0)
    mine.end(0.1, output_tokens=20, outputs=3)
    news = here.take()
    assert news is not None
    there.learn(news, 0.1)
    assert theirs.total == Usage(requests=1, refused=1, prompt_tokens=4, output_tokens=20)
    with pytest.raises(Refusal, match="more than 10 tokens per second"):
        theirs.check(0.1)
    theirs.check(5.0)


def test_a_tenant_that_is_taken_out_of_the_file_and_put_back_is_counted_on(tmp_path: Path) -> None:
    file = tmp_path / "tenants.toml"
    acme, nobody = "[tenants.acme]\nmax-in-flight = 3\n", ""
    file.write_text(acme)
    file.chmod(0o600)
    securities = [Security(SecurityOptions(tenants=file)) for _ in range(2)]
    here, there = (Sharing(supervisor(), security) for security in securities)

    def changed_to(text: str, *told: Security) -> None:
        file.write_text(text)
        for security in told:
            security.reload()

    def pass_on() -> None:
        if (news := here.take()) is not None:
            there.learn(news, 0.0)

    mine, theirs = (tenant for security in securities for tenant in security.known_tenants())
    mine.begin(0.0, prompt_tokens=4, outputs=2)
    pass_on()
    changed_to(nobody, *securities)
    assert not any(security.known_tenants() for security in securities)
    mine.end(0.1, output_tokens=5)  # its requests go on; only new ones are refused
    changed_to(acme, securities[0])
    pass_on()  # to one that has not seen the file yet
    changed_to(acme, securities[1])
    for security, tenant in zip(securities, (mine, theirs), strict=True):
        assert security.known_tenants() == (tenant,)
        assert tenant.total == Usage(requests=1, prompt_tokens=4, output_tokens=5, in_flight=1)
    mine.end(0.2, output_tokens=5)
    pass_on()
    assert mine.total == theirs.total == Usage(requests=1, prompt_tokens=4, output_tokens=10)


def test_a_tenant_alone_is_as_before() -> None:
    tenant = Tenant("a", limits=Limits(max_in_flight=1))
    tenant.begin(0.0, 5)
    with pytest.raises(Refusal):
        tenant.check(0.0)
    tenant.end(0.0, 7)
    assert tenant.total == tenant.usage == Usage(1, refused=1, prompt_tokens=5, output_tokens=7)


# ------------------------------------------------------------------------------------------ options


def test_options_reach_the_processes_unchanged() -> None:
    options = ServeOptions(
        engine_config(model="demo", device="simulated", dispatch_options={"budget": 3}),
        Address("::1", 7),
        limits=GateLimits(9, None, 2.5),
        http=Address("localhost", 0),
        compat=("kserve", "vllm"),
        security=SecurityOptions(certificate=Path("a.pem"), key=Path("a.key")),
        operations=OperationsOptions(admin=Address("127.0.0.1", 0), traces=Path("/t"), access_log="-"),
        gateways=3,
    )
    assert decoded(encoded(options)) == options

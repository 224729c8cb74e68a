"""Invariants that hold whatever the policy: run one against a device that does its worst within the rules.

`exercise(policy)` drives a real `Scheduler` with an executor whose lanes finish in random order after random times,
whose clients cancel at random and whose lanes sometimes fail, on a KV pool that may be far too small, and checks every
gang and every output. Used by our own tests and by plugin authors for theirs.

`CASES` are rides worth taking, `run_case(case, dispatch=MyPolicy())` takes one, `conform(outcome)` says whether the
policy came through by its own decisions; `drift plugins check` does that. `record_golden` and `compare_golden` keep
what a policy decided in a file, so that a change of its mind is a difference in a test and not a surprise in service.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING

from drift_scheduler.domain import (
    SLO,
    DecodeDone,
    DecodeShape,
    Device,
    Event,
    Finished,
    FinishReason,
    Gang,
    Lane,
    LaneFailed,
    Observation,
    Partition,
    PrefillBlock,
    PrefillDone,
    PrefillShape,
    Request,
    RequestArrived,
    RequestCancelled,
    Sharing,
    Step,
    Tokens,
)
from drift_scheduler.loop import serve
from drift_scheduler.partition.tightest_decode import TightestDecode
from drift_scheduler.protocols import CostModel, DispatchPolicy, Observer, PartitionPolicy
from drift_scheduler.scheduler import Limits, Scheduler
from drift_scheduler.simulation.kv import CountingKv

if TYPE_CHECKING:
    from drift_scheduler.shadow import Agreement


class InvariantError(AssertionError):
    """A rule that every policy must keep was broken; the message says which and where."""


@dataclass(frozen=True, slots=True)
class Hazards:
    """How rough the ride is: chances per request of a cancellation and a stop token, per work of a lane failure."""

    cancel: float = 0.1
    stop: float = 0.2
    fail: float = 0.0


@dataclass(slots=True)
class Outcome:
    """What a run did."""

    steps: int = 0
    tokens: int = 0
    reasons: dict[str, FinishReason] = field(default_factory=dict)
    gangs: list[Gang] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    preemptions: int = 0
    planned: int = 0
    """Decisions that were made ahead."""


class FlatCosts:
    """A crude cost model: seconds fall with units, grow with tokens. Enough to make a policy choose."""

    def prefill(self, work: PrefillShape, units: int) -> float:
        """Proportional to new tokens over units."""
        return 1e-3 + 1e-4 * work.new_tokens / units

    def decode(self, work: DecodeShape, units: int) -> float:
        """A constant, and a little per request and context."""
        return 2e-3 + (1e-4 * work.batch + 1e-6 * work.context_tokens) / units

    def fused(self, prefill: PrefillShape, decode: DecodeShape, units: int) -> float:
        """One pass over both."""
        return self.prefill(prefill, units) + self.decode(decode, units)

    def slowdown(
        self, prefill: PrefillShape, decode: DecodeShape, partition: Partition
    ) -> tuple[float, float]:
        """A tenth either way."""
        return 1.1, 1.1

    def observe(self, observation: Observation) -> None:
        """Does not learn."""


class RandomExecutor:
    """An executor on a virtual clock that checks what it is given and finishes it whenever it likes."""

    def __init__(
        self, device: Device, requests: Iterable[Request], rng: random.Random, hazards: Hazards
    ) -> None:
        self._device = device
        self._rng = rng
        self._hazards = hazards
        self._now = 0.0
        self._due: list[tuple[float, int, Event | tuple[Lane, Gang]]] = []
        self._count = 0
        self._busy: dict[Lane, Gang] = {}
        self._progress: dict[int, int] = {}
        self.produced: dict[str, int] = {}
        self.forgotten: set[str] = set()
        self.gangs: list[Gang] = []
        self.meanwhile: Callable[[], bool] | None = None
        for request in requests:
            self._push(request.arrival, RequestArrived(request))
            if rng.random() < hazards.cancel:
                self._push(request.arrival + rng.expovariate(5.0), RequestCancelled(request.id))

    @property
    def device(self) -> Device:
        """What it offers."""
        return self._device

    def now(self) -> float:
        """Virtual seconds."""
        return self._now

    def submit(self, gang: Gang) -> None:
        """Check the gang against what runs, then start it."""
        self._check(gang)
        self.gangs.append(gang)
        first = self._rng.expovariate(100.0)
        second = self._rng.expovariate(100.0)
        if gang.sharing is Sharing.TEMPORAL:
            second += first
        elif gang.sharing is Sharing.FUSED:
            second = first
        if gang.decode is not None:
            self._busy[Lane.DECODE] = gang
            self._push(self._now + first, (Lane.DECODE, gang))
        if gang.prefill is not None:
            self._busy[Lane.PREFILL] = gang
            self._push(self._now + second, (Lane.PREFILL, gang))

    def wait(self, until: float | None) -> Sequence[Event] | None:
        """The next event or few; `None` when nothing is due."""
        if not self._due:
            if self._busy:
                raise InvariantError("a lane is busy with nothing due")
            return None
        if self.meanwhile is not None:
            self.meanwhile()
        self._now = max(self._now, self._due[0][0])
        events: list[Event] = []
        while self._due and self._due[0][0] <= self._now:
            item = heapq.heappop(self._due)[2]
            events.append(self._complete(*item) if isinstance(item, tuple) else item)
        return events

    def forget(self, request_ids: Sequence[str]) -> None:
        """A request is forgotten once, and never while a lane works on it."""
        for request_id in request_ids:
            if request_id in self.forgotten:
                raise InvariantError(f"'{request_id}' was forgotten twice")
            self.forgotten.add(request_id)

    def _push(self, at: float, item: Event | tuple[Lane, Gang]) -> None:
        self._count += 1
        heapq.heappush(self._due, (at, self._count, item))

    def _complete(self, lane: Lane, gang: Gang) -> Event:
        del self._busy[lane]
        if self._rng.random() < self._hazards.fail:
            return LaneFailed(lane, "planted failure")
        seconds = self._rng.random() * 0.01
        if lane is Lane.DECODE:
            assert gang.decode is not None
            return DecodeDone(seconds, stopped=self._sample(gang.decode.request_ids))
        block = gang.prefill
        assert block is not None
        ended = block.layer_stop == self._device.num_layers
        lasts = [c.request_id for c in block.chunks if c.last] if ended else []
        return PrefillDone(seconds, stopped=self._sample(lasts))

    def _sample(self, request_ids: Sequence[str]) -> tuple[str, ...]:
        for request_id in request_ids:
            if request_id in self.forgotten:
                raise InvariantError(f"work on '{request_id}' after it was forgotten")
            self.produced[request_id] = self.produced.get(request_id, 0) + 1
        return tuple(i for i in request_ids if self._rng.random() < self._hazards.stop / 20)

    def _check(self, gang: Gang) -> None:
        partition, total = gang.partition, self._device.total_units
        streams = gang.sharing is Sharing.STREAMS
        if streams and partition != self._device.unpartitioned:
            raise InvariantError(f"streams gang on {partition}")
        if partition.prefill + partition.decode > total and not streams:
            raise InvariantError(f"gang on {partition}, the device has {total} units")
        for lane, work in ((Lane.PREFILL, gang.prefill), (Lane.DECODE, gang.decode)):
            if work is not None and lane in self._busy:
                raise InvariantError(f"{lane.value} work for a busy lane")
        for running in self._busy.values():
            if running.partition != partition and not self._device.repartition_while_busy:
                raise InvariantError(
                    f"partition {running.partition} changed to {partition} under a busy lane"
                )
            beside = gang.sharing in (Sharing.SPATIAL, Sharing.STREAMS)
            if gang.sharing is not running.sharing or not beside:
                raise InvariantError(f"{gang.sharing.value} gang beside a {running.sharing.value} one")
        if gang.prefill is not None:
            self._check_block(gang.prefill, gang)

    def _check_block(self, block: PrefillBlock, gang: Gang) -> None:
        if self._progress.get(block.batch_id, 0) != block.layer_start:
            raise InvariantError(f"batch {block.batch_id} skipped or repeated layers at {block.layer_start}")
        self._progress[block.batch_id] = block.layer_stop
        free = gang.sharing is Sharing.STREAMS or self._device.system
        if gang.decode is None and Lane.DECODE not in self._busy and not free:
            whole = partition_is_whole(gang.partition, self._device) and gang.sharing is Sharing.EXCLUSIVE
            if not whole or block.layer_stop != self._device.num_layers:
                raise InvariantError("prefill with decode idle did not take the whole device in one block")


def partition_is_whole(partition: Partition, device: Device) -> bool:
    """Whether one lane has every unit."""
    return partition in (device.all_prefill, device.all_decode)


def small_device(units: int = 4, layers: int = 6) -> Device:
    """A device with every split of `units` on its menu and every sharing."""
    menu = tuple(Partition(units - d, d) for d in range(units + 1))
    return Device(units, menu, layers, frozenset(Sharing), name="conformance")


def random_requests(rng: random.Random, count: int, pool_tokens: int) -> list[Request]:
    """Requests of mixed lengths, priorities, targets and shared prefixes, none larger than the pool."""
    requests = []
    arrival = 0.0
    for i in range(count):
        arrival += rng.expovariate(50.0) if rng.random() < 0.8 else 0.0
        prompt = min(int(rng.lognormvariate(4.0, 1.2)) + 1, pool_tokens - 2)
        output = min(int(rng.lognormvariate(2.5, 1.0)) + 1, pool_tokens - prompt)
        family = rng.randrange(4)
        shared = rng.randrange(prompt // 16 + 1)
        keys = [(family, k) if k < shared else (family, k, i) for k in range(prompt // 16)]
        slo = SLO(ttft=rng.choice([0.05, 0.5, 5.0]), tbt=rng.choice([0.005, 0.02, 0.1]))
        priority = rng.choice([0, 0, 0, 1, -1])
        requests.append(Request(f"r{i}", arrival, prompt, output, slo, priority=priority, prefix_keys=keys))
    return requests


def exercise(
    policy: DispatchPolicy,
    *,
    seed: int,
    partitions: PartitionPolicy | None = None,
    costs: CostModel | None = None,
    device: Device | None = None,
    requests: int = 40,
    pages: int = 64,
    hazards: Hazards | None = None,
    limits: Limits | None = None,
    stopwatch: Callable[[], float] | None = None,
    watch: Callable[[Scheduler], Sequence[Observer]] | None = None,
    ahead: bool = False,
) -> Outcome:
    """Run `policy` through a random workload and check every invariant; deterministic under `seed`.

    Raises InvariantError. `Outcome.faults` lists what the scheduler refused and its fallback decided instead: a
    policy that conforms leaves it empty. `stopwatch` (monotonic seconds) makes a slow decision a fault; `watch` gives
    observers of the run. `ahead`: decide while the lanes work, however badly their ends are predicted, as far as the
    policy lets itself be asked.
    """
    rng = random.Random(seed)
    device = device or small_device()
    kv = CountingKv(pages, 16)
    offered = random_requests(rng, requests, pages * 16)
    executor = RandomExecutor(device, offered, rng, hazards or Hazards())
    scheduler = Scheduler(
        device,
        kv,
        policy,
        partitions or TightestDecode(),
        costs or FlatCosts(),
        limits or Limits(max_running=16),
        stopwatch,
    )
    outcome = Outcome()
    told: dict[str, int] = {}
    observers = watch(scheduler) if watch is not None else ()
    if ahead:
        executor.meanwhile = lambda: scheduler.plan_ahead(near=inf)

    def deliver(step: Step) -> None:
        outcome.steps += 1
        outcome.faults.extend(step.faults)
        if kv.free_pages < 0 or kv.free_pages > kv.total_pages:
            raise InvariantError(f"{kv.free_pages} free pages of {kv.total_pages}")
        for output in step.outputs:
            _account(output, told, outcome)

    serve(scheduler, executor, deliver, observers)
    outcome.gangs = executor.gangs
    outcome.preemptions, outcome.planned = scheduler.preemptions, scheduler.plans_used
    _check_end(offered, outcome, kv, scheduler, executor)
    return outcome


def _account(output: object, told: dict[str, int], outcome: Outcome) -> None:
    if isinstance(output, Tokens):
        for request_id in output.request_ids:
            if request_id in outcome.reasons:
                raise InvariantError(f"a token for '{request_id}' after its end")
            told[request_id] = told.get(request_id, 0) + 1
        outcome.tokens += len(output.request_ids)
    elif isinstance(output, Finished):
        if output.request_id in outcome.reasons:
            raise InvariantError(f"'{output.request_id}' ended twice")
        outcome.reasons[output.request_id] = output.reason
        if output.timing.output_tokens != told.get(output.request_id, 0):
            raise InvariantError(
                f"'{output.request_id}' ended with {output.timing.output_tokens} tokens, "
                f"clients saw {told.get(output.request_id, 0)}"
            )


def _check_end(
    offered: Sequence[Request],
    outcome: Outcome,
    kv: CountingKv,
    scheduler: Scheduler,
    executor: RandomExecutor,
) -> None:
    missing = [r.id for r in offered if r.id not in outcome.reasons]
    if missing:
        raise InvariantError(f"never ended: {', '.join(missing[:5])} ({len(missing)} in all)")
    if kv.free_pages != kv.total_pages or scheduler.live or scheduler.queue or scheduler.batches:
        raise InvariantError(
            f"left behind: {kv.total_pages - kv.free_pages} pages, {len(scheduler.live)} requests"
        )
    if executor.forgotten != {r.id for r in offered}:
        raise InvariantError("the executor was not told of every end")
    for request in offered:
        by_length = outcome.reasons[request.id] is FinishReason.LENGTH
        if by_length and executor.produced[request.id] != request.max_output_tokens:
            raise InvariantError(
                f"'{request.id}' ended by length after {executor.produced[request.id]} tokens"
            )


# ----------------------------------------------------------------------------------- for plugin authors


@dataclass(frozen=True, slots=True)
class Case:
    """One ride: a seed, a device of so many units, a pool of so many pages, and hazards. `ahead`: decide ahead."""

    name: str
    seed: int
    units: int = 4
    layers: int = 6
    pages: int = 64
    requests: int = 30
    hazards: Hazards = Hazards()
    ahead: bool = False

    def __str__(self) -> str:
        return self.name

    @property
    def device(self) -> Device:
        """What it runs on."""
        return small_device(self.units, self.layers)


def _cases() -> tuple[Case, ...]:
    calm = Hazards(cancel=0.0, stop=0.0)
    rough = Hazards(cancel=0.3, stop=0.3, fail=0.03)
    return (
        *(Case(f"everyday-{seed}", seed) for seed in range(4)),
        *(Case(f"calm-{seed}", seed, hazards=calm) for seed in range(10, 12)),
        *(Case(f"rough-{seed}", seed, hazards=rough) for seed in range(20, 23)),
        *(Case(f"small-pool-{seed}", seed, pages=12, hazards=calm) for seed in range(30, 33)),
        *(Case(f"large-pool-{seed}", seed, pages=400, requests=60) for seed in range(40, 42)),
        Case("undivided", 50, units=1),
        Case("two-units", 51, units=2),
        Case("many-units", 52, units=16, layers=32),
        Case("one-layer", 53, layers=1),
        *(Case(f"ahead-{seed}", seed, ahead=True) for seed in range(60, 62)),
        Case("ahead-rough", 62, hazards=rough, ahead=True),
        Case("ahead-small-pool", 63, pages=12, hazards=calm, ahead=True),
    )


CASES: tuple[Case, ...] = _cases()
"""Calm and rough, small pools and large, devices that cannot be split and devices with many splits."""


def run_case(
    case: Case,
    *,
    dispatch: DispatchPolicy | None = None,
    partitions: PartitionPolicy | None = None,
    costs: CostModel | None = None,
    stopwatch: Callable[[], float] | None = None,
    watch: Callable[[Scheduler], Sequence[Observer]] | None = None,
) -> Outcome:
    """Take a policy through a case. A partition policy rides under the dispatch policy `gang`, which asks it most.

    Raises InvariantError where a rule of the device or of conservation is broken, and ValueError without a policy.
    """
    if dispatch is None and partitions is None:
        raise ValueError("nothing to check: give a dispatch policy, a partition policy or both")
    if dispatch is None:
        from drift_scheduler.dispatch.gang import GangPolicy

        dispatch = GangPolicy()
    return exercise(
        dispatch,
        seed=case.seed,
        partitions=partitions,
        costs=costs,
        device=case.device,
        requests=case.requests,
        pages=case.pages,
        hazards=case.hazards,
        stopwatch=stopwatch,
        watch=watch,
        ahead=case.ahead,
    )


def conform(outcome: Outcome) -> None:
    """Raise InvariantError where the fallback had to decide: the service went on, the policy did not conform."""
    if outcome.faults:
        more = f" (and {len(outcome.faults) - 1} more)" if len(outcome.faults) > 1 else ""
        raise InvariantError(f"{outcome.faults[0]}{more}")


GOLDEN = Case("golden", 2024, requests=8, pages=32)
"""The ride whose log is kept. Small, so that a difference can be read."""


def record_golden(
    policy: DispatchPolicy, path: str | Path, *, partitions: PartitionPolicy | None = None
) -> None:
    """Write the decision log of `policy` on the golden ride. Raises DriftError, InvariantError."""
    from drift_scheduler.decision_log import DecisionLog

    logs: list[DecisionLog] = []

    def watch(scheduler: Scheduler) -> Sequence[Observer]:
        logs.append(DecisionLog(path, scheduler, {"policy": type(policy).__name__}))
        return logs

    try:
        conform(run_case(GOLDEN, dispatch=policy, partitions=partitions, watch=watch))
    finally:
        for log in logs:
            log.close()


def compare_golden(
    policy: DispatchPolicy, path: str | Path, *, partitions: PartitionPolicy | None = None
) -> Agreement:
    """What `policy` decides now where the log says what was decided; `Agreement.first` is the first difference.

    The log's events are replayed and its gangs carried out, so that one difference does not make the rest
    incomparable. Raises DriftError for a log that cannot be read.
    """
    from drift_scheduler.log_reader import open_log
    from drift_scheduler.shadow import compare

    log = open_log(path)

    def scheduler(follower: DispatchPolicy) -> Scheduler:
        kv = CountingKv(log.total_pages, log.page_tokens)
        return Scheduler(log.device, kv, follower, partitions or TightestDecode(), FlatCosts(), log.limits)

    return compare(log, policy, scheduler, {})


__all__ = [
    "CASES",
    "GOLDEN",
    "Case",
    "FlatCosts",
    "Hazards",
    "InvariantError",
    "Outcome",
    "RandomExecutor",
    "compare_golden",
    "conform",
    "exercise",
    "random_requests",
    "record_golden",
    "run_case",
    "small_device",
]

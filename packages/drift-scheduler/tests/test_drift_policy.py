"""`drift` decides from a view that the tests write themselves, with costs that are easy to reckon with."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest

from drift_scheduler.dispatch.drift import DriftPolicy
from drift_scheduler.domain import (
    SLO,
    DecodeShape,
    DecodeStep,
    Device,
    FloatArray,
    Gang,
    LaneView,
    Observation,
    Partition,
    PrefillBatch,
    PrefillChunk,
    PrefillShape,
    Request,
    Sharing,
    Waiting,
)
from drift_scheduler.errors import OptionError
from drift_scheduler.partition import TightestDecode
from drift_scheduler.plugins import hookimpl, load
from drift_scheduler.simulation.run import Scenario, Simulation

EVERY = frozenset({Sharing.SPATIAL, Sharing.TEMPORAL, Sharing.FUSED, Sharing.EXCLUSIVE})


@dataclass
class Reckoned:
    """Ten units. Prefill: 20 us a token on all; decode: 5 ms on all, 5 ms x 8 / units below 8. A mixed pass takes the
    longer of its parts and half a millisecond."""

    slow: float = 1.0
    mixed: float = 0.0005
    accidents: float = 1.0

    def prefill(self, work: PrefillShape, units: int) -> float:
        return work.new_tokens * 20e-6 * 10 / units

    def decode(self, work: DecodeShape, units: int) -> float:
        return 0.005 * max(1.0, 8 / units)

    def fused(self, prefill: PrefillShape, decode: DecodeShape, units: int) -> float:
        return max(self.prefill(prefill, units), self.decode(decode, units)) + self.mixed

    def slowdown(
        self, prefill: PrefillShape, decode: DecodeShape, partition: Partition
    ) -> tuple[float, float]:
        slow = self.slow if partition.prefill and partition.decode else self.accidents
        return slow, slow

    def observe(self, observation: Observation) -> None:
        raise AssertionError("a policy observes nothing")


@dataclass
class Picture:
    """A `View` with both lanes idle, one request decoding."""

    queue: list[Waiting]
    tbt_target: float = 0.1
    slack: float = 0.1
    now: float = 100.0
    sharings: frozenset[Sharing] = EVERY
    prefills: tuple[PrefillBatch, ...] = ()
    free_pages: int = 1_000_000
    total_pages: int = 1_000_000
    max_running: int = 64
    num_running: int = 1
    num_decoding: int = 1
    partition: Partition | None = None
    last_partition: Partition | None = None
    sharing: Sharing | None = None
    prefill_lane: LaneView = field(default_factory=lambda: LaneView(None, 0.0, 0.0))
    decode_lane: LaneView = field(default_factory=lambda: LaneView(None, 0.0, 0.0))

    @property
    def device(self) -> Device:
        splits = [Partition(10 - d, d) for d in (2, 4, 6, 8)]
        return Device(10, (Partition(10, 0), Partition(0, 10), *splits), 10, sharings=self.sharings)

    @property
    def num_waiting(self) -> int:
        return len(self.queue)

    def waiting(self, limit: int) -> tuple[Waiting, ...]:
        return tuple(self.queue[:limit])

    def find_waiting(self, request_ids: object) -> tuple[Waiting, ...]:
        raise AssertionError("not asked for here")

    def decode_step(self) -> DecodeStep | None:
        return DecodeStep(("old",), 1000) if self.num_decoding else None

    def tbt_slack(self) -> FloatArray:
        return np.array([self.slack])


def prompt(name: str, tokens: int, ttft: float = 10.0, arrival: float = 100.0, computed: int = 0) -> Waiting:
    request = Request(name, arrival, tokens, 10, SLO(ttft, 0.1))
    return Waiting(request, computed, tokens, 1, arrival + ttft, computed > 0)


def choose(view: Picture, costs: Reckoned | None = None, **options: float) -> Gang:
    gang = DriftPolicy(**options).choose(view, costs or Reckoned(), TightestDecode())  # type: ignore[arg-type]
    assert gang is not None
    return gang


def test_a_loose_target_gets_the_chunk_that_pays_and_not_the_largest_that_fits() -> None:
    """Up to 250 tokens ride along for nothing, and each beyond takes as long as it would alone; 4096 would fit."""
    gang = choose(Picture([prompt("new", 4096)]))
    assert gang.sharing is Sharing.FUSED
    assert gang.prefill is not None
    assert gang.prefill.shape().new_tokens == 256
    assert gang.decode is not None


@pytest.mark.parametrize(
    ("ttft", "room", "tokens"),
    [
        (10.0, {}, 256),  # 0.8 s of prefill in 10 s can wait for the chunk that pays
        (1.0, {}, 4096),  # in 1 s it cannot
        (0.81, {}, 4096),
        (1.0, {"num_running": 64}, 256),  # no slot, or no page, for what prefill would bring to decode
        (1.0, {"free_pages": 0}, 256),
    ],
)
def test_a_burst_that_needs_the_device_gets_large_chunks_while_there_is_room(
    ttft: float, room: dict[str, int], tokens: int
) -> None:
    burst = [prompt("long", 4096, ttft)] + [prompt(f"p{i}", 904, ttft + i / 1e6) for i in range(40)]
    gang = choose(Picture(burst, **room), Reckoned(mixed=0.002))  # type: ignore[arg-type]
    assert gang.sharing is Sharing.FUSED
    assert gang.prefill is not None
    assert gang.prefill.shape().new_tokens == tokens


def test_prompts_that_are_lost_anyway_make_no_burst() -> None:
    lost = [prompt(f"lost{i}", 4096, ttft=0.01) for i in range(20)]
    gang = choose(Picture([prompt("new", 4096), *lost]), Reckoned(mixed=0.002))
    assert gang.prefill is not None
    assert gang.prefill.shape().new_tokens == 256


@pytest.mark.parametrize(("target", "tokens"), [(0.0062, 256), (0.0056, 192)])
def test_a_mixed_pass_stays_within_the_target(target: float, tokens: int) -> None:
    gang = choose(Picture([prompt("new", 4096)], tbt_target=target, slack=target))
    assert gang.prefill is not None
    costs = Reckoned()
    assert gang.sharing is Sharing.FUSED
    assert gang.prefill.shape().new_tokens <= tokens
    assert costs.fused(gang.prefill.shape(), DecodeShape(1, 1000), 10) <= 0.99 * target


def test_where_mixing_is_dear_the_device_is_split_by_the_target() -> None:
    costs = Reckoned(mixed=1.0)
    tight, loose = (choose(Picture([prompt("new", 4096)], t, t), costs) for t in (0.008, 0.1))
    assert (tight.sharing, tight.partition) == (Sharing.SPATIAL, Partition(4, 6))
    assert (loose.sharing, loose.partition) == (Sharing.SPATIAL, Partition(8, 2))


def test_no_split_meets_the_target_so_the_phases_take_turns() -> None:
    costs = Reckoned(slow=2.0, mixed=1.0)
    gang = choose(Picture([prompt("new", 1000)], 0.009, 0.009), costs)
    assert gang.sharing is Sharing.TEMPORAL
    assert gang.prefill is not None
    per_layer = costs.prefill(gang.prefill.shape(), 10) / 10
    assert 0 < gang.prefill.layers * per_layer + 0.005 <= 0.009


def test_the_undivided_device_is_judged_by_its_worst_case_too() -> None:
    """Where nothing keeps the target for sure, the split does more work and the phases do not take turns."""
    costs = Reckoned(slow=2.0, mixed=1.0, accidents=2.0)
    gang = choose(Picture([prompt("new", 1000)], 0.009, 0.009), costs)
    assert gang.sharing is Sharing.SPATIAL
    fused = choose(Picture([prompt("new", 4096)], 0.012, 0.012), Reckoned(slow=2.0, accidents=2.0))
    assert fused.sharing is Sharing.FUSED
    assert fused.prefill is not None
    assert 2.0 * Reckoned().fused(fused.prefill.shape(), DecodeShape(1, 1000), 10) <= 0.012


@pytest.mark.parametrize("noise", [0.2, 0.5])
def test_noise_does_not_drive_drift_away_from_splits(noise: float) -> None:
    """Each split's worst case is remembered; if that of taking turns were not, every accident would speak for it."""
    slo = SLO(2.0, 0.03)
    scenario = Scenario(
        "sharegpt",
        "cpu",
        "demo",
        "drift",
        slo,
        rate=4.0,
        requests=150,
        noise=noise,
        cost="online",
        kv_pages=4096,
    )
    drift = Simulation(scenario).run()["sharing_s"]
    assert drift["spatial"] > 4 * (drift["temporal"] + drift["fused"])


def test_time_already_spent_is_made_up_by_a_step_of_decode_alone() -> None:
    """A split would keep 20 ms from the second token on; the first is due in 10 and would come after 20."""
    view = Picture([prompt("new", 4096)], tbt_target=0.021, slack=0.010)
    costs = Reckoned(mixed=1.0)
    first = choose(view, costs)
    assert (first.sharing, first.prefill) == (Sharing.EXCLUSIVE, None)
    view.slack = 0.021
    assert choose(view, costs).sharing is Sharing.SPATIAL


def test_prompts_go_by_deadline_and_those_that_cannot_make_it_last_shortest_first() -> None:
    """Alone, `long` takes 20 ms and `lost` 10 ms; both are due in 5, `short` and `later` can make it."""
    queue = [
        prompt("long", 1000, ttft=0.005),
        prompt("lost", 500, ttft=0.005),
        prompt("later", 100, ttft=9.0),
        prompt("short", 100, ttft=0.5),
    ]
    gang = choose(Picture(queue, num_decoding=0))
    assert gang.sharing is Sharing.EXCLUSIVE
    assert gang.prefill is not None
    assert [chunk.request_id for chunk in gang.prefill.chunks] == ["short", "later", "lost", "long"]


@pytest.mark.parametrize(("fixed", "tokens"), [(0.0, 4000), (0.001, 4000), (0.010, 8000)])
def test_batches_are_larger_where_a_pass_costs_much_whatever_its_tokens(fixed: float, tokens: int) -> None:
    """A pass over 4096 tokens takes 82 ms without the fixed part."""

    class Passes(Reckoned):
        def prefill(self, work: PrefillShape, units: int) -> float:
            return super().prefill(work, units) + fixed

    queue = [prompt(f"p{i}", 500) for i in range(20)]
    gang = choose(Picture(queue, num_decoding=0), Passes())
    assert gang.prefill is not None
    assert gang.prefill.shape().new_tokens == tokens


def test_a_prompt_under_way_is_not_overtaken_by_equals() -> None:
    """The one begun has little left and so the most slack; in turns, both would come late."""
    queue = [prompt("begun", 4000, arrival=99.0, computed=3900), prompt("next", 4000, arrival=99.5)]
    gang = choose(Picture(queue, num_decoding=0))
    assert gang.prefill is not None
    assert gang.prefill.chunks[0].request_id == "begun"


def test_a_little_better_does_not_displace_the_sharing_in_use() -> None:
    policy = DriftPolicy(hysteresis=9.0)
    view = Picture([prompt("new", 4096)])
    costs = Reckoned(mixed=1.0)
    first = policy.choose(view, costs, TightestDecode())  # type: ignore[arg-type]
    costs.mixed = 0.0005
    again = policy.choose(view, costs, TightestDecode())  # type: ignore[arg-type]
    fresh = choose(view, costs)
    assert first is not None
    assert again is not None
    assert (first.sharing, again.sharing, fresh.sharing) == (Sharing.SPATIAL, Sharing.SPATIAL, Sharing.FUSED)


def test_free_work_is_no_division_by_zero() -> None:
    class Free(Reckoned):
        def prefill(self, work: PrefillShape, units: int) -> float:
            return 0.0

        def decode(self, work: DecodeShape, units: int) -> float:
            return 0.0

    assert choose(Picture([prompt("new", 4096)]), Free(mixed=0.0)).decode is not None


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"prefill_weight": 0.0}, "prefill_weight"),
        ({"prefill_weight": float("nan")}, "prefill_weight"),
        ({"urgent_weight": 1.0}, "urgent_weight"),
        ({"urgent_weight": float("nan")}, "urgent_weight"),
        ({"prefill_weight": 20.0}, "urgent_weight"),
        ({"margin": 1.5}, "margin"),
        ({"hysteresis": -0.1}, "hysteresis"),
        ({"scan": 0}, "scan"),
        ({"max_batch_tokens": 0}, "max_batch_tokens"),
    ],
)
def test_options_out_of_range_are_named(options: dict[str, float], named: str) -> None:
    with pytest.raises(OptionError, match=f"option '{named}'"):
        DriftPolicy(**options)  # type: ignore[arg-type]


def under_way(name: str, tokens: int, next_layer: int, deadline: float) -> PrefillBatch:
    chunk = PrefillChunk(name, 0, tokens)
    return PrefillBatch(7, (chunk,), next_layer, deadline, PrefillShape.of([(tokens, 0)]))


def test_at_a_layer_boundary_an_urgent_prompt_overtakes_one_that_can_afford_it() -> None:
    long = under_way("long", 20_000, 2, deadline=110.0)
    urgent = prompt("urgent", 1000, ttft=0.1)
    gang = choose(Picture([urgent], prefills=(long,)))
    assert gang.prefill is not None
    assert [chunk.request_id for chunk in gang.prefill.chunks] == ["urgent"]
    tight = under_way("long", 20_000, 2, deadline=100.3)
    gang = choose(Picture([urgent], prefills=(tight,)))
    assert gang.prefill is not None
    assert [chunk.request_id for chunk in gang.prefill.chunks] == ["long"]


MIXED = {
    "chat": SLO(1.0, 0.03, name="chat"),
    "batch": SLO(30.0, 0.5, name="batch"),
}


@pytest.mark.parametrize("dispatch", ["drift", "gang", "temporal"])
def test_every_class_is_kept_within_its_own_targets(dispatch: str) -> None:
    """Chat among batch requests whose prompts alone would break its targets; one number for all would lose either."""

    def workload(
        seed: int, rate: object = None, requests: object = None, slo: object = None
    ) -> list[Request]:
        names = ["batch" if i % 4 == 0 else "chat" for i in range(48)]
        return [
            Request(
                f"{name}{i}", i * 0.08, 6000 if name == "batch" else 300, 40, MIXED[name], output_tokens=40
            )
            for i, name in enumerate(names)
        ]

    hook = hookimpl(lambda: {"mixed": workload})
    hook.__name__ = "drift_workloads"
    registry = load([("acme", SimpleNamespace(drift_workloads=hook))], installed=False)
    scenario = Scenario("mixed", "h200", "llama-3.1-8b", dispatch, SLO(1.0, 0.05))
    classes = Simulation(scenario, registry).run()["slo"]["classes"]
    assert {name: (c["ttft_s"], c["tbt_s"]) for name, c in classes.items()} == {
        "chat": (1.0, 0.03),
        "batch": (30.0, 0.5),
    }
    assert min(c["attainment"] for c in classes.values()) > 0.9

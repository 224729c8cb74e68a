"""Proof that a split is one: which SMs each lane's kernels ran on, alone, in a replayed graph, and both at once.

A kernel writes `%smid` of each of its programs. Also what SMs buy (bandwidth, matrix rate) and what a switch
costs.
"""

from __future__ import annotations

import time
from typing import Any

from gpu_parts.findings import Findings, Options, milliseconds, need_cuda

ESTIMATE = (40.0, 60.0)
PROGRAMS = 4096


def run(options: Options) -> Findings:
    """Needs a device with green contexts."""
    torch = need_cuda()
    found = Findings()
    from drift_kernels.green_contexts import GreenContexts

    with GreenContexts() as made:
        found.data["description"], found.data["notes"] = made.description, list(made.notes)
        splits = [split for split in made.menu() if all(split)]
        found.data["menu"] = splits
        for split in splits:
            found.attempt(f"SMs of {split[0]}+{split[1]}", lambda s=split: sms_of(torch, made, s))
        _check_splits(found, splits)
        middle = splits[len(splits) // 2]
        found.attempt("graphs", lambda: graphs(torch, made, middle))
        if isinstance(kept := found.data["graphs"], dict) and "failed" not in kept:
            found.at_least("graph keeps its partition on its own stream", kept["own stream"], 1)
            found.lines.append(
                f"graph replayed on another stream keeps its SMs: {bool(kept['other stream'])}"
            )
        found.attempt("overlap", lambda: overlap(torch, made, middle))
        if isinstance(found.data["overlap"], float):
            found.at_least(
                "both lanes at once: share of the shorter that overlaps",
                found.data["overlap"],
                0.8,
            )
        found.attempt("switch, us", lambda: switch(torch, made, splits[0], splits[-1]))
        found.attempt("rates by SMs", lambda: rates(torch, made, splits))
    return found


def _check_splits(found: Findings, splits: list[tuple[int, int]]) -> None:
    disjoint = exact = 0
    for split in splits:
        seen = found.data[f"SMs of {split[0]}+{split[1]}"]
        if "failed" in seen:
            continue
        disjoint += not set(seen["prefill"]) & set(seen["decode"])
        exact += (len(seen["prefill"]), len(seen["decode"])) == split
    found.at_least("splits whose lanes share no SM", disjoint, len(splits))
    found.at_least("splits with as many SMs as reported", exact, len(splits))


def _kernels() -> tuple[Any, Any]:
    """(writes each program's SM, spins for some iterations); compiled at first use."""
    from gpu_parts import device_kernels

    return device_kernels.where, device_kernels.spin


def _where(torch: Any, place: Any) -> set[int]:
    where, _ = _kernels()
    where[(PROGRAMS,)](place, num_warps=4)
    torch.cuda.synchronize()
    return set(place.tolist())


def sms_of(torch: Any, made: Any, split: tuple[int, int]) -> dict[str, list[int]]:
    """The SMs that programs of each lane ran on."""
    found = {}
    for lane, stream in zip(("prefill", "decode"), made.torch_streams(split), strict=True):
        place = torch.full((PROGRAMS,), -1, dtype=torch.int32, device="cuda")
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            found[lane] = sorted(_where(torch, place))
    return found


def graphs(torch: Any, made: Any, split: tuple[int, int]) -> dict[str, float]:
    """Whether a graph captured on a lane's stream runs on the lane's SMs, replayed there and elsewhere."""
    where, _ = _kernels()
    place = torch.full((PROGRAMS,), -1, dtype=torch.int32, device="cuda")
    stream = made.torch_streams(split)[1]
    allowed = set(sms_of(torch, made, split)["decode"])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        graph.capture_begin(capture_error_mode="thread_local")
        where[(PROGRAMS,)](place, num_warps=4)
        graph.capture_end()
    kept = {}
    for name, replayed_on in (("own stream", stream), ("other stream", torch.cuda.Stream())):
        place.fill_(-1)
        torch.cuda.synchronize()
        with torch.cuda.stream(replayed_on):
            graph.replay()
        torch.cuda.synchronize()
        seen = set(place.tolist())
        kept[name] = float(seen <= allowed and -1 not in seen)
    return kept


def overlap(torch: Any, made: Any, split: tuple[int, int]) -> float:
    """Two kernels that fill their lanes, launched one after the other: what of the shorter ran beside the longer."""
    _, spin = _kernels()
    sink = torch.zeros(4, device="cuda")
    streams = made.torch_streams(split)
    rounds = 20000
    while True:
        alone = milliseconds(lambda r=rounds: spin[(split[0],)](sink, r, num_warps=4), 3)
        if alone > 5 or rounds > 1 << 30:
            break
        rounds *= 2
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(2)]
    torch.cuda.synchronize()
    for stream, count, (start, stop) in zip(streams, split, events, strict=True):
        with torch.cuda.stream(stream):
            start.record()
            spin[(count,)](sink, rounds, num_warps=4)
            stop.record()
    torch.cuda.synchronize()
    base = events[0][0]
    spans = [(base.elapsed_time(start), base.elapsed_time(stop)) for start, stop in events]
    shared = min(spans[0][1], spans[1][1]) - max(spans[0][0], spans[1][0])
    return float(max(0.0, shared) / min(stop - start for start, stop in spans))


def switch(torch: Any, made: Any, first: tuple[int, int], second: tuple[int, int]) -> dict[str, float]:
    """From the end of a tiny kernel on one split to the end of one on another that waits for it, and on the same."""
    x = torch.zeros(32, device="cuda")
    one, other = made.torch_streams(first)[1], made.torch_streams(second)[1]

    def pair(a: Any, b: Any) -> float:
        times = []
        for _ in range(30):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            with torch.cuda.stream(a):
                x.add_(1)
                start.record()
            b.wait_event(start)
            with torch.cuda.stream(b):
                x.add_(1)
                stop.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(stop) * 1e3)
        return sorted(times)[len(times) // 2]

    begun = time.perf_counter()
    for _ in range(1000):
        other.wait_event(torch.cuda.Event())
    host = (time.perf_counter() - begun) * 1e3
    return {"same stream": pair(one, one), "another split": pair(one, other), "host, one wait": host}


def rates(torch: Any, made: Any, splits: list[tuple[int, int]]) -> list[dict[str, float]]:
    """Bandwidth and matrix rate of the decode lane of each split, and of the whole device."""
    from gpu_parts.device_kernels import copy_blocks

    source = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source)
    a, b = (torch.randn(4096, 4096, device="cuda").bfloat16() for _ in range(2))
    out = torch.empty_like(a)
    found = []
    for split in [*splits, (0, made.units)]:
        stream = made.torch_streams(split)[1]
        sms = split[1]
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            copied = milliseconds(
                lambda s=sms: copy_blocks[(s * 4,)](source, target, source.numel(), BLOCK=8192, num_warps=8),
                10,
            )
            product = milliseconds(lambda: torch.mm(a, b, out=out), 10)
        found.append(
            {
                "sms": sms,
                "bytes/s": 8.0 * source.numel() / (copied * 1e-3),
                "flop/s": 2.0 * 4096**3 / (product * 1e-3),
            }
        )
    return found

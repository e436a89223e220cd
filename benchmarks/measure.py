"""How the benchmarks measure: CPU seconds of this process, peak memory of a forked child, medians of interleaved runs.

An arm is a function that makes ready and returns what is measured, so that making ready costs nothing:

    def ours() -> Call:
        model = make()
        return lambda: hs.adapt(model, config)
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import json
import os
import statistics
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Scale = Literal["full", "quick", "toy"]
Row = dict[str, Any]
Call = Callable[[], object]
Arm = Callable[[], Call]

_RESET = Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Cost:
    """What one arm needed. None where it was not measured.

    Attributes:
        cpu: seconds of this process. peak: MB above what was there before. kept: MB that are still there after.
    """

    cpu: float | None = None
    peak: float | None = None
    kept: float | None = None


@dataclass(frozen=True)
class Target:
    """What the row must show: ratios of ours to the peer's at most these, and whatever else is said in words."""

    time: float | None = None
    memory: float | None = None
    also: Mapping[str, bool] = field(default_factory=dict)

    def __str__(self) -> str:
        words = [f"≤ {self.time:.3g}× the CPU"] if self.time is not None else []
        words += [f"≤ {self.memory:.3g}× the memory"] if self.memory is not None else []
        return ", ".join([*words, *self.also])

    def met(self, time: float | None, memory: float | None) -> bool | None:
        """Whether all of it holds; None where there is no target, or what it needs was not measured."""
        held = list(self.also.values())
        for limit, ratio in ((self.time, time), (self.memory, memory)):
            if limit is not None:
                if ratio is None:
                    return None
                held.append(ratio <= limit)
        return all(held) if held else None


def row(work: str, ours: Cost, peer: Cost, target: Target | None = None, note: str = "") -> Row:
    """One line of a table."""
    target = target or Target()
    time, memory = _ratio(ours.cpu, peer.cpu), _ratio(ours.peak, peer.peak)
    return {
        "work": work,
        "ours_cpu_s": _rounded(ours.cpu),
        "peer_cpu_s": _rounded(peer.cpu),
        "ratio": _rounded(time),
        "ours_mb": _rounded(ours.peak),
        "peer_mb": _rounded(peer.peak),
        "memory_ratio": _rounded(memory),
        "target": str(target),
        "met": target.met(time, memory),
        "note": note,
    }


def _ratio(ours: float | None, peer: float | None) -> float | None:
    return None if ours is None or not peer else ours / peer


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


def cpu_seconds(call: Call) -> float:
    """User and system time of one call, in all threads of this process."""
    gc.collect()
    began = time.process_time()
    call()
    return time.process_time() - began


def interleaved(arms: Mapping[str, Arm], repeats: int, warmups: int = 1) -> dict[str, float]:
    """Median CPU seconds of each arm, run in turns (A B A B …), so that a change of the machine meets all alike."""
    gc.freeze()  # What is imported need not be searched for garbage before every run.
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(warmups + repeats):
        for name, arm in arms.items():
            taken = cpu_seconds(arm())
            if turn >= warmups:
                seconds[name].append(taken)
    return {name: statistics.median(taken) for name, taken in seconds.items()}


def in_child(arm: Arm, warm: Arm | None = None, exact: bool = False) -> Cost:
    """One run in a forked child: what the arm keeps, and what allocators keep for it, ends with the child.

    The memory is the growth of the resident set, from /proc; None where there is none. Pages of files, such as the
    code of a kernel that runs for the first time, are not counted.

    Args:
        warm: a smaller arm of the same kind that is run first, so that buffers made once in a process are not counted.
        exact: count what torch allocates instead, which is right to the byte and blind to other libraries. No seconds.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)

        try:
            import torch

            # The team of threads that the parent's OpenMP knows did not come along: whoever waits for it waits forever.
            torch.set_num_threads(1)
            found = held(arm) if exact else _cost(arm, warm)
            os.write(writer, json.dumps(dataclasses.astuple(found)).encode())
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    if not answer:
        raise RuntimeError("the child that measures failed: its traceback stands above")
    return Cost(*json.loads(answer))


def _cost(arm: Arm, warm: Arm | None) -> Cost:
    if warm is not None:
        warm()()
    call = arm()
    if not _RESET.exists():
        return Cost(cpu_seconds(call))
    _give_back()
    _RESET.write_text("5")  # VmHWM, the largest size so far, becomes VmRSS, the size now.
    before = resident()
    began = time.process_time()
    result = call()
    seconds = time.process_time() - began
    after = resident()
    peak = after["VmHWM"] - before["VmRSS"] - max(0.0, after["RssFile"] - before["RssFile"])
    _give_back()
    kept = resident()["RssAnon"] - before["RssAnon"]
    del result
    return Cost(seconds, max(0.0, peak), max(0.0, kept))


def _give_back() -> None:
    """Free memory goes back to the system: otherwise it would be used again unseen."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def resident() -> dict[str, float]:
    """What is resident, by kind, in MB."""
    lines = [line.split() for line in Path("/proc/self/status").read_text().splitlines()]
    return {
        words[0].rstrip(":"): int(words[1]) * 1024 / 1e6
        for words in lines
        if words[0].startswith(("VmHWM", "VmRSS", "Rss"))
    }


def measure(arms: Mapping[str, Arm], repeats: int, exact: bool = False) -> dict[str, Cost]:
    """CPU and memory of each arm.

    Args:
        exact: count what torch allocates, instead of resident pages after a first run (see `in_child`).
    """
    seconds = interleaved(arms, repeats)
    alone = {name: in_child(arm, None if exact else arm, exact) for name, arm in arms.items()}
    return {name: dataclasses.replace(cost, cpu=seconds[name]) for name, cost in alone.items()}


def once(arm: Arm) -> Cost:
    """CPU of one run, and what torch allocates in another: for what takes long."""
    return dataclasses.replace(in_child(arm, exact=True), cpu=in_child(arm).cpu)


def allocated(call: Call) -> float:
    """The most that torch held at once of what it allocated within a call, in MB: exact, unlike the resident set."""
    return held(lambda: call).peak or 0.0


def held(arm: Arm) -> Cost:
    """The most that torch held at once of what an arm's call allocated, and what of it the result keeps.

    What the arm makes ready and the call gives back counts too, with a minus: whoever replaces the weights of a model
    needs both for one weight alone.
    """
    from torch.profiler import ProfilerActivity, profile, record_function

    gc.collect()  # What dies within would count as given back, and was never counted as taken.
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call = arm()
        gc.collect()
        with record_function("begins"):
            pass
        result = call()
    results: Any = recorded.profiler.kineto_results
    events = sorted(results.events(), key=lambda event: event.start_ns())
    began = next(event.start_ns() for event in events if event.name() == "begins")
    now = peak = before = 0
    for event in events:
        if event.name() == "[memory]":
            now += event.nbytes()
            if event.start_ns() < began:
                before = now
            peak = max(peak, now - before)
    del result
    return Cost(None, peak / 1e6, (now - before) / 1e6)


def fresh_processes(arms: Mapping[str, list[str]], repeats: int) -> dict[str, float]:
    """Median CPU seconds of each whole process, of its start and its children too, run in turns as in `interleaved`."""
    taken: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(repeats + 1):
        for name, arguments in arms.items():
            process = os.posix_spawn(arguments[0], arguments, os.environ, file_actions=_SILENT)
            _, status, usage = os.wait4(process, 0)
            if status:
                raise RuntimeError(f"{' '.join(arguments)} failed")
            taken[name].append(usage.ru_utime + usage.ru_stime)
    return {name: statistics.median(seconds[1:]) for name, seconds in taken.items()}  # The first writes the bytecode.


_SILENT = [(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)]

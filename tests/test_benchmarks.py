"""The benchmarks run, at toy size, and their rows have the shape that the tables are made from. No timing is judged."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
NUMBERS = ("ours_cpu_s", "peer_cpu_s", "ratio", "ours_mb", "peer_mb", "memory_ratio")


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))


@pytest.mark.parametrize(
    "topic",
    [
        "decompositions",
        "models",
        "training_step",
        "recompress",
        "merging",
        "estimate",
        "bank",
        pytest.param("lifecycle", marks=pytest.mark.slow),  # It starts a dozen processes.
    ],
)
def test_a_topic_runs(topic: str) -> None:
    pytest.importorskip("peft")
    rows: list[dict[str, Any]] = list(importlib.import_module(f"benchmarks.{topic}").rows("toy"))
    assert len({row["work"] for row in rows}) == len(rows) > 0
    for row in rows:
        assert set(row) == {"work", *NUMBERS, "target", "met", "note"}
        assert all(row[name] is None or row[name] >= 0 for name in NUMBERS)
        assert row["met"] in (True, False, None)
        assert json.loads(json.dumps(row)) == row


def test_memory_is_measured_also_after_threads_were_started() -> None:
    code = (
        "import torch; from benchmarks.measure import in_child\n"
        "W = torch.ones(1000, 1000)\n"
        "assert torch.get_num_threads() == 2 and float(torch.mm(W, W).exp().sum())\n"
        "print(in_child(lambda: lambda: torch.mm(W, W).exp()).kept)\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    assert 3 < float(run.stdout) < 8  # 4 MB


def test_every_topic_is_tested() -> None:
    main = importlib.import_module("benchmarks.__main__")
    scripts = {path.stem for path in (ROOT / "benchmarks").glob("*.py")}
    assert set(main.TOPICS) == scripts - {"__init__", "__main__", "measure", "subjects"}


def test_a_run_writes_the_facts_and_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    main, measure = (importlib.import_module(f"benchmarks.{name}") for name in ("__main__", "measure"))
    topic = importlib.import_module("benchmarks.recompress")
    row = measure.row("nothing", measure.Cost(1.0), measure.Cost(2.0), measure.Target(time=0.6))
    monkeypatch.setattr(topic, "rows", lambda scale: iter([row]))
    monkeypatch.setattr("sys.argv", ["benchmarks", "recompress", "--out", str(tmp_path)])
    main.main()
    written = json.loads((tmp_path / "recompress.json").read_text(encoding="utf-8"))
    assert written["rows"] == [row]
    assert {"date", "headstart", "torch", "peft", "transformers", "cpu", "threads"} <= written.keys()
    assert str(tmp_path) not in json.dumps(written)


def test_a_target_is_met_where_all_of_it_holds() -> None:
    Target = importlib.import_module("benchmarks.measure").Target
    both = Target(time=0.5, memory=0.5, also={"right": True})
    assert both.met(0.4, 0.4) is True
    assert both.met(0.6, 0.4) is False
    assert both.met(0.4, None) is None
    assert Target(also={"right": False}).met(None, None) is False
    assert Target().met(0.1, 0.1) is None
    assert str(both) == "≤ 0.5× the CPU, ≤ 0.5× the memory, right"


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is measured on Linux")
def test_memory_is_that_of_the_largest_moment() -> None:
    measure = importlib.import_module("benchmarks.measure")

    def arm() -> Any:
        there_before = torch.ones(12_000_000)  # Above 32 MiB the allocator keeps nothing back.

        def call() -> torch.Tensor:
            torch.cat([there_before, there_before])  # 96 MB, gone at once
            return there_before + 1  # 48 MB, kept

        return call

    cost = measure.in_child(arm, warm=arm)
    assert cost.peak == pytest.approx(96, abs=2)
    assert cost.kept == pytest.approx(48, abs=2)


def test_weights_that_are_replaced_one_by_one_take_the_memory_of_one() -> None:
    measure = importlib.import_module("benchmarks.measure")

    def arm() -> Any:
        weights = [torch.ones(250_000) for _ in range(5)]

        def call() -> None:
            for i, old in enumerate(weights):
                weights[i] = old + 1
                del old

        return call

    cost = measure.in_child(arm, exact=True)
    assert cost.peak == pytest.approx(1, abs=0.01)
    assert cost.kept == pytest.approx(0, abs=0.01)


def test_arms_take_turns() -> None:
    measure = importlib.import_module("benchmarks.measure")
    turns: list[str] = []
    arms = {name: lambda name=name: lambda: turns.append(name) for name in "AB"}
    measure.interleaved(arms, repeats=2, warmups=1)
    assert "".join(turns) == "ABABAB"

"""Merging on disk beside copying the same files and beside PEFT, and adapters into one beside PEFT.

The checkpoint is a Llama's in bfloat16, of random numbers, in shards; the adapter is of rank 16 on every projection.
Seconds on the clock count there, too: whoever merges waits for a disk. It uses all cores that OMP_NUM_THREADS allows,
where adapters are combined on one:

    OMP_NUM_THREADS=2 python -m benchmarks merging

    OMP_NUM_THREADS=2 python -m benchmarks.merging seven [FOLDER]
                                13.5 GB, Llama-7B's shapes in three shards, alone; 27 GB of disk
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from safetensors.torch import save_file

import headstart as hs
from benchmarks.measure import Arm, Call, Cost, Row, Scale, Target, in_child, measure, resident, row
from benchmarks.recompress import combined, two_adapters
from headstart.files.adapter import read_adapter
from headstart.files.merging.factors import combined as combined_layer
from headstart.files.merging.factors import factors_of

# hidden, intermediate, layers, vocabulary: 2.3 GB, 0.6 GB, and next to nothing.
SIZES = {"full": (2048, 5632, 24, 32000), "quick": (2048, 5632, 5, 8000), "toy": (32, 64, 1, 64)}
SEVEN = (4096, 11008, 32, 32000)
SHARD = 5_000_000_000  # bytes of a shard of it
TURNS = 3  # of merging and copying it
RANK, SHARES = 16, (0.7, 0.3)
WIDTHS = {"full": 2048, "quick": 1024, "toy": 64}


def rows(scale: Scale) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as place:
        yield from _checkpoint(Path(place), scale)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # Here CPU seconds count, and those of threads that wait for one another would, too.
    try:
        with tempfile.TemporaryDirectory() as place:
            yield from _adapters(Path(place), scale)
    finally:
        torch.set_num_threads(threads)


# ------------------------------------------------------------------ a checkpoint


def _checkpoint(folder: Path, scale: Scale) -> Iterator[Row]:
    size = _write(folder, *SIZES[scale])
    work = f"{size / 1e9:.2f} GB, bfloat16"
    repeats = {"full": 5, "quick": 3, "toy": 1}[scale]

    def merge() -> None:
        hs.merge_checkpoint(folder / "base", folder / "adapter", folder / "merged", force=True)

    def copy() -> None:
        _copy(folder / "base", folder / "merged")

    merge()  # What is imported once is.
    clock: dict[str, list[float]] = {"merge": [], "copy": []}
    spent: dict[str, list[float]] = {"merge": [], "copy": []}
    for _ in range(repeats):
        for name, act in (("copy", copy), ("merge", merge)):
            shutil.rmtree(folder / "merged", ignore_errors=True)
            _forget(folder / "base")
            began, cpu = time.perf_counter(), time.process_time()
            act()
            clock[name].append(time.perf_counter() - began)
            spent[name].append(time.process_time() - cpu)
    seconds = {name: statistics.median(found) for name, found in clock.items()}
    shutil.rmtree(folder / "merged")
    ours = dataclasses.replace(in_child(_call(merge)), cpu=statistics.median(spent["merge"]))
    shutil.rmtree(folder / "merged")
    speed = seconds["copy"] / seconds["merge"]
    also = {"≥ 0.7× the speed of copying": speed >= 0.7, "< 2 GB of memory": ours.peak is None or ours.peak < 2000}
    rate = {name: f"{size / 1e6 / found:.0f} MB/s" for name, found in seconds.items()}
    note = f"merged at {rate['merge']}, copied and synced at {rate['copy']}: {speed:.2f}×"
    copied = Cost(statistics.median(spent["copy"]))
    yield row(f"merge on disk, beside copying, {work}", ours, copied, Target(also=also), note)

    theirs = in_child(_call(lambda: _through_peft(folder)))
    note = "PEFT loads the model, merges and saves it; of both, pages of files are not counted"
    yield row(f"merge on disk, beside PEFT, {work}", ours, theirs, Target(memory=0.5), note)


def _call(act: Callable[[], None]) -> Arm:
    return lambda: act


def _write(folder: Path, hidden: int, wide: int, layers: int, words: int, shard: int = 0) -> int:
    """A checkpoint and an adapter for it, a block a shard or in shards of so many bytes. Returns its size."""
    config = transformers.LlamaConfig(
        hidden_size=hidden, intermediate_size=wide, num_hidden_layers=layers, vocab_size=words, dtype="bfloat16",
        num_attention_heads=hidden // 16, num_key_value_heads=hidden // 16, tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"], bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    (folder / "base").mkdir()
    config.save_pretrained(folder / "base")
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in transformers.LlamaForCausalLM(config).named_parameters()}
    parts = _parts(shapes, shard)
    generator, index, factors, size = torch.Generator().manual_seed(0), {}, {}, 0
    # Random numbers, the same over and over where there are many.
    drawn = (0.02 * torch.randn(1 << 24, generator=generator)).bfloat16()
    for i, part in enumerate(parts, start=1):
        file = f"model-{i:05}-of-{len(parts):05}.safetensors"
        tensors = {n: drawn.repeat(-(-s.numel() // drawn.numel()))[: s.numel()].reshape(s) for n, s in part.items()}
        save_file(tensors, folder / "base" / file, {"format": "pt"})
        index |= dict.fromkeys(tensors, file)
        size += sum(tensor.nbytes for tensor in tensors.values())
        del tensors
        for name, shape in part.items():
            if name.endswith("_proj.weight"):
                layer = f"base_model.model.{name.removesuffix('.weight')}"
                factors[f"{layer}.lora_A.weight"] = torch.randn(RANK, shape[1], generator=generator) / shape[1] ** 0.5
                factors[f"{layer}.lora_B.weight"] = 0.005 * torch.randn(shape[0], RANK, generator=generator)
    table = {"metadata": {"total_size": size}, "weight_map": index}
    (folder / "base" / "model.safetensors.index.json").write_text(json.dumps(table))
    (folder / "adapter").mkdir()
    save_file(factors, folder / "adapter" / "adapter_model.safetensors", {"format": "pt"})
    leaves = sorted({name.split(".")[-3] for name in factors})
    fields = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": leaves}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(fields))
    return size


def _parts(shapes: Mapping[str, torch.Size], shard: int) -> list[dict[str, torch.Size]]:
    """What lies together in a shard."""
    if not shard:
        parts: dict[str, dict[str, torch.Size]] = {}
        for name, shape in shapes.items():
            parts.setdefault(name.split(".layers.")[-1].split(".")[0], {})[name] = shape
        return list(parts.values())
    found: list[dict[str, torch.Size]] = [{}]
    for name, shape in shapes.items():
        if 2 * sum(one.numel() for one in found[-1].values()) + 2 * shape.numel() > shard:
            found.append({})
        found[-1][name] = shape
    return found


def _copy(source: Path, target: Path) -> None:
    """Every file copied, and on the disk."""
    target.mkdir()
    for file in sorted(source.iterdir()):
        shutil.copyfile(file, target / file.name)
        handle = os.open(target / file.name, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def _forget(folder: Path) -> None:
    """Let the system drop these files from its memory, so that they are read from the disk."""
    os.sync()
    for file in folder.glob("*.safetensors"):
        handle = os.open(file, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def _through_peft(folder: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "base", dtype="auto")
    whole: Any = peft.PeftModel.from_pretrained(model, str(folder / "adapter")).merge_and_unload()
    whole.save_pretrained(folder / "theirs")
    shutil.rmtree(folder / "theirs")


# ------------------------------------------------------------------ 13 GB


def seven(place: str | None) -> None:
    """Merge Llama-7B's shapes and copy them, in turns, and write the row of it."""
    from benchmarks.__main__ import RESULTS, show, write

    clock: dict[str, list[float]] = {"merge": [], "copy": []}
    spent: dict[str, list[float]] = {"merge": [], "copy": []}
    peak = 0.0
    with tempfile.TemporaryDirectory(dir=place) as there:
        folder = Path(there)
        size = _write(folder, *SEVEN, shard=SHARD)
        shards = len(list((folder / "base").glob("*.safetensors")))

        def merge() -> None:
            hs.merge_checkpoint(folder / "base", folder / "adapter", folder / "merged")

        def copy() -> None:
            _copy(folder / "base", folder / "merged")

        for _ in range(TURNS):
            for name, act in (("merge", merge), ("copy", copy)):
                _forget(folder / "base")  # Before the clock runs: what was just written goes to the disk first.
                with _watched() as seen:
                    began, cpu = time.perf_counter(), time.process_time()
                    act()
                    clock[name].append(time.perf_counter() - began)
                    spent[name].append(time.process_time() - cpu)
                if name == "merge":
                    peak = max(peak, *seen)
                print(f"{name}: {clock[name][-1]:.1f} s, {spent[name][-1]:.1f} s of CPU", flush=True)
                shutil.rmtree(folder / "merged")
    seconds = {name: statistics.median(found) for name, found in clock.items()}
    speed = seconds["copy"] / seconds["merge"]
    turns = ", ".join(f"{copied / merged:.2f}" for merged, copied in zip(clock["merge"], clock["copy"], strict=True))
    rate = {name: f"{size / 1e6 / found:.0f} MB/s" for name, found in seconds.items()}
    found = row(
        f"merge on disk, beside copying, {size / 1e9:.1f} GB in {shards} shards, bfloat16",
        Cost(statistics.median(spent["merge"]), peak),
        Cost(statistics.median(spent["copy"])),
        Target(also={"≥ 0.7× the speed of copying": speed >= 0.7, "< 2 GB of memory": peak < 2000}),
        f"merged at {rate['merge']}, copied and synced at {rate['copy']}: {speed:.2f}×; in turns {turns}; the memory "
        "is all that the process has of its own",
    )
    show(found)
    write(RESULTS, "merging_13gb", [found])


@contextlib.contextmanager
def _watched() -> Iterator[list[float]]:
    """This process's anonymous memory, in MB, looked at twenty times a second."""
    seen, ended = [resident()["RssAnon"]], threading.Event()

    def watch() -> None:
        while not ended.wait(0.05):
            seen.append(resident()["RssAnon"])

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        yield seen
    finally:
        ended.set()
        watching.join()


# ------------------------------------------------------------------ adapters


def _adapters(folder: Path, scale: Scale) -> Iterator[Row]:
    n = WIDTHS[scale]
    generator = torch.Generator().manual_seed(0)
    shapes = (RANK, n), (n, RANK)
    pairs = tuple(tuple(torch.randn(shape, generator=generator) for shape in shapes) for _ in SHARES)
    paths = []
    for i, (A, B) in enumerate(pairs):
        paths.append(folder / f"{i}")
        paths[-1].mkdir()
        tensors = {"base_model.model.0.lora_A.weight": A, "base_model.model.0.lora_B.weight": B}
        save_file(tensors, paths[-1] / "adapter_model.safetensors", {"format": "pt"})
        fields = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": ["0"]}
        (paths[-1] / "adapter_config.json").write_text(json.dumps(fields))
    whole = sum(share * B.double() @ A.double() for share, (A, B) in zip(SHARES, pairs, strict=True))

    def peer() -> Call:
        model = two_adapters(pairs, n)
        return lambda: combined(model)

    def ours(method: str, rank: int | None) -> Arm:
        def act() -> None:
            hs.combine(paths, folder / "out", weights=SHARES, method=method, rank=rank, force=True)

        return lambda: act

    def in_memory() -> Call:
        read = [(share, factors_of(read_adapter(path), "0")) for share, path in zip(SHARES, paths, strict=True)]
        return lambda: combined_layer("0", read, "svd", RANK, 0.5, 0)

    arms = {"memory": in_memory, "files": ours("svd", RANK), "peft": peer}
    costs = measure(arms, repeats={"full": 5, "quick": 3, "toy": 1}[scale])
    low_A, low_B = combined(two_adapters(pairs, n))
    theirs = _distance(whole, low_A, low_B)
    found = _distance(whole, *_factors(folder / "out"))
    also = {"as close": found <= theirs + 1e-4}
    note = f"distance from the sum: ours {found:.4f}, PEFT {theirs:.4f}"
    work = f"two adapters of rank 16 into one of 16 by svd, {n}×{n}"
    target = Target(time=1 / 500 if scale == "full" else 1, also=also)
    yield row(work, costs["memory"], costs["peft"], target, note)
    note = "ours reads two folders and writes one, and waits until the disk has it; PEFT's are in memory"
    target = Target(time=1 / 100 if scale == "full" else 1, also=also)
    yield row(f"{work}, from files to a file", costs["files"], costs["peft"], target, note)
    hs.combine(paths, folder / "exact", weights=SHARES)
    exact = _distance(whole, *_factors(folder / "exact"))
    note = f"distance from the sum {exact:.1e}, at rank 32"
    target = Target(also={"exact": exact < 1e-6})
    yield row(f"two adapters of rank 16 into one, exactly, {n}×{n}", Cost(), Cost(), target, note)


def _factors(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    from safetensors.torch import load_file

    found = load_file(folder / "adapter_model.safetensors")
    return found["base_model.model.0.lora_A.weight"], found["base_model.model.0.lora_B.weight"]


def _distance(whole: Any, A: torch.Tensor, B: torch.Tensor) -> float:
    return float((whole - B.double() @ A.double()).norm() / whole.norm())


if __name__ == "__main__":
    if sys.argv[1:2] != ["seven"]:
        raise SystemExit(f"{__doc__}")
    seven(sys.argv[2] if len(sys.argv) > 2 else None)

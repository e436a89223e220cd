"""Many adapters on one base: a mixed batch beside the base's forward and PEFT's `adapter_names`, loading, and memory.

A random Llama of 4 layers of width 1024, 28 Linears, 51 M numbers in them; r = 16 on every Linear, 32 rows. A row's
ratio is ours to PEFT's; what both cost beside the plain base stands in the note. A route is opened for every forward,
so that ours gathers its factors every time; a generation does it once ("route kept open").
"""

from __future__ import annotations

import copy
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import headstart as hs
from benchmarks.measure import Call, Cost, Row, Scale, Target, cpu_seconds, in_child, interleaved, row
from benchmarks.subjects import config, trained

ROWS = 32
LIMITS = {(32, 32): 1.2, (1, 32): 3.0}  # by tokens and adapters, in bf16: times the base
# By tokens: how many adapters the rows are shared among, and how often the arms take turns.
WORK = {32: ((2, 32), 3), 1: ((1, 2, 8, 32), 7)}
RANKS = (2, 4, 8, 16)


def rows(scale: Scale) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        for dtype in (torch.bfloat16, torch.float32):
            yield from _forwards(scale, dtype, Path(folder) / "one")
        yield from _loading(scale, Path(folder))


def _llama(scale: Scale, dtype: torch.dtype) -> Any:
    width, layers = {"full": (1024, 4), "quick": (512, 2), "toy": (64, 1)}[scale]
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=width, intermediate_size=width * 11 // 4, num_hidden_layers=layers, vocab_size=8 * width,
            num_attention_heads=width // 32, num_key_value_heads=width // 32, use_cache=False,
        )
    )  # fmt: skip
    return model.to(dtype).eval()


def _write(model: nn.Module, folder: Path, r: int = 16, dtype: torch.dtype = torch.float32) -> float:
    """An adapter's folder; the MB of its factors."""
    adapted = copy.deepcopy(model)
    hs.adapt(adapted, config(r=r))
    trained(adapted)
    hs.save(adapted, folder)
    path = folder / "adapter_model.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name).to(dtype) for name in file.keys()}  # noqa: SIM118
    save_file(tensors, path, metadata)
    return path.stat().st_size / 1e6


@torch.no_grad()
def _forwards(scale: Scale, dtype: torch.dtype, folder: Path) -> Iterator[Row]:
    base = _llama(scale, dtype)
    _write(base, folder)
    names = [f"a{i}" for i in range(ROWS)]
    served = copy.deepcopy(base)
    bank = hs.AdapterBank(served)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder, adapter_name=names[0])
    for name in names:
        bank.load(name, folder)
        if name != names[0]:
            theirs.load_adapter(folder, adapter_name=name)
    theirs.eval()
    for tokens, (counts, repeats) in WORK.items():
        ids = torch.randint(0, base.config.vocab_size, (ROWS, tokens), generator=torch.Generator().manual_seed(1))
        for count in counts:
            routed = [names[i % count] for i in range(ROWS)]
            yield _forward(base, bank, theirs, ids, routed, repeats if scale != "toy" else 1, dtype)


def _forward(
    base: nn.Module, bank: hs.AdapterBank, theirs: nn.Module, ids: Tensor, routed: Sequence[str], repeats: int,
    dtype: torch.dtype,
) -> Row:  # fmt: skip
    def plain() -> Call:
        return lambda: base(ids)

    def ours() -> Call:
        def call() -> None:
            with bank.route(routed):
                bank.model(ids)

        return call

    def peers() -> Call:
        return lambda: theirs(ids, adapter_names=list(routed))

    def kept() -> Call:
        return lambda: bank.model(ids)

    with bank.route(routed):  # The others do not notice: theirs is another model, or another route.
        cpu = interleaved({"base": plain, "ours": ours, "kept": kept, "peer": peers}, repeats)
    tokens, count = ids.shape[1], len(set(routed))
    limit = LIMITS.get((tokens, count)) if dtype == torch.bfloat16 else None
    times = {who: cpu[who] / cpu["base"] for who in ("ours", "peer", "kept")}
    target = Target(also={f"≤ {limit:g}× the base": times["ours"] <= limit}) if limit else None
    note = "× the base: ours {ours:.2f}, with the route kept open {kept:.2f}; PEFT {peer:.2f}".format(**times)
    work = f"{ROWS} rows of {tokens} tokens, {count} adapters, {str(dtype)[6:]}"
    return row(work, Cost(cpu["ours"]), Cost(cpu["peer"]), target, note)


def _loading(scale: Scale, folder: Path) -> Iterator[Row]:
    count = {"full": 1000, "quick": 200, "toy": 12}[scale]
    base = _llama(scale, torch.bfloat16)
    sizes = [_write(base, folder / f"r{r}", r, torch.bfloat16) for r in RANKS]
    paths = [folder / f"r{RANKS[i % len(RANKS)]}" for i in range(count)]

    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), paths[0], adapter_name="a0")
    taken = []
    for i in range(1, min(32, count)):
        taken.append(cpu_seconds(lambda i=i: theirs.load_adapter(paths[i], adapter_name=f"a{i}")))
    del theirs

    bank = hs.AdapterBank(base)
    bank.load("warm", paths[-1])
    bank.remove("warm")
    spent = [cpu_seconds(lambda i=i: bank.load(f"a{i}", paths[i])) for i in range(count)]
    bank.close()
    some = min(20, count // 2)
    first, last = (statistics.median(part) for part in (spent[:some], spent[-some:]))
    yield row(
        "load the 32nd adapter", Cost(statistics.median(spent[24:36] or spent)), Cost(statistics.median(taken[-4:]))
    )
    work, note = f"load the {count}th adapter beside the first", "the other is ours too: the first"
    yield row(work, Cost(last), Cost(first), Target(1.1), note)

    def held(number: int) -> Any:
        def arm() -> Call:
            bank = hs.AdapterBank(base)

            def call() -> hs.AdapterBank:
                for i in range(number):
                    bank.load(f"a{i}", paths[i])
                return bank

            return call

        return arm

    cost = in_child(held(count), warm=held(len(RANKS)))
    files = sum(sizes[i % len(RANKS)] for i in range(count))
    note = f"ranks {', '.join(map(str, RANKS))}; the other is the size of the files"
    yield row(f"hold {count} adapters", Cost(peak=cost.peak), Cost(peak=files), Target(memory=1.2), note)

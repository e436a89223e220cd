"""PiSSA and OLoRA on a whole model, and loading what they made: SmolLM2-135M, 210 Linears, r = 16.

Memory is what torch holds of what it allocates, to the byte.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import peft
import torch
from torch import nn

import headstart as hs
from benchmarks.measure import Arm, Call, Cost, Row, Scale, Target, in_child, interleaved, measure, once, row
from benchmarks.subjects import attach_ours, attach_peft, config, models, peft_config

Maker = Callable[[], nn.Module]


def rows(scale: Scale) -> Iterator[Row]:
    *_, (name, make) = models(scale)
    repeats = {"full": 3, "quick": 1, "toy": 1}[scale]
    for dtype in (torch.float32, torch.bfloat16):
        yield from _starts(f"{name}, {str(dtype)[6:]}", lambda dtype=dtype: make(dtype), scale, repeats)
    with tempfile.TemporaryDirectory() as folder:
        yield from _loading(name, lambda: make(torch.float32), Path(folder), scale)


def _starts(work: str, make: Maker, scale: Scale, repeats: int) -> Iterator[Row]:
    arms = {
        "ours": attach_ours(make, init="pissa"),
        "fast": attach_ours(make, init="pissa_niter_16"),
        "peft": attach_peft(make, init="pissa_niter_16"),
    }
    costs = measure(arms, repeats, exact=True)
    ours = costs["ours"]
    spare = {} if ours.peak is None or ours.kept is None else _within_a_layer(make(), ours.peak - ours.kept)
    if scale != "quick":
        full = once(attach_peft(make, init="pissa"))
        note = "" if ours.kept is None else f"of ours, {ours.kept:.1f} MB are the adapter and its anchors"
        yield row(f"PiSSA beside pissa, {work}", ours, full, Target(time=1 / 20, also=spare), note)
    yield row(f"PiSSA beside pissa_niter_16, {work}", ours, costs["peft"], Target(time=1.1))
    yield row(f"PiSSA as pissa_niter_16, {work}", costs["fast"], costs["peft"], Target(time=0.4))
    arms = {"ours": attach_ours(make, init="olora"), "peft": attach_peft(make, init="olora")}
    costs = measure(arms, repeats, exact=True)
    yield row(f"OLoRA, {work}", costs["ours"], costs["peft"], Target(time=1))


def _within_a_layer(model: nn.Module, spare: float) -> dict[str, bool]:
    """Whether what was needed on the way, beyond what stays, is at most the weights of one decoder layer."""
    layers = next(module for module in model.modules() if isinstance(module, nn.ModuleList))
    size = sum(p.numel() * p.element_size() for p in layers[0].parameters()) / 1e6
    return {f"beyond the adapter, {spare:.1f} MB ≤ one layer ({size:.1f} MB)": spare <= size}


def _loading(work: str, make: Maker, folder: Path, scale: Scale) -> Iterator[Row]:
    for name, init in (("plain", True), ("pissa", "pissa")):
        model = make()
        hs.adapt(model, config(init=init))
        hs.save(model, folder / name)

    def ours(name: str) -> Arm:
        def arm() -> Call:
            model = make()
            return lambda: hs.load(model, folder / name)

        return arm

    seconds = interleaved({name: ours(name) for name in ("plain", "pissa")}, {"full": 9, "quick": 3, "toy": 1}[scale])
    note = "both headstart's; the PiSSA file holds twice the numbers, its anchors"
    plain, pissa = Cost(seconds["plain"]), Cost(seconds["pissa"])
    yield row(f"load a PiSSA adapter, beside a plain one, {work}", pissa, plain, Target(time=1.5), note)
    if scale == "quick":
        return
    peer = peft.get_peft_model(make(), peft_config(init="pissa_niter_4"))
    peer.save_pretrained(str(folder / "peft"))

    def theirs() -> Call:
        model = make()
        return lambda: peft.PeftModel.from_pretrained(model, str(folder / "peft"))

    note = "PEFT's, saved after pissa_niter_4 (the cheapest there is), decomposes the base anew"
    yield row(f"load a PiSSA adapter, {work}", pissa, in_child(theirs), Target(time=0.1), note)

"""What surrounds training: attach, save, load, merge, unmerge, import; and how exact the merges are."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn

import headstart as hs
from benchmarks.measure import Arm, Call, Cost, Row, Scale, Target, fresh_processes, interleaved, measure, row
from benchmarks.subjects import attach_ours, attach_peft, config, models, peft_config, trained

DTYPES = (torch.float32, torch.bfloat16)
Maker = Callable[[], nn.Module]


def rows(scale: Scale) -> Iterator[Row]:
    repeats = {"full": 9, "quick": 3, "toy": 1}[scale]
    for name, make in models(scale):
        for dtype in DTYPES:
            work = f"{name}, {str(dtype)[6:]}"
            with tempfile.TemporaryDirectory() as folder:
                yield from _life(work, lambda make=make, dtype=dtype: make(dtype), Path(folder), repeats)
        yield from _exactness(f"{name}, bfloat16", lambda make=make: make(torch.bfloat16))
    yield from _imports(repeats)


def _life(work: str, make: Maker, folder: Path, repeats: int) -> Iterator[Row]:
    costs = measure({"ours": attach_ours(make), "peft": attach_peft(make)}, repeats)
    yield row(f"attach, {work}", costs["ours"], costs["peft"], Target(time=1))

    ours, theirs = _ours(make), _peft(make)
    arms = {
        "ours": lambda: lambda: hs.save(ours, folder / "ours"),
        "peft": lambda: lambda: theirs.save_pretrained(str(folder / "peft")),
    }
    seconds = interleaved(arms, repeats)
    note = "ours also writes the init report, and waits until the disk has it all"
    yield row(f"save, {work}", Cost(seconds["ours"]), Cost(seconds["peft"]), Target(time=1), note)

    arms = {"ours": _loading_ours(make, folder / "ours"), "peft": _loading_peft(make, folder / "ours")}
    costs = measure(arms, repeats)
    yield row(f"load, {work}", costs["ours"], costs["peft"], Target(time=1), "one file, written by headstart")
    del ours, theirs

    merging = {
        "ours": _call(lambda: _ours(make), hs.merge),
        "in place": _call(lambda: _ours(make), lambda model: hs.merge(model, in_place=True)),
        "peft": _call(lambda: _peft(make), lambda model: model.merge_and_unload()),
        "safe": _call(lambda: _peft(make), lambda model: model.merge_and_unload(safe_merge=True)),
    }
    costs = measure(merging, repeats)
    within, target = "PEFT's writes into the weights", Target(time=0.5)
    yield row(f"merge in place, {work}", costs["in place"], costs["peft"], target, "both write into the weights")
    yield row(f"merge, {work}", costs["ours"], costs["peft"], target, within)
    note = "neither touches a weight before the result is known to be good"
    yield row(f"merge, beside safe_merge=True, {work}", costs["ours"], costs["safe"], Target(time=0.5), note)

    unmerging = {
        "ours": _call(lambda: _merged(make), hs.unmerge),
        "peft": _call(lambda: _peft_merged(make), lambda model: model.unmerge_adapter()),
    }
    seconds = interleaved(unmerging, repeats)
    yield row(f"unmerge, {work}", Cost(seconds["ours"]), Cost(seconds["peft"]), Target(time=1))


def _ours(make: Maker) -> nn.Module:
    model = make()
    hs.adapt(model, config())
    trained(model)
    return model


def _peft(make: Maker) -> Any:
    model = peft.get_peft_model(make(), peft_config())
    trained(model)
    return model


def _merged(make: Maker) -> nn.Module:
    model = _ours(make)
    hs.merge(model, reversible=True)
    return model


def _peft_merged(make: Maker) -> Any:
    model = _peft(make)
    model.merge_adapter()
    return model


def _call(prepare: Callable[[], Any], function: Callable[[Any], object]) -> Arm:
    def arm() -> Call:
        model = prepare()
        return lambda: function(model)

    return arm


def _loading_ours(make: Maker, folder: Path) -> Arm:
    return _call(make, lambda model: hs.load(model, folder))


def _loading_peft(make: Maker, folder: Path) -> Arm:
    return _call(make, lambda model: peft.PeftModel.from_pretrained(model, str(folder)))


def _exactness(work: str, make: Maker) -> Iterator[Row]:
    base = make()
    weights = {name: module.weight for name, module in base.named_modules() if isinstance(module, nn.Linear)}

    model = _ours(make)
    factors = {n: [f.detach() for f in layer.factors] for n, layer in hs_layers(model).items()}
    hs.merge(model, reversible=True)
    merged = {name: layer.weight_parameter for name, layer in hs_layers(model).items()}
    ours = _rounded_right(weights, factors, merged)
    hs.unmerge(model)
    back = {name: layer.weight_parameter for name, layer in hs_layers(model).items()}
    ours_changed = _changed(weights, back)

    shares = {}
    for safe in (False, True):
        theirs = _peft(make)
        found = _peft_layers(theirs)
        factors = {
            n: [layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()]
            for n, layer in found.items()
        }
        theirs.merge_adapter(safe_merge=safe)
        shares[safe] = _rounded_right(weights, factors, {n: layer.base_layer.weight for n, layer in found.items()})
        theirs.unmerge_adapter()
        changed = _changed(weights, {n: layer.base_layer.weight for n, layer in found.items()})

    note = f"ours {ours:.4%}, PEFT {shares[False]:.4%}, with safe_merge {shares[True]:.4%}"
    target = Target(also={"every merged element correctly rounded": ours == 1})
    yield row(f"merged elements correctly rounded, {work}", Cost(), Cost(), target, note)
    note = f"ours {ours_changed:.4%}, PEFT {changed:.4%}"
    target = Target(also={"unmerge bit-exact": ours_changed == 0})
    yield row(f"elements that merge and unmerge changed, {work}", Cost(), Cost(), target, note)


def hs_layers(model: nn.Module) -> dict[str, Any]:
    """headstart's layers by name."""
    from headstart.lora.layers import lora_layers

    return dict(lora_layers(model))


def _peft_layers(model: Any) -> dict[str, Any]:
    prefix = "base_model.model."
    layers = ((n, m) for n, m in model.named_modules() if isinstance(m, peft.tuners.lora.Linear))
    return {name.removeprefix(prefix): layer for name, layer in layers}


def _rounded_right(weights: dict[str, Tensor], factors: dict[str, list[Tensor]], merged: dict[str, Tensor]) -> float:
    """The share of elements that are the sum W + B·A in float64 rounded once, to nearest even."""
    right = total = 0
    for name, (A, B) in factors.items():
        for W, low, new in zip(weights[name].split(256), B.split(256), merged[name].split(256), strict=True):
            exact = torch.addmm(W.double(), low.double(), A.double())
            right += int(_is_nearest(new.detach(), exact).sum())
            total += exact.numel()
    return right / total


def _is_nearest(rounded: Tensor, exact: Tensor) -> Tensor:
    """Whether neither neighbour in the half type is nearer; at a tie the even one must have been taken."""
    distance = (rounded.double() - exact).abs()
    bits = rounded.view(torch.int16)
    right = torch.ones_like(exact, dtype=torch.bool)
    for step in (-1, 1):
        other = ((bits + step).view(rounded.dtype).double() - exact).abs()
        right &= ~((other < distance) | ((other == distance) & (bits & 1 == 1)))
    return right


def _changed(weights: dict[str, Tensor], after: dict[str, Tensor]) -> float:
    names = after.keys() & weights.keys()
    different = sum(int((weights[n].view(torch.int16) != after[n].view(torch.int16)).sum()) for n in names)
    return different / sum(weights[n].numel() for n in names)


def _imports(repeats: int) -> Iterator[Row]:
    code = {
        "torch": "import torch",
        "ours": "import headstart; headstart.adapt",  # What is imported when used is used.
        "help": "import sys; sys.argv = ['headstart', '--help']; from headstart.cli import main; main()",
    }

    def processes(code: dict[str, str], repeats: int) -> dict[str, Cost]:
        seconds = fresh_processes({name: [sys.executable, "-c", line] for name, line in code.items()}, repeats)
        return {name: Cost(taken) for name, taken in seconds.items()}

    costs = processes(code, 2 * repeats)
    theirs = processes({"peft": "import peft"}, max(1, repeats // 3))["peft"]
    note = "a whole process, the interpreter's start included"
    yield row("import headstart, beside import torch", costs["ours"], costs["torch"], Target(time=1.1), note)
    yield row("import headstart, beside import peft", costs["ours"], theirs, Target(time=1), note)
    target = Target(also={"under 0.3 s": (costs["help"].cpu or 0) < 0.3})
    yield row("headstart --help, beside import torch", costs["help"], costs["torch"], target, note)

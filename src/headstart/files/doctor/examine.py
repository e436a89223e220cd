"""The doctor: an adapter folder of any origin → by engine, whether it loads, refuses, or means something else.

    survey.py      what the folder holds          engines.py     who reads it how, as a table
    deviation.py   how far a reading is off       reading.py     one engine's reading
    diagnosis.py   what comes of it               restore.py     what can be mended

Nothing is executed and the folder is not changed. What is wrong with it is told, never raised: only where there is no
adapter at all does the doctor refuse.
"""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import nn

from headstart.errors import BadOption, HeadstartError, nearest
from headstart.files.adapter import few
from headstart.files.doctor.deviation import REPEATS, Placed, bare, check_values, placed, repetition
from headstart.files.doctor.diagnosis import Diagnosis, Finding
from headstart.files.doctor.engines import CHANGED, ENGINES, INITIAL, KEYS, RESTORE, Effect, Verdict
from headstart.files.doctor.reading import Starts, reading
from headstart.files.doctor.stranger import Fault
from headstart.files.doctor.survey import Survey, survey
from headstart.files.doctor.traits import of_pictures, starts

# ------------------------------------------------------------------ the examination


def doctor(
    path: str | Path, base: nn.Module | None = None, *, engines: Iterable[str] | None = None, base_name: str = "BASE"
) -> Diagnosis:
    """Tell which engines load an adapter, which refuse it, and which load it and compute something else.

    Args:
        path: a folder in PEFT's or mlx's format, a .safetensors file of kohya's or diffusers', or a hub name.
        base: the model that the adapter is for. With it, deviations are measured that do not follow from the file.
        engines: the engines that must be well, of "peft", "vllm", "sglang", "lorax", "llama.cpp", "mlx", "diffusers"
            and "kohya"; by default those that read the folder's format.
        base_name: what the commands that repair it call the base.

    Returns:
        The diagnosis; `healthy` sums it up. Malformed files are told there.

    Raises:
        AdapterFormatError: if there is no adapter: nothing, only a pickle, a GGUF, no LoRA.
        BadOption: if an engine is not known.

    Example:
        >>> doctor("adapter/")["vllm"].verdict  # doctest: +SKIP
        <Verdict.LOADS: 'loads'>
    """
    asked = _asked(engines)
    seen = survey(path)
    faults = list(seen.faults)
    there = {} if seen.fatal else _layers(seen, base, faults)
    repeats = {n: repetition(max(p.blocks, key=lambda b: b.W.numel())) for n, p in there.items() if _has_base(p)}
    hidden = _hidden_start(seen, repeats, faults)
    lost = Starts(seen, there, repeats)
    words = {"adapter": shlex.quote(str(path)), "base": shlex.quote(base_name), "unchange": _unchange(seen)}
    pictures = seen.dialect.name in ("kohya", "diffusers") or bool(of_pictures(seen))
    shown = [e for e in ENGINES if pictures or not e.pictures or e.key in (asked or ())]
    readings = tuple(reading(engine, seen, there, lost, hidden, words) for engine in shown)
    if asked is None:
        asked = tuple(e.key for e in ENGINES if seen.dialect.name in e.reads)
    return Diagnosis(seen, tuple(faults), readings, asked, base is not None, repeats)


def _asked(engines: Iterable[str] | None) -> tuple[str, ...] | None:
    if engines is None:
        return None
    asked = tuple(engines)
    for key in asked:
        if key not in KEYS:
            raise BadOption(f"no engine {key!r}{nearest(key, KEYS)}: choose of {', '.join(KEYS)}")
    return asked


def _layers(seen: Survey, base: nn.Module | None, faults: list[Fault]) -> dict[str, Placed]:
    """Every layer read once: finite or not, and beside its weight where there is a base."""
    there, apart, infinite = {}, [], []
    for path, layer in seen.layers.items():
        if not all(bool(seen.read(name).isfinite().all()) for name in layer.keys.values()):
            infinite.append(path)
            continue
        try:
            if base is not None and seen.dialect.name == "PEFT":
                there[path] = placed(seen, layer, base)
                continue
        except HeadstartError as error:
            apart.append(str(error))
        try:
            there[path] = bare(seen, layer)
        except (RuntimeError, ValueError) as error:
            faults.append(Fault(f"{path!r} cannot be read as matrices: {error}", "save the adapter again"))
    infinite += [name for name in seen.extras if _is_float(seen, name) and not bool(seen.read(name).isfinite().all())]
    if infinite:
        faults.append(Fault(f"NaN or infinity in {few(infinite)}", "go back to an earlier checkpoint"))
    if apart:
        more = f" (and {len(apart) - 1} more)" if len(apart) > 1 else ""
        faults.append(Fault(f"not of this base: {apart[0]}{more}", "pass the base that it was trained on"))
    elif base is not None:
        try:
            check_values(seen, there)
        except HeadstartError as error:
            faults.append(Fault(str(error), "pass the base that it was trained on"))
    return there


def _is_float(seen: Survey, name: str) -> bool:
    return seen.tensors[name][1] in ("F64", "F32", "F16", "BF16")


def _has_base(there: Placed) -> bool:
    return all(block.W.numel() for block in there.blocks)


def _hidden_start(seen: Survey, repeats: Mapping[str, float], faults: list[Fault]) -> Finding | None:
    """A start that is still in the factors, and that the config does not tell of; or the reverse."""
    if not repeats:
        return None
    middle = statistics.median(repeats.values())
    told = bool(starts(CHANGED)(seen)) and not seen.provenance
    if middle > REPEATS and not told:
        layers = tuple(n for n, value in repeats.items() if value > REPEATS)
        because = (
            f"the factors of {len(layers)} of {len(repeats)} layers repeat the base's own weights (cosine {middle:.2f} "
            f"in the middle): a start of PiSSA's kind was never converted, and init_lora_weights={seen.init} hides it"
        )
        faults.append(Fault(because, "restore the true init_lora_weights in the config, and call the doctor again"))
        return Finding(Verdict.DIFFERS, because, effect=Effect.PLAIN_START, layers=layers)
    if middle < REPEATS and told and seen.init not in ("lora_ga", "loftq"):
        faults.append(
            Fault(
                f"the config says init_lora_weights={seen.init!r}, and the factors do not hold such a start of this "
                f"base (cosine {middle:.2f}, near 1 expected): converted already, or made for another base",
                "set init_lora_weights to true if the adapter was converted",
            )
        )
    return None


def _unchange(seen: Survey) -> str:
    return RESTORE if seen.init in ("pissa", "olora") else INITIAL

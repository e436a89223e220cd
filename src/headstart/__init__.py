"""LoRA whose heart is initialization.

>>> import headstart as hs
>>> config = hs.LoraConfig(r=16, lora_alpha=16, init_lora_weights="pissa")
>>> config.strategy.name
'pissa'

The names below are imported when they are used, so that `headstart --help` does not wait for torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headstart.choose.advise import advise
    from headstart.choose.auto import Auto, auto
    from headstart.choose.compare import compare
    from headstart.choose.estimate import Estimate, estimate
    from headstart.choose.recommendation import Advice
    from headstart.choose.trials.comparison import Comparison
    from headstart.errors import HeadstartError
    from headstart.files.bank import AdapterBank
    from headstart.files.doctor.anatomy import inspect
    from headstart.files.doctor.examine import doctor
    from headstart.files.load import load
    from headstart.files.merging.combine import combine
    from headstart.files.merging.stream import merge_checkpoint
    from headstart.files.portable import Export, export
    from headstart.files.save import save
    from headstart.inits.strategy import Factors, Strategy, register
    from headstart.inits.strategy import names as strategies
    from headstart.lora.adapt import adapt, remove
    from headstart.lora.adapter import Adapter
    from headstart.lora.calibrate import calibrate
    from headstart.lora.calibration import Calibration
    from headstart.lora.config import LoraConfig
    from headstart.lora.line_search import search_step
    from headstart.lora.merge import MergeReport, merge, unmerge
    from headstart.lora.optim import PreconditionedAdamW, lora_plus_groups, preconditioned_groups
    from headstart.lora.rate_search import search_rate
    from headstart.lora.rates import Rate
    from headstart.lora.redistribute import redistribute
    from headstart.lora.report import InitReport

__version__ = "0.1.0"

_HOMES = {
    "choose.advise": ("advise",),
    "choose.auto": ("Auto", "auto"),
    "choose.compare": ("compare",),
    "choose.trials.comparison": ("Comparison",),
    "choose.estimate": ("Estimate", "estimate"),
    "choose.recommendation": ("Advice",),
    "errors": ("HeadstartError",),
    "files.doctor.anatomy": ("inspect",),
    "files.bank": ("AdapterBank",),
    "files.load": ("load",),
    "files.save": ("save",),
    "files.merging.combine": ("combine",),
    "files.doctor.examine": ("doctor",),
    "files.portable": ("Export", "export"),
    "files.merging.stream": ("merge_checkpoint",),
    "inits": ("Factors", "Strategy", "register"),
    "lora.adapt": ("adapt", "remove"),
    "lora.adapter": ("Adapter",),
    "lora.merge": ("MergeReport", "merge", "unmerge"),
    "lora.calibrate": ("calibrate",),
    "lora.calibration": ("Calibration",),
    "lora.config": ("LoraConfig",),
    "lora.optim": ("PreconditionedAdamW", "lora_plus_groups", "preconditioned_groups"),
    "lora.line_search": ("search_step",),
    "lora.rate_search": ("search_rate",),
    "lora.rates": ("Rate",),
    "lora.redistribute": ("redistribute",),
    "lora.report": ("InitReport",),
}

__all__ = [
    "Adapter",
    "AdapterBank",
    "Advice",
    "Auto",
    "Calibration",
    "Comparison",
    "Estimate",
    "Export",
    "Factors",
    "HeadstartError",
    "InitReport",
    "LoraConfig",
    "MergeReport",
    "PreconditionedAdamW",
    "Rate",
    "Strategy",
    "adapt",
    "advise",
    "auto",
    "calibrate",
    "combine",
    "compare",
    "doctor",
    "estimate",
    "export",
    "inspect",
    "load",
    "lora_plus_groups",
    "merge",
    "merge_checkpoint",
    "preconditioned_groups",
    "redistribute",
    "register",
    "remove",
    "save",
    "search_rate",
    "search_step",
    "strategies",
    "unmerge",
]


def __getattr__(name: str) -> Any:
    if name == "strategies":
        return importlib.import_module("headstart.inits").names
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"headstart.{home}"), name)
    raise AttributeError(f"module 'headstart' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

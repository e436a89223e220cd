"""LoRA whose heart is initialization.

>>> import headstart as hs
>>> config = hs.LoraConfig(r=16, lora_alpha=16, init_lora_weights="pissa")
>>> config.strategy.name
'pissa'
"""

from headstart.errors import HeadstartError
from headstart.files.checkpoint import load, save
from headstart.inits.strategy import Factors, Strategy, register
from headstart.inits.strategy import names as strategies
from headstart.lora.adapt import Adapter, MergeReport, adapt, merge, remove, unmerge
from headstart.lora.config import LoraConfig
from headstart.lora.report import InitReport

__version__ = "0.1.0"

__all__ = [
    "Adapter",
    "Factors",
    "HeadstartError",
    "InitReport",
    "LoraConfig",
    "MergeReport",
    "Strategy",
    "adapt",
    "load",
    "merge",
    "register",
    "remove",
    "save",
    "strategies",
    "unmerge",
]

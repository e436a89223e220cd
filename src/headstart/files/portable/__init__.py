"""Files that travel: one adapter, the same function in every program that reads it.

change.py        one layer's change: folded, trimmed, padded, truncated, and measured
parcel.py        any adapter folder as such changes, and what a profile may refuse
start.py         adapters that need a changed base, put on the original one
everywhere.py    portable: PEFT's format as every engine reads it
compact.py       compact: PEFT's format in as few numbers as possible
llama_cpp.py     gguf
mlx.py           mlx
kohya.py         kohya
profiles.py      which of them, and what it cost
"""

from headstart.files.portable.profiles import PROFILES, Export, export

__all__ = ["PROFILES", "Export", "export"]

"""Every published start: the mathematics alone, tensors in, tensors out. One paper, one file.

`strategy.py` says what a strategy is. To add one, copy the file of a relative and name it in the list below.
"""

from headstart.inits import (  # noqa: I001 (in the order of the tables: from plain noise to spectra)
    kaiming,
    gaussian,
    normal,
    random,
    init_ab,
    orthogonal,
    loram,
    olora,
    pissa,
    milora,
    mica,
)
from headstart.inits.strategy import Factors, Strategy, get, names, register

__all__ = [
    "Factors",
    "Strategy",
    "gaussian",
    "get",
    "init_ab",
    "kaiming",
    "loram",
    "mica",
    "milora",
    "names",
    "normal",
    "olora",
    "orthogonal",
    "pissa",
    "random",
    "register",
]

"""Fine-tune a language model from one config: data in, `adapter/` out. What `headstart tune` does, for Python.

recipe      what a run is made of                     train    the run itself
data        files and hub names → rows                watch    progress, metrics, Ctrl-C
docstrings  data that every machine has               folder   where it writes, and whole or not at all
models      names, folders, GGUF → a model            memory   what it will take
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from headstart.tune.recipe import RunConfig

if TYPE_CHECKING:
    from headstart.tune.train import Finished

__all__ = ["RunConfig", "tune"]


def tune(config: RunConfig) -> Finished:
    """Fine-tune, and write `config.output`.

    Raises:
        HeadstartError: before anything is written, where the config, the model or the data cannot be used.
        KeyboardInterrupt: after a checkpoint, where Ctrl-C or SIGTERM asked for it.

    Example:
        >>> tune(RunConfig(model="smollm2", data="stdlib", init="pissa", steps=60))          # doctest: +SKIP
    """
    from headstart.tune.train import run

    return run(config)

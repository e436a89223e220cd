"""A bank whose adapters come from folders in PEFT's format: `headstart.AdapterBank`."""

from __future__ import annotations

import functools
from pathlib import Path

import torch

from headstart.errors import UnsupportedLayer
from headstart.files.adapter import few, read_adapter
from headstart.files.load import plan_load
from headstart.lora.bank import Bank


class AdapterBank(Bank):
    """Many adapters on one base model, each row of a batch routed to its own. For inference.

    Adapters may be added, removed and replaced from any thread while the model runs: a route keeps the adapters that
    it was opened with, and what is removed is freed when the last route that uses it ends.

    Args:
        model: the base, not adapted. Its modules, weights and flags stay what they are.

    Raises:
        AdapterState: if the model is adapted already, or sharded.

    Example:
        >>> bank = AdapterBank(torch.nn.Sequential(torch.nn.Linear(4, 4)))
        >>> bank
        AdapterBank(Sequential, 0 adapters, 0.0 MB)
    """

    def load(self, name: str, path: str | Path, *, strict: bool = True, replace: bool = False) -> None:
        """Load an adapter: headstart's own, or anybody's in PEFT's format.

        Args:
            name: what routes call it.
            path: the folder, or a name on the hub.
            strict: refuse an adapter of another base, and tensors that are left over.
            replace: whether a name that is taken is an adapter to replace.

        Raises:
            AdapterFormatError, KeyMismatch, WrongBase, NoTarget: if the file is not one, or not for this model.
            UnsupportedLayer: naming a layer that a bank cannot serve, or what it trains beside the factors.
        """
        self._check_free(name, replace)
        file = read_adapter(path)
        plan = plan_load(self.model, file, strict)
        if plan.config.modules_to_save or plan.config.bias != "none" or plan.extras:
            beside = plan.extras or plan.config.modules_to_save or ["biases"]
            raise UnsupportedLayer(
                f"{file.folder} replaces {few(sorted(beside))} of the base, which a bank shares among its adapters: "
                "serve this adapter alone, with headstart.load"
            )
        held_in = functools.reduce(torch.promote_types, (entry.A.dtype for entry in file.entries.values()))
        self.add(name, plan.starts, dtype=held_in, replace=replace)

"""A module that trains in full beside the adapter (`modules_to_save`)."""

from __future__ import annotations

from typing import Any

from torch import nn


class TrainedModule(nn.Module):
    """A module that trains in full beside the adapter (`modules_to_save`): a copy, with the original kept."""

    def __init__(self, original: nn.Module, trained: nn.Module) -> None:
        super().__init__()
        self.original_module = original
        self.trained = trained.requires_grad_(True)
        self.enabled = True

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return (self.trained if self.enabled else self.original_module)(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("trained", "original_module"):
                raise
            # Whoever reads its weights instead of calling it reads those that are in use.
            inner = "trained" if self.__dict__.get("enabled", True) else "original_module"
            return getattr(super().__getattr__(inner), name)

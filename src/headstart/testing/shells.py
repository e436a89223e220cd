"""The ways to put adapters into a model that the laws are checked for."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import nn

from headstart.files.load import load
from headstart.files.save import save
from headstart.lora import adapt as lora
from headstart.lora.adapter import adapter_of
from headstart.lora.config import LoraConfig
from headstart.lora.merge import merge, unmerge


class Shell(Protocol):
    """A way to put adapters into a model."""

    name: str

    def adapt(self, model: nn.Module, config: LoraConfig, **known: Any) -> nn.Module: ...
    def disabled(self, model: nn.Module) -> AbstractContextManager[object]: ...
    def save(self, model: nn.Module, folder: str) -> None: ...
    def load(self, base: nn.Module, folder: str) -> nn.Module: ...
    def merge(self, model: nn.Module) -> None: ...
    def unmerge(self, model: nn.Module) -> None: ...
    def fold(self, model: nn.Module) -> nn.Module: ...
    def remove(self, model: nn.Module) -> nn.Module: ...


class Native:
    """`headstart.adapt` and its kin."""

    name = "native"

    def adapt(self, model: nn.Module, config: LoraConfig, **known: Any) -> nn.Module:
        return lora.adapt(model, config, **known).model

    def disabled(self, model: nn.Module) -> AbstractContextManager[object]:
        return adapter_of(model).disabled()

    def save(self, model: nn.Module, folder: str) -> None:
        save(model, folder)

    def load(self, base: nn.Module, folder: str) -> nn.Module:
        return load(base, folder).model

    def merge(self, model: nn.Module) -> None:
        merge(model, reversible=True)

    def unmerge(self, model: nn.Module) -> None:
        unmerge(model)

    def fold(self, model: nn.Module) -> nn.Module:
        merge(model)
        return model

    def remove(self, model: nn.Module) -> nn.Module:
        return lora.remove(model)


class Peft:
    """`headstart.peft`: a real PeftModel."""

    name = "peft"

    def adapt(self, model: nn.Module, config: LoraConfig, **known: Any) -> nn.Module:
        from headstart.peft import get_peft_model

        return get_peft_model(model, config, **known)

    def disabled(self, model: Any) -> AbstractContextManager[object]:
        return model.disable_adapter()  # type: ignore[no-any-return]

    def save(self, model: Any, folder: str) -> None:
        model.save_pretrained(folder)

    def load(self, base: nn.Module, folder: str) -> nn.Module:
        from headstart.peft import from_pretrained

        return from_pretrained(base, folder)

    def merge(self, model: Any) -> None:
        model.merge_adapter()

    def unmerge(self, model: Any) -> None:
        model.unmerge_adapter()

    def fold(self, model: Any) -> nn.Module:
        return model.merge_and_unload()  # type: ignore[no-any-return]

    def remove(self, model: Any) -> nn.Module:
        return model.unload()  # type: ignore[no-any-return]


NATIVE, PEFT = Native(), Peft()

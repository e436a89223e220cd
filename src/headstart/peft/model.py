"""PeftModels whose adapters are saved as plain LoRA on the original weights, and resume to the bit.

`PeftModel.save_pretrained` is what Trainer, TRL and the hub call; `load_adapter` is what Trainer calls to resume and
to load the best checkpoint; `add_adapter` is what TRL calls for a copy of an adapter, as its reference.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, cast

import peft
from peft.utils import ModulesToSaveWrapper

from headstart.errors import BadOption
from headstart.lora.adapt import trained_biases
from headstart.lora.config import LoraConfig
from headstart.lora.report import InitReport
from headstart.lora.starts import prepare
from headstart.lora.targets import with_heads
from headstart.peft import checkpoint
from headstart.peft.config import check_loaded, own_config, peft_config
from headstart.peft.inject import adopt, enter, injection, unwrapped
from headstart.peft.shell import shell_layers
from headstart.peft.tuner import Originals, ShellTuner

# Arguments of PEFT's load_adapter that say nothing about which values are meant.
_ELSEWHERE = ("torch_device", "autocast_adapter_dtype", "ephemeral_gpu_offload", "low_cpu_mem_usage")


class ShellModel(peft.PeftModel):
    """What the exchanged models share: an init report by adapter, and our way in and out of files."""

    base_model: ShellTuner
    init_reports: dict[str, InitReport]

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        save_embedding_layers: Any = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | None = None,
        rank: int | None = None,
        **kwargs: Any,
    ) -> None:
        """Save adapters in PEFT's format, exact on the original base; with `rank`, truncated to it.

        The other arguments are PEFT's. What headstart started is always saved as safetensors, and needs no conversion.
        """
        selected = list(self.peft_config) if selected_adapters is None else selected_adapters
        foreign = [name for name in selected if name not in self.init_reports]
        # PEFT refuses unknown names and writes the model card.
        super().save_pretrained(
            str(save_directory), safe_serialization, foreign, save_embedding_layers, is_main_process, **kwargs
        )
        if is_main_process:
            for name in selected:
                if name in self.init_reports:
                    folder = Path(save_directory) / ("" if name == "default" else name)
                    state = kwargs.get("state_dict") or {}
                    checkpoint.save(self, name, folder, self.init_reports[name], rank, save_embedding_layers, state)

    def load_adapter(  # type: ignore[override]
        self, model_id: Any, adapter_name: str, is_trainable: bool = False, **kwargs: Any
    ) -> Any:
        """Load an adapter; into one that headstart started, resume it: the factors and their anchors, to the bit."""
        if adapter_name not in self.init_reports:
            self.__dict__["loading"] = str(model_id)
            try:
                return super().load_adapter(model_id, adapter_name, is_trainable=is_trainable, **kwargs)
            finally:
                del self.__dict__["loading"]
        if odd := [name for name, value in kwargs.items() if name not in _ELSEWHERE and value is not None]:
            raise BadOption(
                f"{', '.join(odd)}: adapter {adapter_name!r} is resumed from a folder as it is; leave it out"
            )
        result = checkpoint.resume(self, adapter_name, model_id)
        if not is_trainable:
            self.eval()
        return result

    def add_adapter(
        self, adapter_name: str, peft_config: LoraConfig | peft.PeftConfig, *args: Any, **kwargs: Any
    ) -> None:
        """Add an adapter, which disturbs no other.

        Args:
            adapter_name: its name.
            peft_config: headstart's config, or PEFT's. PEFT's named starts are served by headstart too: PEFT's own
                would overwrite the weights of the base. The very config of an adapter that headstart started gives
                a copy of that adapter as it is now.
        """
        source = next((name for name in self.init_reports if self.peft_config.get(name) is peft_config), None)
        if isinstance(peft_config, peft.LoraConfig) and "loading" in self.__dict__:
            check_loaded(peft_config, self.__dict__["loading"])
        if source is not None:
            self._copy_adapter(source, adapter_name)
        elif isinstance(peft_config, LoraConfig) or isinstance(getattr(peft_config, "init_lora_weights", True), str):
            self._start_adapter(adapter_name, cast(LoraConfig, peft_config))
        elif getattr(peft_config, "layer_replication", None):
            raise BadOption("layer_replication would change the model beneath the other adapters: use PEFT's own model")
        else:
            super().add_adapter(adapter_name, peft_config, *args, **kwargs)
            try:
                adopt(self.base_model.model)
            except BaseException:
                self.delete_adapter(adapter_name)
                raise
            self.base_model.settle({}, trainable=True)

    def _start_adapter(self, adapter: str, config: LoraConfig | peft.LoraConfig) -> None:
        base = self.base_model.model
        with unwrapped(base):
            own = with_heads(base, own_config(base, config))
            starts, report = prepare(base, own)
            biases = trained_biases(base, starts, own)
            injected = peft_config(base, own, starts)
        with injection(self, injected):
            super().add_adapter(adapter, injected)
            enter(base, adapter, starts)
        self.base_model.settle(biases, trainable=adapter in self.active_adapters)
        self.init_reports[adapter] = report

    def _copy_adapter(self, source: str, adapter: str) -> None:
        config, base = self.peft_config[source], self.base_model.model
        starts = [(layer, layer.start(source)) for _, layer in shell_layers(base, source)]
        with injection(self, cast(peft.LoraConfig, config)):
            super().add_adapter(adapter, config)
            for layer, start in starts:
                layer.enter(adapter, start, layer.layout, layer.weight_name)
        for module in base.modules():
            if isinstance(module, ModulesToSaveWrapper) and source in module.modules_to_save:
                module.modules_to_save[adapter].load_state_dict(module.modules_to_save[source].state_dict())
        self.init_reports[adapter] = self.init_reports[source]

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.init_reports.pop(adapter_name, None)


class PeftModel(ShellModel):
    """peft.PeftModel."""


class PeftModelForCausalLM(ShellModel, peft.PeftModelForCausalLM):
    """peft.PeftModelForCausalLM."""


class PeftModelForSeq2SeqLM(ShellModel, peft.PeftModelForSeq2SeqLM):
    """peft.PeftModelForSeq2SeqLM."""


class PeftModelForSequenceClassification(ShellModel, peft.PeftModelForSequenceClassification):
    """peft.PeftModelForSequenceClassification."""


class PeftModelForTokenClassification(ShellModel, peft.PeftModelForTokenClassification):
    """peft.PeftModelForTokenClassification."""


class PeftModelForQuestionAnswering(ShellModel, peft.PeftModelForQuestionAnswering):
    """peft.PeftModelForQuestionAnswering."""


class PeftModelForFeatureExtraction(ShellModel, peft.PeftModelForFeatureExtraction):
    """peft.PeftModelForFeatureExtraction."""


_SHELLS: dict[type[peft.PeftModel], type[ShellModel]] = {
    peft.PeftModel: PeftModel,
    peft.PeftModelForCausalLM: PeftModelForCausalLM,
    peft.PeftModelForSeq2SeqLM: PeftModelForSeq2SeqLM,
    peft.PeftModelForSequenceClassification: PeftModelForSequenceClassification,
    peft.PeftModelForTokenClassification: PeftModelForTokenClassification,
    peft.PeftModelForQuestionAnswering: PeftModelForQuestionAnswering,
    peft.PeftModelForFeatureExtraction: PeftModelForFeatureExtraction,
}


def exchange(model: peft.PeftModel, adapter: str, report: InitReport, originals: Originals) -> ShellModel:
    """Give a PeftModel, and the LoraModel in it, our classes."""
    model.__class__ = _SHELLS[type(model)]
    model.base_model.__class__ = ShellTuner
    assert isinstance(model, ShellModel)
    model.__dict__["init_reports"] = {adapter: report}
    model.base_model.__dict__["originals"] = originals
    return model

"""PeftModels whose adapters are saved as plain LoRA on the original weights, and resume to the bit.

`PeftModel.save_pretrained` is what Trainer, TRL and the hub call; `load_adapter` is what Trainer calls to resume and
to load the best checkpoint.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import peft
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

from headstart.errors import KeyMismatch
from headstart.files.adapter import (
    PREFIX,
    REPORT,
    AdapterFile,
    Entry,
    few,
    plain_name,
    read_adapter,
    scales,
    write_adapter,
)
from headstart.files.checkpoint import check_base, provenance, start_of_entry, target_of
from headstart.lora.delta import plain_lora
from headstart.lora.layers import Start
from headstart.lora.report import InitReport
from headstart.peft.layers import ShellEmbedding, ShellLayer, ShellParameter


class ShellModel(peft.PeftModel):
    """What the exchanged models share: an init report by adapter, and our way in and out of files."""

    init_reports: dict[str, InitReport]

    def _base(self) -> nn.Module:
        return cast(nn.Module, self.base_model.model)

    def shell_layers(self, adapter: str) -> Iterator[tuple[str, ShellLayer]]:
        """The layers that carry an adapter, by their name in the base model."""
        for name, module in self._base().named_modules():
            if isinstance(module, ShellLayer) and adapter in module._present():
                yield name, module

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
        """Save adapters in PEFT's format, exact on the original base; with `rank`, truncated to it."""
        selected = selected_adapters or list(self.peft_config)
        foreign = [name for name in selected if name not in self.init_reports]
        if foreign:
            super().save_pretrained(
                str(save_directory), safe_serialization, foreign, save_embedding_layers, is_main_process, **kwargs
            )
        for name in selected:
            if name in self.init_reports and is_main_process:
                folder = Path(save_directory) / ("" if name == "default" else name)
                self._save(name, folder, rank, save_embedding_layers, kwargs.get("state_dict"))
                if name == "default":
                    self.create_or_update_model_card(str(save_directory))

    def _save(
        self, adapter: str, folder: Path, rank: int | None, embeddings: Any, state: Mapping[str, Tensor] | None
    ) -> None:
        layers = dict(self.shell_layers(adapter))
        entries = [_entry(name, layer, adapter, rank, state or {}) for name, layer in layers.items()]
        names = {n: f"{plain_name(n)}.{m.parameter_name}" for n, m in layers.items() if isinstance(m, ShellParameter)}
        config = {**_json(self.peft_config[adapter]), **scales(entries, names)}
        config |= {"use_rslora": False, "init_lora_weights": True, "inference_mode": True}
        config["base_model_name_or_path"] = config["base_model_name_or_path"] or _source(self._base())
        if embeddings == "auto" and any(isinstance(layer, ShellEmbedding) for layer in layers.values()):
            embeddings = False  # PEFT would copy a base embedding that is not trained
        extras = {
            key.removeprefix(PREFIX): value
            for key, value in get_peft_model_state_dict(
                self, state_dict=dict(state) if state else None, adapter_name=adapter, save_embedding_layers=embeddings
            ).items()
            if "lora_" not in key and ".anchor_" not in key
        }
        report = self.init_reports[adapter]
        origin = provenance(
            report,
            anchored={} if rank else {n: m.rank(adapter) for n, m in layers.items() if m.anchor(adapter) is not None},
            frozen={n: letters for n, m in layers.items() if (letters := m.frozen(adapter))},
            weights={n: m.original for n, m in layers.items()},
        )
        text = json.dumps(report.to_dict(), indent=2, default=str) + "\n"
        write_adapter(folder, entries, config, extras, origin, {REPORT: text})

    def load_adapter(  # type: ignore[override]
        self, model_id: Any, adapter_name: str, is_trainable: bool = False, **kwargs: Any
    ) -> Any:
        """Load an adapter; into an adapter that headstart started, resume it: the factors and their anchors."""
        if adapter_name not in self.__dict__.get("init_reports", {}):
            return super().load_adapter(model_id, adapter_name, is_trainable=is_trainable, **kwargs)
        file = read_adapter(model_id)
        layers = dict(self.shell_layers(adapter_name))
        if set(layers) != set(file.entries):
            odd = sorted(set(layers) ^ set(file.entries))
            raise KeyMismatch(f"{file.folder} and the model disagree about {few(odd)}: resume with the same targets")
        check_base({plain_name(path): layer.original for path, layer in layers.items()}, file)
        starts = {path: _start(layer, file, path, adapter_name) for path, layer in layers.items()}
        for path, layer in layers.items():
            layer.enter(adapter_name, starts[path], layer.layout, layer.weight_name)
        extras = {f"{PREFIX}{name}": value for name, value in file.extras.items()}
        if extras:
            peft.set_peft_model_state_dict(self, extras, adapter_name=adapter_name)
        return None


def _start(layer: ShellLayer, file: AdapterFile, path: str, adapter: str) -> Start:
    """What the file holds for a layer, checked against what the layer is."""
    parameter = layer.parameter_name if isinstance(layer, ShellParameter) else "weight"
    target = target_of(file.entries[path], layer.get_base_layer(), parameter, file)
    start = start_of_entry(file.entries[path], target, file, 0.0)
    here, there = (layer.rank(adapter), layer.anchor(adapter) is not None), (start.rank, start.anchor is not None)
    if here != there or not math.isclose(start.scaling, layer.scaling[adapter], rel_tol=1e-9):
        raise KeyMismatch(
            f"{file.folder}: rank, scale or anchoring of {path!r} is not the model's: use the same config"
        )
    return start


def _entry(name: str, layer: ShellLayer, adapter: str, rank: int | None, state: Mapping[str, Tensor]) -> Entry:
    branch = layer.branch(adapter)
    gathered = [state.get(f"{PREFIX}{name}.{layer.key(letter, adapter)}") for letter in "AB"]
    if gathered[0] is not None and gathered[1] is not None:
        A, B = layer.layout.from_file(gathered[0], gathered[1])
        branch = replace(branch, A=A, B=B)
    (A, B), file_rank, _ = plain_lora(layer.layout, branch, layer.rank(adapter), rank)
    A, B = layer.layout.to_file(A, B)
    return Entry(name, A, B, file_rank, branch.scaling * file_rank, branch.magnitude, isinstance(layer, ShellEmbedding))


def _json(config: peft.PeftConfig) -> dict[str, Any]:
    """PEFT's config as it writes it."""
    values = dict(config.to_dict())
    values.pop("runtime_config", None)
    return json.loads(json.dumps(values, default=_plain))  # type: ignore[no-any-return]


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set | frozenset) else str(value)


def _source(model: nn.Module) -> str | None:
    name = getattr(model, "name_or_path", None)
    return name if isinstance(name, str) and name else None


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


def exchange(model: peft.PeftModel, adapter: str, report: InitReport) -> ShellModel:
    """Give a PeftModel our class, and note how an adapter was started."""
    if not isinstance(model, ShellModel):
        model.__class__ = _SHELLS[type(model)]
        model.__dict__["init_reports"] = {}
    assert isinstance(model, ShellModel)
    model.init_reports[adapter] = report
    return model

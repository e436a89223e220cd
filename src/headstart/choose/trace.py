"""The outline of any model that transformers can build, or of any module: built without values, and traced.

One forward pass runs on tensors that have shapes and no values. What autograd keeps is added up, at two lengths,
because attention keeps a part that grows with their square. Where a model cannot be traced so, what goes into and
comes out of every matrix is counted instead.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from headstart.choose.families import stored
from headstart.choose.shapes import SIZES, Kept, Matrix, Outline
from headstart.errors import FileError
from headstart.files.source import Source
from headstart.lora import matrix as border
from headstart.lora import quantized

if TYPE_CHECKING:
    from transformers import PretrainedConfig

LENGTHS = (48, 96)


def outline_of_source(source: Source, dtype: str | None = None) -> Outline:
    """Of a model that only transformers knows how to read.

    Raises:
        FileError: if it cannot.
    """
    from transformers import AutoConfig

    options = {"gguf_file": source.gguf} if source.gguf else {}
    try:
        config = AutoConfig.from_pretrained(source.place, **options)
    except (OSError, ValueError, KeyError) as problem:
        raise FileError(f"cannot read a config of {source.name!r}: {str(problem).strip().splitlines()[0]}") from problem
    return outline_of_config(config, dtype)


def outline_of_fields(fields: Mapping[str, Any], dtype: str | None = None) -> Outline:
    """Of a config.json.

    Raises:
        FileError: if transformers knows no such architecture.
    """
    from transformers import AutoConfig

    given = {name: value for name, value in fields.items() if name != "model_type"}
    try:
        return outline_of_config(AutoConfig.for_model(str(fields.get("model_type")), **given), dtype)
    except (ValueError, KeyError, TypeError, AttributeError) as problem:
        reason = str(problem).strip().splitlines()[0].partition(". ")[0] if str(problem).strip() else ""
        reason = reason[:200] or type(problem).__name__
        raise FileError(f"transformers makes no model of this config ({reason}): check its model_type") from problem


def outline_of_config(config: PretrainedConfig, dtype: str | None = None) -> Outline:
    """Of a config object: its own class, or the causal language model of its type."""
    import transformers

    named = next(iter(config.architectures or []), None)
    fields = config.to_dict()
    dtype = dtype or _plain(stored(fields)["dtype"])
    build: Any = getattr(transformers, named, None) if named else None
    with torch.device("meta"):
        if build is not None:
            model = build._from_config(config, dtype=getattr(torch, dtype))
        else:
            try:
                model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
            except ValueError:
                model = transformers.AutoModel.from_config(config, dtype=getattr(torch, dtype))
    return outline_of_module(model, dtype, stored(fields)["quantised"], ours=True)


def _plain(dtype: str) -> str:
    return dtype if dtype in SIZES else "float32"


def outline_of_module(
    model: nn.Module, dtype: str | None = None, quantised: str | None = None, ours: bool = False
) -> Outline:
    """Of a model as it stands.

    Args:
        ours: it holds no values and nobody else wants it, so that it may be run, which spoils it.
    """
    config: Any = getattr(model, "config", None)
    shape: Any = config.get_text_config() if config is not None and hasattr(config, "get_text_config") else config
    head = _head(model)
    shapes = _matrices(model, head)
    unique = {id(p): p for p in model.parameters()}.values()  # Before a pass spoils it: `to_empty` unties.
    seen = _Seen(model, shapes) if ours else None
    kept, matrices = (None, None) if seen is None else seen.kept()
    how = "trace"
    if kept is None or matrices is None:
        how, matrices = "modules", tuple(shapes.values())
        kept = Kept(compute=sum(m.m * m.count * m.used for m in matrices))
    depth = int(getattr(shape, "num_hidden_layers", 0) or 0) or max(1, len(matrices) // 6)
    hidden = int(getattr(shape, "hidden_size", 0) or 0) or max((m.n for m in matrices), default=0)
    first = next(iter(unique), None)
    return Outline(
        kind=str(getattr(config, "model_type", type(model).__name__)),
        read=how,
        parameters=sum(quantized.elements(p) for p in unique),
        matrices=matrices,
        kept=kept,
        depth=depth,
        hidden=hidden,
        attention=depth * hidden if config is not None else 0.0,
        vocabulary=0 if head is None else int(head.out_features),
        longest=int(getattr(shape, "max_position_embeddings", 0) or 0),
        working=3.0 * max((m.m for m in matrices if m.count == 1), default=0),
        causal=type(model).__name__.endswith(("CausalLM", "LMHeadModel")),
        dtype=dtype or (str(first.dtype)[6:] if first is not None and first.is_floating_point() else "float32"),
        quantised=quantised or _quantised(model),
    )


def _head(model: nn.Module) -> Any:
    get = getattr(model, "get_output_embeddings", None)
    found = get() if callable(get) else None
    return found if isinstance(found, nn.Linear) else None


def _quantised(model: nn.Module) -> str | None:
    bits = [p for p in model.parameters() if quantized.is_quantized(p)]
    if not bits:
        return None
    return "4bit" if any(quantized.elements(p) > p.numel() for p in bits) else "8bit"


def _matrices(model: nn.Module, head: nn.Module | None) -> dict[str, Matrix]:
    """Every Linear, Conv1D and convolution but the output embedding, and stacks of matrices in bare parameters."""
    found = {}
    for name, module in model.named_modules():
        if border.is_linear(module) and module is not head:
            weight = border.outline(module)
            m, n = reversed(weight.shape) if border.is_conv1d(module) else weight.shape
            found[name] = Matrix(name, m, n, name)
            continue
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            m, n = module.weight.shape[0] // module.groups, math.prod(module.weight.shape[1:])
            found[name] = Matrix(name, m, n, name, module.groups, linear=False, convolution=True)
            continue
        for own, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 3:
                e, m, n = parameter.shape
                config: Any = getattr(model, "config", None)
                used = min(1.0, int(getattr(config, "num_experts_per_tok", None) or e) / e)
                found[f"{name}.{own}"] = Matrix(f"{name}.{own}", m, n, name, e, used, linear=False)
    return found


class _Seen:
    """What a pass without values shows: what autograd keeps, and which matrices are given the same rows."""

    def __init__(self, model: nn.Module, shapes: Mapping[str, Matrix]) -> None:
        self.model, self.shapes = model, shapes
        self.inputs: dict[str, list[tuple[Any, ...]]] = {}
        self.storages: dict[Any, int] = {}
        self.alive: list[Any] = []

    def kept(self) -> tuple[Kept | None, tuple[Matrix, ...] | None]:
        """None where the model cannot be run so."""
        said = logging.getLogger("torch._subclasses.fake_tensor")  # What fails here has another answer.
        silent, said.disabled = said.disabled, True
        try:
            with FakeTensorMode(allow_non_fake_inputs=True):
                self.model.to_empty(device="cpu").train()
                self.model.requires_grad_(False)
                short, long = (self._bytes(length) for length in LENGTHS)
        except Exception:  # Whatever a foreign forward raises on tensors without values.
            return None, None
        finally:
            said.disabled = silent
        t, u = LENGTHS
        pairs = max(0.0, (long / u - short / t) / (u - t))
        token = short / t - pairs * t
        # Counted in bytes of this dtype, mask included.
        return Kept(bytes=max(0.0, token), wide_pairs=pairs / 4), self._matrices()

    def _bytes(self, length: int) -> int:
        own = {p.untyped_storage() for p in self.model.parameters()}
        self.inputs, self.storages, self.alive = {}, {}, []

        def keep(tensor: Tensor) -> Tensor:
            if tensor.untyped_storage() not in own:
                self.storages[tensor.untyped_storage()] = tensor.untyped_storage().nbytes()
            return tensor

        model: Any = self.model
        modules = dict(model.named_modules())
        handles = [modules[n].register_forward_pre_hook(self._hook(n)) for n in self.shapes if n in modules]
        try:
            embedding = model.get_input_embeddings()
            tokens = torch.ones(1, length, dtype=torch.long)
            embedded = embedding(tokens).detach().requires_grad_()
            given: dict[str, Any] = {"inputs_embeds": embedded, "attention_mask": tokens}
            if getattr(model.config, "is_encoder_decoder", False):
                given["decoder_inputs_embeds"] = embedding(tokens).detach().requires_grad_()
            else:
                given["use_cache"] = False
            if not hasattr(model.config, "use_cache"):
                given.pop("use_cache", None)
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                model.base_model(**given)
        finally:
            for handle in handles:
                handle.remove()
        self.last = dict(self.storages)
        return sum(self.storages.values())

    def _hook(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], Tensor):
                self.alive.append(args[0])
                self.inputs.setdefault(name, []).append((args[0].untyped_storage(), args[0].shape))

        return hook

    def _matrices(self) -> tuple[Matrix, ...]:
        first: dict[Any, str] = {}
        found = []
        for name, shape in self.shapes.items():
            seen = self.inputs.get(name)
            if not seen:
                found.append(shape)
                continue
            storage, size = seen[0]
            shares = first.setdefault((storage, tuple(size)), name)
            rows = size.numel() / size[-1] / LENGTHS[-1]
            found.append(
                Matrix(name, shape.m, shape.n, shares, keeps=storage in self.last, calls=len(seen) * min(rows, 1.0))
            )
        return tuple(found)

"""gguf: one file for llama.cpp and whatever is built on it.

    blk.0.attn_q.weight.lora_a     (r, n)
    blk.0.attn_q.weight.lora_b     (m, r)
    adapter.lora.alpha             R: the runtime multiplies by α/r

The names and the order of the rows are those of the base's own GGUF. For the Llama family its converter interleaves the
two halves of every head of q and k (they rotate pairs of neighbours), so the rows of B move with them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headstart.errors import BadOption, NotPortable, nearest
from headstart.files import atomic
from headstart.files.portable.change import Change
from headstart.files.portable.parcel import (
    Parcel,
    refuse_convolutions,
    refuse_dora,
    refuse_embeddings,
    refuse_extras,
)

# transformers' model_type → llama.cpp's architecture; those in _INTERLEAVED with q and k as the docstring says.
_ARCHITECTURES = {
    "arcee": "ARCEE",
    "cohere": "COMMAND_R",
    "cohere2": "COHERE2",
    "gemma": "GEMMA",
    "gemma2": "GEMMA2",
    "gemma3": "GEMMA3",
    "gemma3_text": "GEMMA3",
    "gpt2": "GPT2",
    "granite": "GRANITE",
    "llama": "LLAMA",
    "mistral": "LLAMA",
    "olmo": "OLMO",
    "olmo2": "OLMO2",
    "olmo3": "OLMO2",
    "phi": "PHI2",
    "phi3": "PHI3",
    "qwen2": "QWEN2",
    "qwen3": "QWEN3",
    "seed_oss": "SEED_OSS",
    "smollm3": "SMOLLM3",
    "stablelm": "STABLELM",
    "starcoder2": "STARCODER2",
}
_INTERLEAVED = {"arcee", "granite", "llama", "mistral", "olmo", "smollm3"}


@dataclass(frozen=True)
class _Target:
    """The base as llama.cpp knows it: the names of it and its tensors; the heads of q and k where these interleave."""

    architecture: str
    names: Any
    heads: Mapping[str, int]
    tied: bool


def refuse(parcel: Parcel) -> None:
    refuse_dora(parcel, "gguf")
    refuse_extras(parcel, "gguf")
    refuse_convolutions(parcel, "gguf")
    target = _target(parcel)
    if target.tied:
        refuse_embeddings(parcel, "gguf", "the base ties it to its head, and llama.cpp would change both: merge it")
        if any(change.name.endswith("lm_head") for change in parcel.changes):
            raise NotPortable(
                "gguf: the base ties lm_head to its embedding, and llama.cpp has no head to adapt: merge it"
            )
    for change in parcel.changes:
        _name(change, target)


def write(parcel: Parcel, changes: Sequence[Change], origin: Mapping[str, Any], out: Path) -> None:
    target, size = _target(parcel), sum(4 * (c.A.numel() + c.B.numel()) for c in changes)
    atomic.write_files(out.parent, {out.name: lambda path: _write(path, changes, origin, target)}, size=size)


def _write(path: Path, changes: Sequence[Change], origin: Mapping[str, Any], target: _Target) -> None:
    import gguf

    writer = gguf.GGUFWriter(path, target.architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(changes[0].rank))
    writer.add_string("headstart.origin", json.dumps(dict(origin), sort_keys=True))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for change in changes:
        name, (A, B) = _name(change, target), _arranged(change, target)
        for suffix, factor in (("lora_a", A), ("lora_b", B)):
            array, kind = _array(factor)
            writer.add_tensor(f"{name}.{suffix}", array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _array(factor: Tensor) -> tuple[Any, Any]:
    """A tensor as NumPy holds it, and the type that llama.cpp knows it by."""
    import gguf

    if factor.dtype == torch.bfloat16:
        kind = gguf.GGMLQuantizationType.BF16
        return gguf.quantize(factor.float().contiguous().numpy(), kind), kind
    return factor.contiguous().numpy(), None


def _arranged(change: Change, target: _Target) -> tuple[Tensor, Tensor]:
    """The factors in the order of the base's rows."""
    if change.embedding:
        return change.A.T, change.B  # looked up by rows of A
    heads = target.heads.get(change.name.rsplit(".", 1)[-1])
    if heads is None:
        return change.A, change.B
    B = change.B
    return change.A, B.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(B.shape)


def _name(change: Change, target: _Target) -> str:
    """llama.cpp's name of the weight."""
    key = re.sub(r"(^|\.)language_model\.", r"\1", change.name)
    for spelling in (key, key.removeprefix("model."), f"model.{key.removeprefix('model.')}"):
        if found := target.names.get_name(f"{spelling}.weight", try_suffixes=(".weight",)):
            return str(found)
    raise NotPortable(
        f"gguf: llama.cpp has no tensor for {change.name!r} in a {target.architecture!r}"
        + (": experts stand in one tensor there; merge the adapter" if ".experts." in change.name else "")
    )


def _target(parcel: Parcel) -> _Target:
    try:
        import gguf
    except ImportError as error:
        raise BadOption("the profile gguf needs the package gguf: pip install 'headstart[gguf]'") from error

    if parcel.base is None:
        raise NotPortable("gguf names tensors by the base's architecture: pass the base (its weights are not needed)")
    config = getattr(parcel.base, "config", None)
    if config is None:
        raise NotPortable(f"gguf needs a transformers model as the base, not a {type(parcel.base).__name__}")
    config = config.get_text_config()
    kind = str(config.model_type)
    if kind not in _ARCHITECTURES:
        raise NotPortable(
            f"gguf: how llama.cpp arranges a {kind!r} is not known here{nearest(kind, _ARCHITECTURES, 1)}: export it "
            "as portable, and pass that to llama.cpp's convert_lora_to_gguf.py"
        )
    arch = gguf.MODEL_ARCH[_ARCHITECTURES[kind]]
    heads = {}
    if kind in _INTERLEAVED:
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    return _Target(
        architecture=gguf.MODEL_ARCH_NAMES[arch],
        names=gguf.get_tensor_name_map(arch, config.num_hidden_layers),
        heads=heads,
        tied=bool(config.tie_word_embeddings),
    )

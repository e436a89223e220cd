"""From what a user calls a model to the model: a hub name, a folder, a GGUF file, or the wheel that needs no hub.

A GGUF is unpacked once into an ordinary folder in the cache (unpacking takes half a minute, loading the folder one
second), so that everything after this file sees an ordinary pretrained model.
"""

from __future__ import annotations

import functools
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from filelock import FileLock

from headstart.errors import FileError, Unstreamable
from headstart.files.source import Source, cache_of, find
from headstart.tune.folder import write_folder

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "Source",
    "config_of",
    "find",
    "load",
    "local",
    "skeleton",
    "tokenizer_of",
    "trained_dtype",
    "unpacked",
    "viewed",
]

# Weights in other formats, and what only their programs read.
_UNREAD = ["*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.gguf", "*.onnx*", "original/*", "onnx/*"]


def unpacked(source: Source) -> Source:
    """The source itself, or the folder into which its GGUF is unpacked (now, if it never was)."""
    if source.gguf is None:
        return source
    place = cache_of(Path(source.place) / source.gguf)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{place}.lock"):  # Of several processes that start together, one unpacks.
            if not place.exists():
                write_folder(place, lambda folder: _unpack(source, folder))
    except OSError as problem:
        raise FileError(f"cannot unpack {source.gguf} to {str(place)!r} ({problem}): set XDG_CACHE_HOME") from problem
    return Source(source.name, str(place))


def _unpack(source: Source, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # Float32 holds what any quantised block says; the run's own dtype is chosen when the folder is loaded.
    given: dict[str, Any] = {"gguf_file": source.gguf, "dtype": torch.float32}
    try:  # Newer versions may keep the weights packed, which does not train.
        from transformers import GgufConfig

        given["quantization_config"] = GgufConfig(dequantize=True)
    except ImportError:
        pass
    model = AutoModelForCausalLM.from_pretrained(source.place, **given)
    # The weights are plain by now; while these say otherwise, saving and training refuse.
    for owner, name in ((model.config, "quantization_config"), (model, "is_quantized"), (model, "hf_quantizer")):
        if name in vars(owner):
            delattr(owner, name)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source.place, gguf_file=source.gguf).save_pretrained(folder)


def config_of(source: Source) -> PretrainedConfig:
    """The architecture alone."""
    from transformers import AutoConfig

    return cast("PretrainedConfig", _from_pretrained(AutoConfig, source))


def tokenizer_of(source: Source) -> PreTrainedTokenizerBase:
    """The tokenizer, with something to pad with."""
    from transformers import AutoTokenizer

    tokenizer: PreTrainedTokenizerBase = _from_pretrained(AutoTokenizer, source)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load(source: Source, dtype: str = "auto") -> PreTrainedModel:
    """The model with its weights, named as `source.name`; "auto" keeps the dtype that they are stored in."""
    from transformers import AutoModelForCausalLM

    model: PreTrainedModel = _from_pretrained(AutoModelForCausalLM, unpacked(source), dtype=dtype)
    model.name_or_path = model.config._name_or_path = source.name
    return model


def local(source: Source) -> Path:
    """The folder of a model; one on the hub is downloaded, if it is not there yet."""
    if Path(source.place).exists():
        return Path(source.place)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source.place, ignore_patterns=_UNREAD))
    except Exception as problem:
        reason = str(problem).strip().splitlines()[0]
        raise FileError(f"no folder {source.place!r}, and the hub gave no such model: {reason}") from problem


def viewed(source: Source) -> nn.Module:
    """The model to look at, not to run: views of its files where they hold it as it is, loaded elsewhere."""
    from headstart.files.merging.mapped import mapped

    plain = unpacked(source)
    try:
        model: Any = mapped(local(plain))
    except Unstreamable:
        return load(plain)
    model.name_or_path = model.config._name_or_path = source.name
    return cast("nn.Module", model)


def trained_dtype(source: Source, dtype: str) -> str:
    """What a run's "auto" stands for: on a CPU what computes faster, elsewhere bfloat16 unless stored in float32."""
    import torch

    if dtype != "auto":
        return dtype
    if torch.accelerator.current_accelerator() is None:
        return faster_on_cpu()
    stored = None if source.gguf else config_of(source).dtype
    return "float32" if stored == torch.float32 else "bfloat16"


@functools.cache
def faster_on_cpu() -> str:
    """Measured in some milliseconds: without units for bfloat16, a CPU is three times slower in it.

    In turns, and the shortest of several: another program's turn on the core counts for neither.
    """
    import torch

    best = {torch.float32: math.inf, torch.bfloat16: math.inf}
    for turn in range(6):
        for dtype in best:
            x, W = torch.ones(256, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
            began = time.perf_counter()
            torch.nn.functional.linear(x, W)
            if turn:  # The first makes what the others find made.
                best[dtype] = min(best[dtype], time.perf_counter() - began)
    return "bfloat16" if best[torch.bfloat16] < best[torch.float32] else "float32"


def skeleton(source: Source, dtype: str) -> PreTrainedModel:
    """The model on the meta device: every shape, no value."""
    import torch
    from transformers import AutoModelForCausalLM

    config = config_of(source)
    with torch.device("meta"):
        return cast("PreTrainedModel", AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)))


def _from_pretrained(kind: Any, source: Source, **options: Any) -> Any:
    if source.gguf is not None:
        options["gguf_file"] = source.gguf
    try:
        return kind.from_pretrained(source.place, **options)
    except (OSError, ValueError) as problem:
        reason = str(problem).strip().splitlines()[0]
        raise FileError(f"cannot load {source.name!r}: {reason}") from problem

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

from headstart.errors import BadOption, FileError, Unstreamable
from headstart.files.source import Source, cache_of, find
from headstart.tune.folder import write_folder

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "Source",
    "check_causal",
    "check_length",
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

    folder = Path(source.place)
    try:
        tokenizer: PreTrainedTokenizerBase = _from_pretrained(AutoTokenizer, source)
    except FileError as problem:
        if source.gguf is not None or not folder.is_dir() or (folder / "tokenizer.json").exists():
            raise
        raise FileError(
            f"{source.name!r} holds no tokenizer: copy tokenizer.json and tokenizer_config.json there from the model "
            "that it was made from"
        ) from problem
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_causal(source: Source) -> None:
    """Refuse an encoder: it sees the tokens that it would learn to predict.

    Raises:
        FileError: if the config is an encoder's, whatever heads transformers has for it.
    """
    if source.gguf is not None:
        return
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED

    config = config_of(source)
    kind = config.model_type
    causal = getattr(config, "is_encoder_decoder", False) or getattr(config, "is_decoder", kind in CAUSAL)
    if kind in MASKED and not causal:
        raise FileError(
            f"{source.name!r} is an encoder ({kind}), which sees the tokens that it would learn to predict: pass a "
            "causal language model, or adapt this one in Python, with headstart.adapt and a loss of yours"
        )


def check_length(model: PreTrainedModel, max_length: int) -> None:
    """Refuse rows that are longer than a table of learned positions; computed positions have no end.

    Raises:
        BadOption: if there is such a table, and it is shorter.
    """
    from torch import nn

    places = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if places is None or max_length <= places:
        return
    words = {model.get_input_embeddings(), model.get_output_embeddings()}
    tables = {module.num_embeddings for module in model.modules() if isinstance(module, nn.Embedding)
              and module not in words}  # fmt: skip
    if tables & {places, places + 2}:  # OPT and its kin keep two for padding.
        raise BadOption(
            f"max_length is {max_length}, and the model has learned {places} positions: choose at most that"
        )


def load(source: Source, dtype: str = "auto", whole: bool = False) -> PreTrainedModel:
    """The model with its weights, named as `source.name`; "auto" keeps the dtype that they are stored in.

    Raises:
        FileError: if it cannot be loaded, or, where it has to be `whole`, if weights that it computes with are missing
            and would be random.
    """
    from transformers import AutoModelForCausalLM

    model: PreTrainedModel
    model, found = _from_pretrained(AutoModelForCausalLM, unpacked(source), dtype=dtype, output_loading_info=True)
    if whole and (missing := sorted(found["missing_keys"])):
        from headstart.files.adapter import few

        raise FileError(
            f"{source.name!r} holds no {few(missing)}, which would begin as noise: pass a whole causal language model"
        )
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
    try:
        with torch.device("meta"):
            return cast("PreTrainedModel", AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)))
    except ValueError as problem:  # Of a kind that has no causal language model.
        raise FileError(f"cannot load {source.name!r}: {str(problem).strip().splitlines()[0]}") from problem


def _from_pretrained(kind: Any, source: Source, **options: Any) -> Any:
    if source.gguf is not None:
        options["gguf_file"] = source.gguf
    try:
        return kind.from_pretrained(source.place, **options)
    except (OSError, ValueError) as problem:
        reason = str(problem).strip().splitlines()[0]
        raise FileError(f"cannot load {source.name!r}: {reason}") from problem

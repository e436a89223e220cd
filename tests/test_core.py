"""A trained core between frozen factors, as LoRA-SB has: y = W·x + s·B·R·A·x, in both shells, then in plain PEFT."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import headstart as hs
from headstart.inits.strategy import Factors, _registry, register


@pytest.fixture(autouse=True)
def _cored() -> Iterator[None]:
    @register("cored", paper="none", fact="for a test")
    def cored(shape: tuple[int, int], rank: int, generator: torch.Generator) -> Factors:
        def draw(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator)

        m, n = shape
        return Factors(draw(rank, n), draw(m, rank), frozen=frozenset("AB"), core=draw(rank, rank))

    yield
    del _registry["cored"]


KINDS: dict[str, tuple[nn.Module, Tensor, dict[str, Any]]] = {
    "linear": (nn.Linear(6, 8), torch.randn(3, 6), {}),
    "conv2d": (nn.Conv2d(4, 6, 3), torch.randn(2, 4, 5, 5), {}),
    "fused": (nn.Linear(6, 9), torch.randn(3, 6), {"parts": {"0": [True, False, True]}}),
    "embedding": (nn.Embedding(9, 6), torch.randint(0, 9, (2, 4)), {}),
    "dora": (nn.Linear(6, 8), torch.randn(3, 6), {"use_dora": True}),
}


def config(**changes: Any) -> hs.LoraConfig:
    return hs.LoraConfig(r=2, lora_alpha=4, target_modules=["0"], init_lora_weights="cored", **changes)


def in_native(base: nn.Module, **changes: Any) -> Any:
    return hs.adapt(base, config(**changes)).model


def in_peft(base: nn.Module, **changes: Any) -> Any:
    from headstart.peft import get_peft_model

    return get_peft_model(base, config(**changes))


def train(model: Any, x: Tensor) -> None:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shell", [in_native, in_peft])
def test_a_core_trains_alone_and_is_plain_lora_elsewhere(shell: Any, kind: str, tmp_path: Path) -> None:
    import peft

    layer, x, changes = KINDS[kind]
    if shell is in_peft and kind == "fused":
        changes = {}  # PEFT's config has no parts.
    base = nn.Sequential(copy.deepcopy(layer))
    model = shell(copy.deepcopy(base), **changes).train()
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert all("lora_core" in name or "magnitude" in name for name in names)
    before = model(x)
    train(model, x)
    after = model.eval()(x).detach()
    assert not torch.allclose(before, after)
    if shell is in_native:
        hs.save(model, tmp_path)
    else:
        model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path)).eval()(x)
    assert torch.allclose(again, after, atol=1e-5)
    loaded = copy.deepcopy(base)
    hs.load(loaded, tmp_path)
    assert torch.allclose(loaded(x), after, atol=1e-5)


def test_merge_and_removal_see_the_core() -> None:
    layer, x, _ = KINDS["linear"]
    base = nn.Sequential(copy.deepcopy(layer))
    model = in_native(copy.deepcopy(base)).eval()
    after = model(x)
    hs.merge(model, reversible=True)
    assert torch.allclose(model(x), after, atol=1e-5)
    hs.unmerge(model)
    assert torch.equal(model(x), after)
    hs.remove(model)
    assert torch.equal(model(x), base(x))


def test_a_checkpoint_resumes_the_core_to_the_bit() -> None:
    layer, x, _ = KINDS["linear"]
    model, other = (in_native(nn.Sequential(copy.deepcopy(layer))) for _ in range(2))
    train(model, x)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))


@pytest.mark.parametrize("shell", [in_native, in_peft])
def test_disabling_and_gradients(shell: Any) -> None:
    layer, x, _ = KINDS["linear"]
    base = nn.Sequential(copy.deepcopy(layer))
    model = shell(copy.deepcopy(base))
    (core,) = [p for p in model.parameters() if p.requires_grad]
    (found,) = torch.autograd.grad(model(x).square().sum(), [core])
    A, B = (p for n, p in model.named_parameters() if "lora_A" in n or "lora_B" in n)
    R = core.detach().clone()[0].requires_grad_()
    y = base(x) + 2 * x @ (B @ R @ A).T
    (wanted,) = torch.autograd.grad(y.square().sum(), [R])
    assert torch.allclose(found[0], wanted, rtol=1e-4, atol=1e-4)
    if shell is in_peft:
        with model.disable_adapter():
            assert torch.equal(model(x), base(x))
        assert core.requires_grad

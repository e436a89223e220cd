"""LoRA+ groups and the preconditioned AdamW, against the papers' equations in dense float64."""

from __future__ import annotations

import copy
import math
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from packaging.version import Version
from torch import Tensor, nn

import headstart as hs
from headstart.errors import AdapterState, BadOption
from headstart.lora.optim import precondition

Maker = Callable[..., Any]
Matrix = NDArray[np.float64]


class Experts(nn.Module):
    """Three matrices in one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 5, 6))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.up.mT).sum(0)


class Small(nn.Module):
    """A layer of every kind that stores its factors in its own way."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 8)
        self.fused = nn.Linear(8, 12)
        self.convolved = nn.Conv1d(4, 6, 3, groups=2)
        self.experts = Experts()
        self.norm = nn.LayerNorm(5)
        self.head = nn.Linear(5, 2)

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.tanh(self.fused(self.words(ids))).reshape(len(ids), 4, -1)
        x = torch.tanh(self.convolved(x)).mean(-1)
        return self.head(self.norm(self.experts(x)))  # type: ignore[no-any-return]


IDS = torch.arange(12).reshape(3, 4) % 11
TARGETS: dict[str, Any] = {"target_modules": ["words", "fused", "convolved"], "target_parameters": ["experts.up"]}


def adapted(**changes: Any) -> nn.Module:
    """In float64, with factors as they are in the midst of training."""
    torch.manual_seed(0)
    fields = {"r": 2, "lora_alpha": 3, "bias": "all", **TARGETS, "init_lora_weights": "random", **changes}
    return hs.adapt(Small(), hs.LoraConfig(**fields)).model.double()


def loss_of(model: Any) -> Tensor:
    return (model(IDS) - torch.tensor([1.0, -1.0], dtype=torch.float64)).square().mean()  # type: ignore[no-any-return]


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int, loss: Maker = loss_of) -> dict[str, Tensor]:
    for _ in range(count):
        loss(model).backward()
        optimizer.step()
        optimizer.zero_grad()
    return trained(model)


def preconditioned(model: nn.Module, lr: float = 1e-2, weight_decay: float = 0.0, **settings: Any) -> Any:
    return hs.PreconditionedAdamW(hs.preconditioned_groups(model, lr, weight_decay), **settings)


# ------------------------------------------------------------------ the oracle


def share(A: Matrix, B: Matrix, damping: float) -> float:
    """d: the damping times the mean of all r diagonal entries of BᵀB and of AAᵀ."""
    return damping * float(np.mean([np.sum(row**2) for row in A] + [np.sum(column**2) for column in B.T]))


def directions(A: Matrix, B: Matrix, g_A: Matrix, g_B: Matrix, d: float) -> tuple[Matrix, Matrix]:
    """Equation 9, with inverses."""
    identity = np.eye(len(A))
    return np.linalg.inv(B.T @ B + d * identity) @ g_A, g_B @ np.linalg.inv(A @ A.T + d * identity)


class Adam:
    """Kingma and Ba's Algorithm 1, with decay of the weight itself."""

    def __init__(self, weight: Matrix) -> None:
        self.m, self.v, self.t = np.zeros_like(weight), np.zeros_like(weight), 0

    def step(self, weight: Matrix, g: Matrix, lr: float, decay: float) -> Matrix:
        self.t += 1
        self.m, self.v = 0.9 * self.m + 0.1 * g, 0.999 * self.v + 0.001 * g * g
        m, v = self.m / (1 - 0.9**self.t), self.v / (1 - 0.999**self.t)
        return weight - lr * decay * weight - lr * m / (np.sqrt(v) + 1e-8)


def cut(name: str, A: Matrix, B: Matrix) -> list[tuple[Any, Any]]:
    """Indices of the blocks of a layer in its two stored tensors."""
    if "fused" in name:  # the first and the last third of twelve rows, of rank two
        return [(np.s_[:2], np.s_[:4]), (np.s_[2:], np.s_[4:])]
    if "convolved" in name:  # two groups, of rank one
        return [(np.s_[:1], np.s_[:3]), (np.s_[1:], np.s_[3:])]
    return [(i, i) for i in range(3)] if A.ndim == 3 else [(np.s_[:], np.s_[:])]


def oracle(model: nn.Module, count: int, lr: float, decay: float, damping: float) -> dict[str, Tensor]:
    """`count` steps of the whole model, block by block and in NumPy."""
    states = {name: Adam(p.numpy()) for name, p in trained(model).items()}
    for _ in range(count):
        model.zero_grad()
        loss_of(model).backward()
        gradients = {n: p.grad.numpy().copy() for n, p in model.named_parameters() if p.grad is not None}
        old = {name: p.detach().numpy().copy() for name, p in model.named_parameters() if name in gradients}
        for name in [name for name in gradients if "lora" in name and "A" in name.split("_")[-1]]:
            other = name.replace("_A", "_B")
            A, B = old[name], old[other]
            for rows, columns in cut(name, A, B):
                a, b, g_a, g_b = A[rows], B[columns], gradients[name][rows], gradients[other][columns]
                shape_a, shape_b = a.shape, b.shape
                flat = [a.reshape(len(a), -1), b.reshape(len(b), -1), g_a.reshape(len(a), -1), g_b.reshape(len(b), -1)]
                h_a, h_b = directions(*flat, share(flat[0], flat[1], damping))
                gradients[name][rows], gradients[other][columns] = h_a.reshape(shape_a), h_b.reshape(shape_b)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in gradients:
                    decays = 0.0 if parameter.ndim == 1 else decay
                    parameter.copy_(torch.from_numpy(states[name].step(old[name], gradients[name], lr, decays)))
    return trained(model)


def test_steps_are_those_of_the_dense_oracle_on_every_kind_of_layer() -> None:
    fields: dict[str, Any] = {"parts": {"fused": [True, False, True]}}
    model, dense = adapted(**fields), adapted(**fields)
    assert {tuple(p.shape) for p in trained(model).values()} >= {(4, 8), (8, 2), (2, 2, 3), (6, 1, 1), (3, 2, 6)}
    found = steps(model, preconditioned(model, 1e-2, 0.1, damping=0.05), 4)
    wanted = oracle(dense, 4, 1e-2, 0.1, 0.05)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-11, msg=name)


def test_what_belongs_to_no_pair_gets_plain_adamw() -> None:
    fields: dict[str, Any] = {"modules_to_save": ["head"]}
    model, plain = adapted(**fields), adapted(**fields)
    alone = {n: p for n, p in plain.named_parameters() if p.requires_grad and "lora" not in n}
    assert {p.ndim for p in alone.values()} == {1, 2}
    decays = [{"params": [p for p in alone.values() if (p.ndim > 1) is decay]} for decay in (True, False)]
    adamw = torch.optim.AdamW([{**decays[0], "weight_decay": 0.1}, {**decays[1], "weight_decay": 0.0}], lr=1e-2)
    steps(plain, adamw, 1)
    found = steps(model, preconditioned(model, 1e-2, 0.1), 1)
    for name, parameter in alone.items():
        torch.testing.assert_close(found[name], parameter.detach(), rtol=0, atol=1e-15)


# ------------------------------------------------------------------ what it is for


def one_linear(A: Tensor, B: Tensor, init: Any = "random") -> Any:
    """One branch beside a zero weight, with these factors and s = 1."""
    base = nn.Sequential(nn.Linear(A.shape[1], B.shape[0], bias=False))
    nn.init.zeros_(base[0].weight)
    fields = {"r": len(A), "lora_alpha": len(A), "target_modules": ["0"], "init_lora_weights": init}
    model: Any = hs.adapt(base, hs.LoraConfig(**fields)).model.to(A.dtype)
    with torch.no_grad():
        for factor, value in zip(model[0].factors, (A, B), strict=True):
            factor.copy_(value)
    return model


def product(model: Any) -> Tensor:
    A, B = model[0].factors
    return (B @ A).detach()


def test_the_product_learns_the_same_however_it_is_split() -> None:
    """Without damping and without moments; an eps above all gradients leaves of Adam's division a constant."""
    double = {"dtype": torch.float64}
    A, B, W, x = torch.randn(3, 6, **double), torch.randn(5, 3, **double), torch.randn(5, 6, **double), torch.eye(6)
    R = torch.randn(3, 3, **double) + 2 * torch.eye(3)
    ends = []
    for a, b in ((A, B), (torch.linalg.solve(R, A), B @ R)):
        model = one_linear(a, b)
        optimizer = preconditioned(model, lr=0.3e9, damping=0.0, betas=(0.0, 0.0), eps=1e9)
        steps(model, optimizer, 5, lambda model: (model(x.double()) - W.T).square().sum() / 2)
        ends.append(product(model))
    torch.testing.assert_close(*ends, rtol=1e-6, atol=1e-6)
    assert float((ends[0] - B @ A).norm()) > 1
    unlike = [one_linear(a, b) for a, b in ((A, B), (torch.linalg.solve(R, A), B @ R))]
    for model in unlike:
        steps(
            model, torch.optim.SGD(model.parameters(), 0.01), 5, lambda model: (model(x.double()) - W.T).square().sum()
        )
    assert float((product(unlike[0]) - product(unlike[1])).norm()) > 0.1, "plain descent does depend on the split"


def regression(model: Any, optimizer: Any, count: int) -> tuple[float, float]:
    """The excess loss before and after a fit to a matrix with singular values from 1 to 1/30."""
    generator = torch.Generator().manual_seed(3)
    U, V = (torch.linalg.qr(torch.randn(48, 8, generator=generator))[0] for _ in "UV")
    W = (U * torch.logspace(0, -math.log10(30), 8)) @ V.T
    before = float((product(model) - W).square().sum())
    for _ in range(count):
        x = torch.randn(48, 48, generator=generator)
        (model(x) - x @ W.T).square().sum(1).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return before, float((product(model) - W).square().sum())


class Absolute(hs.PreconditionedAdamW):
    """With the references' rule: a number that does not know the factors' size."""

    def _gradients(self, group: Any) -> Any:
        A, B = group["params"]
        h = directions(*(t.detach().double().numpy() for t in (A, B, A.grad, B.grad)), 1e-6)
        return {p: torch.from_numpy(gradient).float() for p, gradient in zip((A, B), h, strict=True)}


@pytest.mark.parametrize("mirrored", [False, True], ids=["B=0", "A=0"])
def test_it_leaves_zero_where_a_damping_of_1e_6_stands_still(mirrored: bool) -> None:
    """With the raw rule A's first gradients are so large that Adam's second moment then holds A where it is."""
    kaiming, zero = torch.empty(8, 48).uniform_(-1, 1) / math.sqrt(48), torch.zeros(48, 8)
    factors = (zero.T, kaiming.T) if mirrored else (kaiming, zero)
    left = {}
    for kind in (hs.PreconditionedAdamW, Absolute):
        model = one_linear(*factors)
        optimizer = kind(hs.preconditioned_groups(model, 1e-3))
        before, _ = regression(model, optimizer, 1)
        moving, still = (model[0].factors[::-1], model[0].factors)[mirrored]
        assert torch.equal(still, factors[int(mirrored)]), "its gradient is zero"
        assert float(moving.detach().abs().max()) <= 1.001e-3, "one step of Adam"
        _, after = regression(model, optimizer, 200)
        left[kind] = after / before
    assert left[hs.PreconditionedAdamW] < 0.15
    assert left[Absolute] > 0.5


def test_it_beats_adamw_where_the_directions_differ_in_size() -> None:
    A, B = torch.empty(8, 48).uniform_(-1, 1) / math.sqrt(48), torch.zeros(48, 8)
    model, plain = one_linear(A, B), one_linear(A, B)
    _, ours = regression(model, preconditioned(model, 1e-2), 300)
    _, theirs = regression(plain, torch.optim.AdamW(list(plain[0].factors), 1e-2), 300)
    assert ours < theirs / 5


@pytest.mark.parametrize("damping", [0.0, 1e-6, 0.1])
@pytest.mark.parametrize("size", [1e-12, 1.0, 1e6])
def test_deficient_and_extreme_factors_give_finite_directions(damping: float, size: float) -> None:
    one = torch.randn(64, 1) @ torch.randn(1, 32)  # rank one, as if two columns of B had met
    factors = (size * one.T[:32, :48], size * one)
    for h in precondition(factors, (torch.randn(32, 48), torch.randn(64, 32)), damping):
        assert h.isfinite().all()
    nothing = precondition((torch.zeros(4, 3), torch.zeros(5, 4)), (torch.zeros(4, 3), torch.zeros(5, 4)), damping)
    assert all(not h.any() for h in nothing)


def test_damping_has_no_unit() -> None:
    """A model whose factors are all a thousand times larger is preconditioned by a millionth."""
    A, B, g_A, g_B = torch.randn(4, 7), torch.randn(5, 4), torch.randn(4, 7), torch.randn(5, 4)
    small = precondition((A, B), (g_A, g_B), 0.1)
    large = precondition((1000 * A, 1000 * B), (g_A, g_B), 0.1)
    for h, same in zip(small, large, strict=True):
        torch.testing.assert_close(h, 1e6 * same, rtol=1e-4, atol=1e-5)


def test_after_a_singular_value_start_the_first_step_is_adamws() -> None:
    torch.manual_seed(1)
    base = nn.Sequential(nn.Linear(12, 10))
    config = hs.LoraConfig(r=4, target_modules=["0"], init_lora_weights="pissa")
    model = hs.adapt(copy.deepcopy(base), config).model
    plain = hs.adapt(base, config).model
    x = torch.randn(20, 12)
    found = steps(model, preconditioned(model, 1e-2), 1, lambda model: model(x).square().sum())
    adamw = torch.optim.AdamW([p for p in plain.parameters() if p.requires_grad], 1e-2, weight_decay=0)
    wanted = steps(plain, adamw, 1, lambda model: model(x).square().sum())
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-6)


def test_a_frozen_partner_still_preconditions() -> None:
    base = nn.Sequential(nn.Linear(9, 7))
    model: Any = hs.adapt(base, hs.LoraConfig(r=3, target_modules=["0"], init_lora_weights="mica")).model.double()
    A, B = model[0].factors
    assert (A.requires_grad, B.requires_grad) == (True, False)
    with torch.no_grad():
        B.mul_(torch.tensor([1.0, 5.0, 25.0]))
        B.copy_(B @ (torch.randn(3, 3).double() + torch.eye(3)))
    start, fixed = A.detach().clone(), B.detach().clone()
    model(torch.randn(5, 9).double()).square().sum().backward()
    h, _ = directions(
        *(t.detach().numpy() for t in (A, B, A.grad, torch.zeros_like(B))), share(start.numpy(), fixed.numpy(), 0.1)
    )
    optimizer = preconditioned(model, lr=1e9, betas=(0.0, 0.0), eps=1e9)
    optimizer.step()
    torch.testing.assert_close(A.detach(), start - torch.from_numpy(h), rtol=1e-6, atol=1e-6)
    assert torch.equal(B, fixed)
    assert B not in optimizer.state


def test_gradients_are_left_as_they_were() -> None:
    model = adapted()
    loss_of(model).backward()
    before = {n: (p.grad, p.grad.clone()) for n, p in model.named_parameters() if p.grad is not None}
    preconditioned(model).step()
    for name, parameter in model.named_parameters():
        if name in before:
            assert parameter.grad is before[name][0]
            assert torch.equal(parameter.grad, before[name][1])


def test_a_closure_is_called_once() -> None:
    model, calls = adapted(), []

    def closure() -> float:
        calls.append(1)
        loss = loss_of(model)
        loss.backward()
        return float(loss.detach())

    assert preconditioned(model).step(closure) > 0
    assert len(calls) == 1


@pytest.mark.parametrize("make", [preconditioned, lambda m: torch.optim.AdamW(hs.lora_plus_groups(m, 1e-2))])
def test_a_run_goes_on_to_the_bit_from_plain_saved_state(make: Maker, tmp_path: Path) -> None:
    model = adapted()
    optimizer = make(model)
    steps(model, optimizer, 2)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    other = adapted()
    other.load_state_dict(model.state_dict())
    again = make(other)
    again.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    twin, thing = copy.deepcopy((other, again))
    wanted = steps(model, optimizer, 2)
    for found in (steps(other, again, 2), steps(twin, thing, 2)):
        assert all(torch.equal(found[name], value) for name, value in wanted.items())


# ------------------------------------------------------------------ PEFT


def in_peft(base: nn.Module, config: hs.LoraConfig) -> Any:
    pytest.importorskip("peft", reason="the extra headstart[train]")
    from headstart.peft import get_peft_model

    return get_peft_model(base, config)


def in_plain_peft(base: nn.Module, config: hs.LoraConfig) -> Any:
    """PEFT's own model, with the factors that ours has."""
    peft = pytest.importorskip("peft", reason="the extra headstart[train]")
    if config.target_parameters and Version(peft.__version__) < Version("0.20"):
        pytest.skip("before 0.20 PEFT read (e, out, in) as (e, in, out)")

    ours = in_peft(copy.deepcopy(base), config)
    fields = ("r", "lora_alpha", "target_modules", "target_parameters", "bias", "use_dora", "modules_to_save")
    theirs: Any = peft.get_peft_model(base, peft.LoraConfig(**{name: getattr(config, name) for name in fields}))
    theirs.load_state_dict(ours.state_dict(), strict=False)
    return theirs


def named(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """By the names of the native shell."""
    plain = {n.removeprefix("base_model.model.").replace(".default", ""): v for n, v in values.items()}
    return {n.replace("modules_to_save", "trained").removesuffix(".weight"): v for n, v in plain.items()}


@pytest.mark.parametrize("shell", [in_peft, in_plain_peft])
def test_on_a_peft_model_the_steps_are_the_native_ones(shell: Maker) -> None:
    torch.manual_seed(0)
    base = Small()
    base.convolved = nn.Conv1d(4, 6, 3)  # in PEFT's grouped convolutions A sees all channels: another model
    config = hs.LoraConfig(r=3, lora_alpha=4, init_lora_weights="random", bias="none", **TARGETS)
    native, model = hs.adapt(copy.deepcopy(base), config).model.double(), shell(copy.deepcopy(base), config).double()
    torch.testing.assert_close(loss_of(model), loss_of(native))
    wanted = named(steps(native, preconditioned(native, damping=0.01), 3))
    found = named(steps(model, preconditioned(model, damping=0.01), 3))
    torch.testing.assert_close(loss_of(model), loss_of(native), rtol=1e-9, atol=0)
    for name, value in wanted.items():
        if "experts" not in name and not name.startswith("lora"):  # which lie there in another order
            torch.testing.assert_close(found[name].reshape(value.shape), value, rtol=1e-8, atol=1e-10, msg=name)


def test_pefts_own_grouped_convolution_is_served_group_by_group() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(nn.Sequential(nn.Conv1d(4, 6, 3, groups=2)), peft.LoraConfig(r=4, target_modules=["0"]))
    (layer,) = (m for m in model.modules() if isinstance(m, peft.tuners.lora.layer.Conv1d))
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert A.shape[0] // B.shape[1] == 2, "PEFT convolves B by groups, and A not"
    nn.init.normal_(B)
    model.double()(torch.randn(5, 4, 7).double()).square().sum().backward()
    start = A.detach().clone()
    h, _ = directions(
        *(t.detach().double().numpy().reshape(len(t), -1) for t in (A[:2], B[:3], A.grad[:2], B.grad[:3])),
        share(*(t.detach().double().numpy().reshape(len(t), -1) for t in (A[:2], B[:3])), 0.1),
    )
    preconditioned(model, lr=1e9, betas=(0.0, 0.0), eps=1e9).step()
    torch.testing.assert_close((start - A.detach())[:2].flatten(1), torch.from_numpy(h), rtol=1e-5, atol=1e-5)


def test_it_agrees_with_pefts_where_the_damping_is_the_same_number() -> None:
    """PEFT adds an absolute number: over one step, and for one layer, it can be chosen to be our share."""
    riemannian = pytest.importorskip("peft.optimizers.riemannian", reason="PEFT from 0.21")
    base = nn.Sequential(nn.Linear(8, 6))
    config = hs.LoraConfig(r=3, target_modules=["0"], init_lora_weights="random")
    ours, theirs = in_plain_peft(copy.deepcopy(base), config), in_plain_peft(copy.deepcopy(base), config)
    A, B = (p.detach().double().numpy() for n, p in ours.named_parameters() if "lora" in n)
    x = torch.randn(9, 8)
    found = steps(ours, preconditioned(ours, 1e-2, damping=0.3), 1, lambda model: model(x).square().sum())
    peer = riemannian.create_riemannian_optimizer(
        theirs, torch.optim.AdamW, lr=1e-2, reg=share(A, B, 0.3), weight_decay=0.0
    )
    wanted = steps(theirs, peer, 1, lambda model: model(x).square().sum())
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-5)


# ------------------------------------------------------------------ LoRA+


def bare(base: nn.Module, config: hs.LoraConfig) -> Any:
    return hs.adapt(base, config).model


@pytest.mark.parametrize("shell", [bare, in_peft, in_plain_peft])
def test_everything_that_trains_stands_in_one_group(shell: Maker) -> None:
    config = hs.LoraConfig(
        r=2, bias="all", use_dora=True, modules_to_save=["head"], **{**TARGETS, "target_parameters": None}
    )
    model = shell(Small(), config)
    names = {id(p): n for n, p in model.named_parameters() if p.requires_grad}
    for groups in (hs.lora_plus_groups(model, 1e-3, 8.0, 1e-5, 0.1), hs.preconditioned_groups(model, 1e-3, 0.1)):
        listed = [id(p) for group in groups for p in group["params"]]
        assert sorted(listed) == sorted(names)
        for group in groups:
            assert group["weight_decay"] == (0.0 if group["name"] == "vectors" else 0.1)
            flat = [names[id(p)] for p in group["params"] if p.numel() == max(p.shape)]
            assert group["name"] == "vectors" or all("convolved.lora_B" in name for name in flat), "of rank one each"
    found = {group["name"]: group for group in hs.lora_plus_groups(model, 1e-3, 8.0, 1e-5, 0.1)}
    assert {name: group["lr"] for name, group in found.items()} == pytest.approx(
        {"A": 1e-3, "B": 8e-3, "embedding": 1e-5, "other": 1e-3, "vectors": 1e-3}
    )
    held = {name: [names[id(p)] for p in group["params"]] for name, group in found.items()}
    assert [name.split("lora_A")[0][-10:] for name in held["A"]] == [n.split("lora_B")[0][-10:] for n in held["B"]]
    assert all("lora_embedding" in name for name in held["embedding"])
    assert len(held["embedding"]) == 2
    assert all("head" in name for name in held["other"])
    assert any("magnitude" in name for name in held["vectors"])
    assert any("bias" in name for name in held["vectors"])


def test_b_moves_sixteen_times_as_far() -> None:
    A, B = torch.randn(2, 6), torch.randn(5, 2)
    model = one_linear(A, B)
    optimizer = torch.optim.AdamW(hs.lora_plus_groups(model, 1e-3), eps=1e-12)
    steps(model, optimizer, 1, lambda model: model(torch.randn(4, 6)).square().sum())
    moved = [(factor - start).abs().mean().item() for factor, start in zip(model[0].factors, (A, B), strict=True)]
    assert moved == pytest.approx([1e-3, 1.6e-2], rel=1e-3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: hs.lora_plus_groups(nn.Linear(2, 2), 1e-3), AdapterState, "no LoRA factor of this model trains"),
        (lambda m: hs.preconditioned_groups(m.requires_grad_(False), 1e-3), AdapterState, "no LoRA factor"),
        (lambda m: hs.lora_plus_groups(m, 1e-3, ratio=0), BadOption, "ratio is 0: choose a positive number"),
        (lambda m: hs.preconditioned_groups(m, math.nan), BadOption, "lr is nan"),
        (lambda m: preconditioned(m, damping=-1.0), BadOption, "damping is -1.0"),
        (lambda m: preconditioned(m, betas=(0.9, 1.0)), BadOption, r"betas are \(0.9, 1.0\)"),
        (lambda m: preconditioned(m, eps=-1.0), BadOption, "eps is -1.0"),
        (lambda m: hs.preconditioned_groups(m, 1e-3, weight_decay=-1.0), BadOption, "weight_decay is -1.0"),
        (lambda m: hs.lora_plus_groups(m, 1e-3, weight_decay=math.nan), BadOption, "weight_decay is nan"),
        (lambda m: hs.PreconditionedAdamW(m.parameters()), BadOption, "preconditioned_groups"),
        (lambda m: hs.PreconditionedAdamW(hs.lora_plus_groups(m, 1e-3)), BadOption, "preconditioned_groups"),
    ],
)
def test_what_cannot_be_meant_is_refused(call: Maker, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(adapted())


# ------------------------------------------------------------------ several processes


def worker(rank: int, port: int) -> None:
    """One of two processes: replicated, then sharded, against all of the batch in one."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
        alone = layered()
        wanted = steps(alone, preconditioned(alone), 3, lambda model: model(x).square().mean())
        for sharded in (False, True):
            model: Any = layered()
            model = (
                fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
                if sharded
                else nn.parallel.DistributedDataParallel(model)
            )
            half = x.chunk(2)[rank]
            found = steps(model, preconditioned(model), 3, lambda model, half=half: model(half).square().mean())
            for name, value in found.items():
                value = value.full_tensor() if sharded else value  # type: ignore[attr-defined]
                torch.testing.assert_close(value, wanted[name.removeprefix("module.")], rtol=1e-4, atol=1e-5, msg=name)
    finally:
        dist.destroy_process_group()


def layered() -> nn.Module:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    return hs.adapt(base, hs.LoraConfig(r=3, target_modules=["0", "2"], init_lora_weights="random", bias="all")).model


def test_two_processes_step_as_one() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(worker, (port,), nprocs=2)


# ------------------------------------------------------------------ Trainer and the command line


@pytest.fixture
def recipe(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Maker:
    """A config of a small run; fields override it."""
    pytest.importorskip("trl", reason="the extra headstart[train]")
    import datasets

    from headstart.tune.recipe import resolve

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "sums.txt"
    path.write_text("".join(f"{i} and {i + 1} is {2 * i + 1}\n" for i in range(24)), encoding="utf-8")
    small = {"model": str(checkpoint), "data": str(path), "r": 4, "steps": 6, "batch_size": 4, "save_every": 3}
    small |= {"learning_rate": 1e-2, "eval_fraction": 0, "dtype": "float32", "warmup": 0, "weight_decay": 0.01}
    return lambda **fields: resolve(small, fields)


@pytest.mark.parametrize("optimizer", ["adamw", "lora_plus", "preconditioned"])
def test_a_run_goes_on_from_a_checkpoint_to_the_bit(optimizer: str, recipe: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file
    from transformers import TrainerCallback

    from headstart.tune.train import run

    seen: list[Any] = []

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **others: Any) -> None:
            seen[:] = optimizer.param_groups

    whole = run(recipe(optimizer=optimizer, output=str(tmp_path / "whole")), lambda line: None, [Watch()])
    rates = {group.get("name"): group["initial_lr"] for group in seen}
    assert (
        rates
        == {
            "adamw": {None: 1e-2},
            "lora_plus": {"A": 1e-2, "B": pytest.approx(0.16)},
            "preconditioned": {"pairs": 1e-2},
        }[optimizer]
    )
    middle = str(tmp_path / "whole" / "checkpoints" / "checkpoint-3")
    again = run(recipe(optimizer=optimizer, output=str(tmp_path / "again"), resume=middle), lambda line: None)
    assert again.loss == whole.loss
    ends = [load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("whole", "again")]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_an_option_of_another_optimizer_is_refused(recipe: Any) -> None:
    assert recipe(optimizer="lora_plus", lora_plus_ratio=4).lora_plus_ratio == 4
    with pytest.raises(BadOption, match=r"lora_plus_ratio is 4: it belongs to --optimizer lora_plus"):
        recipe(lora_plus_ratio=4)
    with pytest.raises(BadOption, match=r"damping is 0\.5: it belongs to --optimizer preconditioned"):
        recipe(optimizer="lora_plus", damping=0.5)
    with pytest.raises(BadOption, match="did you mean 'lora_plus'"):
        recipe(optimizer="lora_pluss")


def test_trainer_takes_it_as_it_is(llama: Maker, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = hs.adapt(llama(), hs.LoraConfig(r=4, target_modules=["q_proj", "down_proj"])).model
    rows = [{"input_ids": row, "labels": row} for row in torch.arange(3, 99).reshape(4, 24)]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=4, logging_steps=1, save_strategy="no",
        report_to="none", use_cpu=True, disable_tqdm=True, lr_scheduler_type="constant",
    )  # fmt: skip
    optimizer = preconditioned(model, 3e-2)
    trainer = transformers.Trainer(model, arguments, train_dataset=rows, optimizers=(optimizer, None))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.02

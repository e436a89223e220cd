r"""Optimizers that know which parameters are the two factors of one branch: LoRA+ and a preconditioned AdamW.

    LoRA+              lr(B) = λ·lr(A)                                lr: of any optimizer
    preconditioned     h_A = (BᵀB + d·I)⁻¹·g_A                        g_A, h_A: (r, n)
                       h_B = g_B·(AAᵀ + d·I)⁻¹                        g_B, h_B: (m, r)
                       d   = δ·(tr BᵀB + tr AAᵀ)/2r                   δ: the damping, a pure number
    and AdamW on h in the place of g: moments, bias correction, decoupled weight decay

A gradient step on the factors moves B·A by −η·s²·(B·Bᵀ·G + G·Aᵀ·A): directions in which a factor is small hardly learn.
The preconditioner makes that −η·(P_B·G + G·P_A), P the projectors onto the factors' spaces: what the product learns
depends neither on its condition number nor on how it is split.

**Damping.** BᵀB = 0 wherever LoRA starts with B = 0. An absolute number has the unit of a squared factor and fits one
scale: 10⁻⁶, the authors' code, lets A's gradient grow 500-fold while B leaves zero, a peak that Adam's second moment
remembers for a thousand steps in which A stands still; 10⁻², PEFT's, exceeds all of LoRA-One's start, where BᵀB is at
most 1/128. A share of BᵀB alone vanishes with it. Here d is a share of the mean square of *both* factors, which are
never both zero: next to a random A it lets A's gradient grow 4-fold and no more, and where A is the factor that starts
at zero, as in embeddings, the same holds with the roles exchanged. δ = 0.1 leaves condition numbers to about 30 alone;
0.01 is faster on a long noiseless run, slower on a short noisy one. To d belongs what rounding can take from an
eigenvalue, so that no Cholesky factorisation fails.

Both gradients see the factors from before the step. s is not divided out: Adam cancels it.

Hayou, Ghosh, Yu (2024), "LoRA+: Efficient Low Rank Adaptation of Large Models", arXiv 2402.12354.
Zhang, Pilanci (2024), "Riemannian Preconditioned LoRA for Fine-Tuning Foundation Models", arXiv 2402.02347; Zhang, Liu,
Chen (2025), arXiv 2502.01235 (LoRA-One), equation 9. The authors' code updates A before it preconditions B, and leaves
Adam's bias correction out.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from headstart.errors import AdapterState, BadOption
from headstart.lora import matrix
from headstart.lora.layers import LoraLayer
from headstart.lora.layouts import Convolution, Experts, Layout, Pair, Parts

Group = dict[str, Any]

_FACTORS = {"lora_A": "A", "lora_B": "B", "lora_embedding_A": "embedding", "lora_embedding_B": "embedding"}
_NOTHING = "no LoRA factor of this model trains: adapt it first, or, where only a core trains, use plain AdamW"


def lora_plus_groups(
    model: nn.Module, lr: float, ratio: float = 16.0, embedding_lr: float = 1e-6, weight_decay: float = 0.0
) -> list[Group]:
    """Parameter groups for any torch optimizer, in which B learns faster than A.

    The argument for it is a start with B = 0 and A random, where A's gradient is small and B has far to go. Starts
    whose factors are balanced (PiSSA, LoRA-GA, LoRA-One and the other anchored ones) have no such asymmetry: use one
    rate for both there. In embeddings the roles are exchanged, as in loralib: A (r, V) starts at zero and B is random;
    both take `embedding_lr`, as in the authors' code.

    Args:
        model: an adapted model: ours, ours on a PeftModel, or PEFT's own.
        lr: for A, and for whatever else trains. The authors lower it by about a half.
        ratio: λ, B's rate over A's.
        embedding_lr: for both factors of embeddings.
        weight_decay: of matrices. Biases, norms and DoRA's magnitudes never decay.

    Returns:
        Groups with a "name": A, B, embedding, other, vectors; those without a parameter are left out.

    Raises:
        BadOption: for a rate or a ratio that is no positive number.
        AdapterState: where no factor trains.

    Example:
        >>> from headstart import LoraConfig, adapt
        >>> model = adapt(nn.Sequential(nn.Linear(8, 4)), LoraConfig(r=2, target_modules=["0"])).model
        >>> {group["name"]: group["lr"] for group in lora_plus_groups(model, lr=1e-4, ratio=16)}
        {'A': 0.0001, 'B': 0.0016}
    """
    # Deviation: biases and norms take A's rate. The authors' code gives them B's, which the paper does not argue for.
    rates = {"A": lr, "B": lr * ratio, "embedding": embedding_lr, "other": lr, "vectors": lr}
    _check_rates(lr=lr, ratio=ratio, embedding_lr=embedding_lr)
    _check_from_zero(weight_decay=weight_decay)
    members: dict[str, list[nn.Parameter]] = {name: [] for name in rates}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            members[_role(name, parameter)].append(parameter)
    if not members["A"] and not members["B"] and not members["embedding"]:
        raise AdapterState(_NOTHING)
    return [
        {"params": members[name], "lr": rate, "weight_decay": _decay(name, weight_decay), "name": name}
        for name, rate in rates.items()
        if members[name]
    ]


def preconditioned_groups(model: nn.Module, lr: float, weight_decay: float = 0.0) -> list[Group]:
    """Parameter groups for `PreconditionedAdamW`: the pairs, marked as such, and whatever else trains.

    A pair of which one factor is frozen is listed whole: the other is still preconditioned by it.

    Args:
        model: an adapted model: ours, ours on a PeftModel, or PEFT's own.
        lr: for all of them.
        weight_decay: of matrices. Biases, norms and DoRA's magnitudes never decay.

    Raises:
        BadOption: for a rate that is no positive number.
        AdapterState: where no factor trains.
    """
    _check_rates(lr=lr)
    _check_from_zero(weight_decay=weight_decay)
    pairs = list(_pairs(model))
    if not pairs:
        raise AdapterState(_NOTHING)
    members: dict[str, list[nn.Parameter]] = {"other": [], "vectors": []}
    paired = {id(parameter) for _, factors in pairs for parameter in factors}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in paired:
            members["vectors" if _role(name, parameter) == "vectors" else "other"].append(parameter)
    groups: list[Group] = [
        {
            "params": [p for _, factors in pairs for p in factors],
            "name": "pairs",
            "layouts": [layout for layout, _ in pairs],
        },
        *({"params": found, "name": name} for name, found in members.items() if found),
    ]
    return [{**group, "lr": lr, "weight_decay": _decay(group["name"], weight_decay)} for group in groups]


def _role(name: str, parameter: Tensor) -> str:
    # A magnitude of PEFT's convolutions is (1, m, 1, 1). PEFT's `lora_bias` stands below lora_B.
    factor = next((_FACTORS[part] for part in name.split(".") if part in _FACTORS), None)
    if factor is not None and parameter.ndim > 1:
        return factor
    return "vectors" if parameter.numel() == max(parameter.shape, default=1) else "other"


def _decay(name: str, weight_decay: float) -> float:
    return 0.0 if name == "vectors" else weight_decay


def _check_rates(**values: float) -> None:
    for name, value in values.items():
        if not (math.isfinite(value) and value > 0):
            raise BadOption(f"{name} is {value!r}: choose a positive number")


def _check_from_zero(**values: float) -> None:
    for name, value in values.items():
        if not (math.isfinite(value) and value >= 0):
            raise BadOption(f"{name} is {value!r}: choose a number from 0")


def _pairs(model: nn.Module) -> Iterator[tuple[Layout, tuple[nn.Parameter, nn.Parameter]]]:
    """The factors of every branch of which at least one trains, and how they are stored."""
    parameters = dict(model.named_parameters())
    for name, A in parameters.items():
        parts = name.split(".")
        found = [i for i, part in enumerate(parts) if part in ("lora_A", "lora_embedding_A")]
        if not found or A.ndim < 2:
            continue
        at = found[-1]
        B = parameters.get(".".join([*parts[:at], parts[at][:-1] + "B", *parts[at + 1 :]]))
        if B is not None and (A.requires_grad or B.requires_grad):
            yield _layout(model.get_submodule(".".join(parts[:at])), A, B), (A, B)


class _PeftExperts(Experts):
    """Experts as PEFT keeps them, A (e·r, n) and B (m, r·e), seen as one batch."""

    def unpack(self, A: Tensor, B: Tensor) -> list[Pair]:
        return [self.from_file(A, B)]

    def pack(self, pairs: Iterable[Pair]) -> Pair:
        ((A, B),) = pairs
        return self.to_file(A, B)


def _layout(layer: nn.Module, A: Tensor, B: Tensor) -> Layout:
    """How the factors of a layer, ours or PEFT's, are stored."""
    library = sys.modules.get("peft.tuners.lora.layer")
    if library is not None and isinstance(layer, library.ParamWrapper):
        return _PeftExperts(count=layer.num_experts)
    if isinstance(layer, LoraLayer) and isinstance(layer.layout, Parts):
        return layer.layout
    if isinstance(layer, LoraLayer) and isinstance(layer.layout, Experts):
        return Layout()  # (e, r, n) and (e, m, r) are a batch as they are.
    if A.ndim > 2:
        # By their shapes, so that PEFT's are understood too: in those of several groups A sees all channels.
        groups = A.shape[0] // B.shape[1]
        return Convolution(groups=groups, channels=groups * A.shape[1], kernel=tuple(A.shape[2:]))
    return Layout()


def precondition(factors: Pair, gradients: Pair, damping: float) -> Pair:
    """The gradients of one pair, or a batch of pairs, in the metric that the other factor gives.

    Args:
        factors: A (…, r, n) and B (…, m, r).
        gradients: of the same shapes.
        damping: δ ≥ 0.

    Returns:
        (BᵀB + d·I)⁻¹·g_A and g_B·(AAᵀ + d·I)⁻¹, in float32, or float64 where the factors have it.

    Example:
        >>> A, B, G = torch.eye(2), torch.zeros(3, 2), torch.ones(3, 2)
        >>> h_A, h_B = precondition((A, B), (B.T @ G, G @ A.T), damping=0.02)
        >>> h_A.abs().max().item(), round(h_B[0, 0].item(), 4)
        (0.0, 0.9901)
    """
    dtype = torch.promote_types(torch.promote_types(factors[0].dtype, factors[1].dtype), torch.float32)
    (A, B), (g_A, g_B) = (tuple(t.to(dtype) for t in pair) for pair in (factors, gradients))
    of_A, of_B = A @ A.mT, B.mT @ B
    rank, limits = A.shape[-2], torch.finfo(dtype)
    mean_square = (of_A.diagonal(dim1=-2, dim2=-1) + of_B.diagonal(dim1=-2, dim2=-1)).mean(-1) / 2
    # Rounding moves eigenvalues of a Gram matrix by a few eps of its trace.
    d = (damping + 8 * rank * limits.eps) * mean_square + limits.tiny
    shift = torch.diag_embed(d[..., None].expand(*d.shape, rank))
    return _solve(of_B + shift, g_A), _solve(of_A + shift, g_B.mT).mT


def _solve(gram: Tensor, right: Tensor) -> Tensor:
    # Not linalg.cholesky, which waits for the device to see whether it failed.
    return torch.cholesky_solve(right, torch.linalg.cholesky_ex(gram)[0])


class PreconditionedAdamW(torch.optim.Optimizer):
    """AdamW on gradients that each factor's partner preconditions (scaled, or Riemannian, AdamW).

    It goes with LoRA-One, whose theorems need it, and serves every other start. What belongs to no pair gets plain
    AdamW. Adam divides by each entry's own size, which undoes a diagonal preconditioner: right after a start from a
    singular value decomposition, where both Gram matrices are diagonal, the step is AdamW's; the two part as training
    turns the factors.

    Args:
        groups: from `preconditioned_groups(model, lr)`.
        lr: for groups that name none.
        betas: AdamW's.
        eps: AdamW's.
        weight_decay: AdamW's, for groups that name none.
        damping: δ; 0 for as little as rounding allows.

    Raises:
        BadOption: where no group holds pairs, or a number cannot be meant.

    Example:
        A loop, or transformers' and TRL's trainers with `optimizers=(optimizer, None)`:

        >>> from headstart import LoraConfig, adapt
        >>> model = adapt(nn.Sequential(nn.Linear(8, 4)), LoraConfig(r=2, target_modules=["0"])).model
        >>> optimizer = PreconditionedAdamW(preconditioned_groups(model, lr=1e-3))
        >>> model(torch.ones(1, 8)).sum().backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        groups: Iterable[Group],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        damping: float = 0.1,
    ) -> None:
        _check_rates(lr=lr)
        _check_from_zero(damping=damping, eps=eps, weight_decay=weight_decay)
        if not all(0 <= beta < 1 for beta in betas):
            raise BadOption(f"betas are {betas!r}: choose two numbers from 0 up to, not with, 1")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "damping": damping}
        super().__init__(groups, defaults)
        if not any(group["layouts"] for group in self.param_groups):
            raise BadOption("no group holds pairs of factors: make the groups with preconditioned_groups(model, lr)")

    def add_param_group(self, param_group: Group) -> None:
        super().add_param_group({"layouts": [], **param_group})

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step; all gradients are preconditioned by the factors before it."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            gradients = self._gradients(group)
            trained = [parameter for parameter in group["params"] if parameter.grad is not None]
            states = [self._state(parameter) for parameter in trained]
            adamw(
                trained,
                [gradients[parameter] for parameter in trained],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],
                [state["step"] for state in states],
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )
        return loss

    def _gradients(self, group: Group) -> dict[Tensor, Tensor]:
        """What AdamW is to see of each parameter of a group."""
        if not group["layouts"]:
            return {parameter: parameter.grad for parameter in group["params"] if parameter.grad is not None}
        found: dict[Tensor, Tensor] = {}
        factors = iter(group["params"])
        for layout, A, B in zip(group["layouts"], factors, factors, strict=True):
            if A.grad is None and B.grad is None:
                continue
            given = [torch.zeros_like(p) if p.grad is None else p.grad for p in (A, B)]
            w_A, w_B, g_A, g_B = (matrix.whole(tensor.detach()) for tensor in (A, B, *given))
            pairs = zip(layout.unpack(w_A, w_B), layout.unpack(g_A, g_B), strict=True)
            packed = layout.pack([precondition(*both, group["damping"]) for both in pairs])
            for parameter, gradient in zip((A, B), packed, strict=True):
                found[parameter] = _as(gradient, parameter)
        return found

    def _state(self, parameter: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        return state

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and tensors: the layouts are the model's, and come back with it."""
        state = super().state_dict()
        for group in state["param_groups"]:
            group.pop("layouts")
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        layouts = [group["layouts"] for group in self.param_groups]
        super().load_state_dict(dict(state_dict))
        for group, kept in zip(self.param_groups, layouts, strict=True):
            group["layouts"] = kept


def _as(whole: Tensor, parameter: Tensor) -> Tensor:
    """A result in the parameter's shape and dtype, and sharded as it is."""
    whole = whole.to(parameter.dtype).reshape(parameter.shape)
    if not matrix.is_sharded(parameter):
        return whole
    from torch.distributed.tensor import DTensor, Replicate

    assert isinstance(parameter, DTensor)
    mesh = parameter.device_mesh
    everywhere = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return everywhere.redistribute(mesh, parameter.placements)

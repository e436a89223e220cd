"""The two problems of the paper, its starts, and its two kinds of descent. In the project's letters throughout:

    y = (W + B·A)·x        Δ: (m, n) the change to be learnt, of rank r*        X: (N, n) standard normal inputs
    G = −∇L(W): (m, n)     the negative gradient at the pretrained weight       C = XᵀX/N

The paper writes these transposed: its A is our Aᵀ, on the inputs' side, and its B is our Bᵀ.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

Gradient = Callable[[Tensor], Tensor]
Step = tuple[Tensor, Tensor, Tensor]
DOUBLE = torch.float64


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, generator: torch.Generator) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=DOUBLE)


def low_rank(d: int, spectrum: Tensor, generator: torch.Generator) -> Tensor:
    """Δ = P·diag(spectrum)·Qᵀ with random orthonormal P and Q."""
    P, Q = (torch.linalg.qr(normal(d, len(spectrum), generator=generator))[0] for _ in "PQ")
    change: Tensor = (P * spectrum) @ Q.T
    return change


def spread(condition: float, rank: int = 4) -> Tensor:
    """`rank` singular values from 1 down to 1/κ, in equal ratios."""
    return torch.logspace(0, -math.log10(condition), rank, dtype=DOUBLE)


@dataclass(frozen=True)
class Linear:
    """L = ‖X·(B·A − Δ)ᵀ‖²/2N, section 3 of the paper: the gradient needs C alone.

    Attributes:
        change: Δ. moment: C, (n, n).
    """

    change: Tensor
    moment: Tensor

    @classmethod
    def draw(cls, d: int, samples: int, spectrum: Tensor, seed: int) -> Linear:
        generator = seeded(seed)
        change, X = low_rank(d, spectrum, generator), normal(samples, d, generator=generator)
        return cls(change, X.T @ X / samples)

    def gradient(self, change: Tensor) -> Tensor:
        return (change - self.change) @ self.moment

    def risk(self, change: Tensor) -> float:
        """½‖B·A − Δ‖², the loss over all inputs."""
        return float((change - self.change).square().sum()) / 2


@dataclass(frozen=True)
class Relu:
    """L = ‖max(0, X·(W + B·A)ᵀ) − Y‖²/2N, section 4: half the inputs reach each output, so that G ≈ Δ/2."""

    change: Tensor
    weight: Tensor
    inputs: Tensor

    @classmethod
    def draw(cls, d: int, samples: int, spectrum: Tensor, seed: int) -> Relu:
        generator = seeded(seed)
        weight, change = normal(d, d, generator=generator), low_rank(d, spectrum, generator)
        return cls(change, weight, normal(samples, d, generator=generator))

    def gradient(self, change: Tensor) -> Tensor:
        before = self.inputs @ (self.weight + change).T
        wanted = (self.inputs @ (self.weight + self.change).T).relu()
        return ((before.relu() - wanted) * (before > 0)).T @ self.inputs / len(self.inputs)

    def error(self, change: Tensor) -> float:
        """‖B·A − Δ‖/‖Δ‖, Frobenius."""
        return float((change - self.change).norm() / self.change.norm())


# --- starts


@dataclass(frozen=True)
class Start:
    """Two factors, and whether their product is taken away again, so that the function does not move."""

    A: Tensor
    B: Tensor
    anchored: bool = False


def spectral(G: Tensor, rank: int, gamma: float = 1.0) -> Start:
    """B₀ = √γ·U_r·√S_r, A₀ = √γ·√S_r·V_rᵀ: the theorems' start. γ = 2 behind a ReLU."""
    U, S, Vt = torch.linalg.svd(G)
    root = (gamma * S[:rank]).sqrt()
    return Start(root[:, None] * Vt[:rank], U[:, :rank] * root)


def algorithm_1(G: Tensor, rank: int, gamma: float) -> Start:
    """B₀ = U_r·√(S_r/S₁)/√γ and A₀ alike: what the paper runs on language models, and what `lora_one` is."""
    U, S, Vt = torch.linalg.svd(G)
    root = (S[:rank] / (S[0] * gamma)).sqrt()
    return Start(root[:, None] * Vt[:rank], U[:, :rank] * root)


def january(G: Tensor, rank: int, gamma: float) -> Start:
    """The first version of LoRA-One: B₀ = m^¼/√γ·U_r, A₀ = m^¼/√γ·V_rᵀ, taken away from W."""
    U, _, Vt = torch.linalg.svd(G)
    scale = len(G) ** 0.25 / gamma**0.5
    return Start(scale * Vt[:rank], scale * U[:, :rank], anchored=True)


def lora_ga(G: Tensor, rank: int, gamma: float) -> Start:
    """LoRA-GA: A₀ takes the first r directions and B₀ the next r, both scaled by m^¼/√γ, taken away from W."""
    U, _, Vt = torch.linalg.svd(G)
    scale = len(G) ** 0.25 / gamma**0.5
    return Start(scale * Vt[:rank], scale * U[:, rank : 2 * rank], anchored=True)


def random(rank: int, shape: torch.Size, size: float, generator: torch.Generator) -> Start:
    """A₀ normal with standard deviation `size`, B₀ = 0: plain LoRA."""
    m, n = shape
    return Start(size * normal(rank, n, generator=generator), torch.zeros(m, rank, dtype=DOUBLE))


# --- descent


def descend(gradient: Gradient, start: Start, eta: float, damping: float | None = None) -> Iterator[Step]:
    """A, B and the change of the weight, before each step. With a damping λ, preconditioned (equation 9):

    A ← A − η·(BᵀB + λ·I)⁻¹·BᵀG,    B ← B − η·GAᵀ·(AAᵀ + λ·I)⁻¹
    """
    A, B = start.A, start.B
    away = B @ A if start.anchored else torch.zeros_like(B @ A)
    while True:
        change = B @ A - away
        yield A, B, change
        G = gradient(change)
        to_A, to_B = B.T @ G, G @ A.T
        if damping is not None:
            damp = damping * torch.eye(len(A), dtype=DOUBLE)
            to_A, to_B = torch.linalg.solve(B.T @ B + damp, to_A), torch.linalg.solve(A @ A.T + damp, to_B.T).T
        A, B = A - eta * to_A, B - eta * to_B


def lora_sb(gradient: Gradient, G: Tensor, rank: int, eta: float) -> Iterator[Step]:
    """LoRA-SB: U_r and V_rᵀ of the gradient stay, and only the r×r core R between them learns, from R₀ = S_r.

    Here from the exact gradient, where the paper takes its signs: the best that this start can be.
    """
    U, S, Vt = torch.linalg.svd(G)
    A, B, R = Vt[:rank], U[:, :rank], S[:rank].diag()
    while True:
        change = B @ R @ A
        yield A, B, change
        R = R - eta * (B.T @ gradient(change) @ A.T)

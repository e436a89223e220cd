"""Each start again, dense and in float64 NumPy, straight from its paper: slow, obvious, and sharing no code with ours.

product(name, W, r)     s·B₀·A₀, where a paper fixes it                                  (m, n)

The starts that look at data take its rows: X (T, n) the inputs, D (T, m) the gradients of the outputs, G (m, n).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]


def pissa(W: Matrix, r: int) -> Matrix:
    """Equations 2 and 3: the r leading terms of the singular value decomposition."""
    U, S, Vt = np.linalg.svd(W, full_matrices=False)
    return sum((S[i] * np.outer(U[:, i], Vt[i]) for i in range(r)), np.zeros_like(W))


def milora(W: Matrix, r: int) -> Matrix:
    """The r trailing terms of it."""
    U, S, Vt = np.linalg.svd(W, full_matrices=False)
    return sum((S[i] * np.outer(U[:, i], Vt[i]) for i in range(len(S) - r, len(S))), np.zeros_like(W))


def olora(W: Matrix, r: int) -> Matrix:
    """The QR of all of W, cut to r."""
    Q, R = np.linalg.qr(W)
    return Q[:, :r] @ R[:r]


def loram(W: Matrix, r: int) -> Matrix:
    """Sine bases entry by entry, and the magnitude from mean squares of dense matrices."""
    m, n = W.shape

    def basis(d: int) -> Matrix:
        size = math.sqrt(2 / (d + 1))
        return np.array([[size * math.sin((i + 1) * (j + 1) * math.pi / (d + 1)) for j in range(r)] for i in range(d)])

    outer = basis(m) @ basis(n).T
    gain = math.log(r, min(m, n))
    beta = (gain * np.mean(W**2) / np.mean(outer**2)) ** 0.25
    return beta**2 * outer


def mica(W: Matrix, r: int) -> Matrix:
    """Not the product, which is zero, but the projector onto the frozen B: U_b·U_bᵀ, U_b the r last left vectors."""
    U, _, _ = np.linalg.svd(W, full_matrices=False)
    return U[:, -r:] @ U[:, -r:].T


PRODUCTS: dict[str, Callable[[Matrix, int], Matrix]] = {
    "pissa": pissa,
    "milora": milora,
    "olora": olora,
    "loram": loram,
}


def eva(X: Matrix, r: int) -> tuple[Matrix, Matrix, Matrix]:
    """V_r (n, r), the singular values σ of the centred rows, and the shares of the variance."""
    _, S, Vt = np.linalg.svd(X - X.mean(axis=0), full_matrices=False)
    return Vt[:r].T, S[:r], (S**2 / np.sum(S**2))[:r]


def corda(W: Matrix, X: Matrix, r: int, mode: str = "ipm", damping: float = 0.01) -> Matrix:
    """As the paper writes it, with the inverse of C."""
    C = sum(np.outer(x, x) for x in X) / len(X)
    C = C + damping * np.mean(np.diag(C)) * np.eye(len(C))
    U, S, Vt = np.linalg.svd(W @ C, full_matrices=False)
    V_hat = Vt @ np.linalg.inv(C)
    kept = slice(0, r) if mode == "ipm" else slice(len(S) - r, len(S))
    return U[:, kept] @ np.diag(S[kept]) @ V_hat[kept]


def tara(W: Matrix, X: Matrix, D: Matrix, r: int, c: float = 0.01) -> Matrix:
    """Both metrics put on, the spectrum cut, and both taken off again by their inverses."""

    def metric(rows: Matrix) -> Matrix:
        sigma = rows.T @ rows / len(rows)
        return sigma + c * np.linalg.svd(sigma, compute_uv=False).mean() * np.eye(len(sigma))

    left, right = metric(D), metric(X)
    U, S, Vt = np.linalg.svd(left @ W @ right)
    return np.linalg.inv(left) @ (U[:, :r] @ np.diag(S[:r]) @ Vt[:r]) @ np.linalg.inv(right)


def sc_lora(W: Matrix, new: Matrix, old: Matrix, r: int, beta: float) -> Matrix:
    """From the outputs of every token."""
    learn, keep = new @ W.T, old @ W.T
    M = (1 - beta) * learn.T @ learn / len(learn) - beta * keep.T @ keep / len(keep)
    values, vectors = np.linalg.eigh(M)
    Q = vectors[:, np.argsort(values)[::-1][:r]]
    return Q @ Q.T @ W


def null_projector(X: Matrix, r: int) -> Matrix:
    """P·Pᵀ, P the r right singular vectors of the rows that are used least."""
    _, _, Vt = np.linalg.svd(X, full_matrices=True)
    return Vt[-r:].T @ Vt[-r:]


def lora_null(W: Matrix, X: Matrix, r: int) -> Matrix:
    """The r leading terms of W·P·Pᵀ, which are all of it."""
    return pissa(W @ null_projector(X, r), r)


def lora_one(G: Matrix, r: int, gamma: float = 128.0) -> Matrix:
    """B·A of algorithm 1, lines 3 to 6."""
    U, S, Vt = np.linalg.svd(-G)
    B = U[:, :r] @ np.diag(np.sqrt(S[:r] / S[0])) / math.sqrt(gamma)
    A = np.diag(np.sqrt(S[:r] / S[0])) @ Vt[:r] / math.sqrt(gamma)
    return B @ A


def lora_sb(G: Matrix, r: int, eta: float) -> Matrix:
    """The r leading terms of Adam's first step."""
    return pissa(-eta * np.sign(G), r)


def gora(G: Matrix, A: Matrix, gamma: float) -> Matrix:
    """s·B·A: the projection of the gradient onto the rows of A, γ·√(n/r) of it, downhill."""
    r, n = A.shape
    return -gamma * math.sqrt(n / r) * G @ np.linalg.pinv(A) @ A


def lora_da(
    X: Matrix, D: Matrix, G: Matrix, r: int, gamma: float, beta: float, damping: float
) -> tuple[Matrix, Matrix]:
    """P·Pᵀ (n, n) and B·A (m, n), with every matrix and inverse written out."""
    Z, d = X.T @ X / len(X), np.mean(D**2, axis=0)
    Z, d = Z + damping * np.mean(np.diag(Z)) * np.eye(len(Z)), d + damping * d.mean()
    delta = -np.linalg.inv(Z) @ G.T @ np.diag(1 / d)
    sigma = np.linalg.norm(delta, 2)
    omega = -(delta / sigma) @ (delta / sigma).T + beta * np.sum(1 / d) / len(X) / sigma**2 * np.linalg.inv(Z)
    _, vectors = np.linalg.eigh(omega)
    P = vectors[:, :r]
    return P @ P.T, (P.T @ delta / sigma).T @ P.T / gamma


def orthogonal_matrix(rows: int, columns: int, seed: int) -> Matrix:
    """Orthonormal columns, at random."""
    Q, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((rows, columns)))
    return Q


def with_spectrum(m: int, n: int, S: Matrix, seed: int = 0) -> Matrix:
    """A matrix of these singular values, with random directions."""
    return orthogonal_matrix(m, len(S), seed) * S @ orthogonal_matrix(n, len(S), seed + 1).T

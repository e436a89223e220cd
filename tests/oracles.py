"""Each start again, dense and in float64 NumPy, straight from its paper: slow, obvious, and sharing no code with ours.

product(name, W, r)     s·B₀·A₀, where a paper fixes it                                  (m, n)
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


def orthogonal_matrix(rows: int, columns: int, seed: int) -> Matrix:
    """Orthonormal columns, at random."""
    Q, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((rows, columns)))
    return Q


def with_spectrum(m: int, n: int, S: Matrix, seed: int = 0) -> Matrix:
    """A matrix of these singular values, with random directions."""
    return orthogonal_matrix(m, len(S), seed) * S @ orthogonal_matrix(n, len(S), seed + 1).T

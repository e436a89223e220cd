r"""How far a reader's change of a weight is from the one that was trained, and whether factors repeat their base.

    ΔW  = s·B·A                                  plain
    ΔW  = s·(B·A − B₀·A₀)                        where the start was taken out of the base
    ΔW  = m/‖W + s·B·A‖ ⊙ (W + s·B·A) − W        DoRA, row by row

A start that was taken out of the base is a piece of it: PiSSA, OLoRA, MiLoRA and CorDA all have B₀·A₀ ∝ P·W, with P the
projector on the columns of B₀. Training moves the factors little, so B·A still points where P·W does, P now on the
columns of B:

    repetition = ⟨B·A, P·W⟩ / (‖B·A‖·‖P·W‖)      near 1 where the start is still in the factors, near 0 elsewhere

No dense B·A is formed but for DoRA's rows, which need none either.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from headstart import linalg
from headstart.errors import KeyMismatch
from headstart.files.adapter import AdapterFile, Entry
from headstart.files.bases import check_base
from headstart.files.doctor.survey import Layer, Survey
from headstart.files.load import sites_of, target_of
from headstart.lora import matrix
from headstart.lora.layouts import Pair

REPEATS = 0.5  # between 0.9 and 1 where the start is in the factors, below 0.1 where it is not


@dataclass(frozen=True)
class Block:
    """One matrix of an adapted layer: its weight W, the change s·B·A with s in A, and DoRA's rows of it."""

    W: Tensor
    A: Tensor
    B: Tensor
    magnitude: Tensor | None = None


@dataclass(frozen=True)
class Placed:
    """A layer of a file on its base: the matrices, where the weight can be seen as some.

    Attributes:
        weight: as it is stored; None without a base.
    """

    layer: Layer
    blocks: tuple[Block, ...]
    weight: Tensor | None = None


def placed(survey: Survey, layer: Layer, model: nn.Module) -> Placed:
    """A layer's factors beside the weights that they change.

    Raises:
        KeyMismatch, NoTarget, UnsupportedLayer: if the model has no such layer, or one of another shape.
    """
    file = AdapterFile(survey.file.parent, survey.config, {}, {}, survey.provenance)
    A, B = survey.pair(layer)
    entry = Entry(layer.path, A, B, layer.stated, layer.scaling * layer.stated, None, layer.embedding)
    module, parameter = sites_of(model, replace(file, entries={layer.path: entry}))[layer.path]
    layout = target_of(entry, module, parameter, file).layout
    weight = matrix.values(module, parameter)
    blocks = layout.blocks(weight)
    try:
        pairs = layout.unpack(*layout.from_file(A, B))
        fits = all(b.shape[0] == len(W) and a.shape[1] == W.shape[1] for W, (a, b) in zip(blocks, pairs, strict=True))
    except (RuntimeError, ValueError, IndexError):
        fits = False
    if not fits:
        raise KeyMismatch(
            f"{layer.name!r} is {tuple(weight.shape)} in this base, and the factors are {tuple(A.shape)} and "
            f"{tuple(B.shape)}: another base"
        )
    magnitude = survey.read(layer.keys["magnitude"]).flatten() if "magnitude" in layer.keys else None
    done, found = 0, []
    for W, (a, b) in zip(blocks, pairs, strict=True):
        rows = None if magnitude is None else magnitude[done : done + len(W)].double()
        found.append(Block(W, a.double() * layer.scaling, b.double(), rows))
        done += len(W)
    return Placed(layer, tuple(found), weight)


def check_values(seen: Survey, there: Mapping[str, Placed]) -> None:
    """Our files remember a few elements of their base's weights.

    Raises:
        WrongBase: if these weights hold others.
    """
    weights = {n: p.weight for n, p in there.items() if p.weight is not None and not matrix.is_hollow(p.weight)}
    samples = {n: v for n, v in (seen.provenance.get("base") or {}).items() if n in weights and isinstance(v, list)}
    read = {n: (lambda W=W: W) for n, W in weights.items()}
    check_base(read, AdapterFile(seen.file.parent, seen.config, {}, {}, {"base": samples}))


def bare(survey: Survey, layer: Layer) -> Placed:
    """A layer's factors without a base: what is known of its weight is that it is not."""
    pairs = survey.matrices(layer)
    empty = torch.empty(0)
    return Placed(layer, tuple(Block(empty, A.double() * layer.scaling, B.double()) for A, B in pairs))


# ------------------------------------------------------------------ norms of products


def product_norm(B: Tensor, A: Tensor) -> float:
    """‖B·A‖, through the triangle of B."""
    R = torch.linalg.qr(B.double(), mode="r").R
    return float(torch.linalg.vector_norm(R @ A.double()))


def _span(B: Tensor) -> Tensor:
    """An orthonormal basis of the columns of B, dependent and zero ones left out."""
    U, S, _ = torch.linalg.svd(B.double(), full_matrices=False)
    span: Tensor = U[:, max(1e-9 * float(S.max()), 0.0) < S]
    return span


def repetition(block: Block) -> float:
    """The cosine between B·A and the piece of W that B's columns reach; zero where there is no change."""
    Q = _span(block.B)
    if not Q.shape[1]:
        return 0.0
    change, piece = Q.T @ block.B @ block.A, (Q.to(_work(block.W)).T @ block.W.to(_work(block.W))).double()
    size = float(torch.linalg.vector_norm(change) * torch.linalg.vector_norm(piece))
    return float((change * piece).sum()) / size if size else 0.0


def _work(W: Tensor) -> torch.dtype:
    return torch.promote_types(W.dtype, torch.float32)


# ------------------------------------------------------------------ the start that the base lost


def started(block: Block, init: str, rank: int, scaling: float) -> Pair:
    """(A₀, B₀) with B₀·A₀ what the start took out of W, s and all.

    PiSSA's and OLoRA's follow from W. Of the others the piece of W that B reaches today is an estimate, as good as
    training was short.
    """
    W = block.W.to(_work(block.W))
    if init == "pissa":
        generator = linalg.named_generator(0, "doctor", "start")
        found = linalg.topk_svd(W, min(rank, *W.shape), generator=generator, tolerance=1e-6)
        return (found.S[:, None] * found.V.T).double(), found.U.double()
    if init == "olora":
        Q = linalg.thin_qr(W[:, :rank])[0]
        return scaling * (Q.T @ W).double(), Q.double()
    Q = _span(block.B)
    return (Q.to(W.dtype).T @ W).double(), Q


# ------------------------------------------------------------------ deviations


@dataclass(frozen=True)
class Reader:
    """How an engine reads a layer: its scale over the right one, and what it does not see."""

    ratio: float = 1.0
    dropped: bool = False
    no_magnitude: bool = False
    plain_start: bool = False


def deviation(there: Placed, reader: Reader, starts: Mapping[int, Pair]) -> float | None:
    """‖ΔW of the engine − ΔW‖ / ‖ΔW‖ over the blocks of a layer; None where it takes a base to know it.

    Args:
        starts: (A₀, B₀) by block, with B₀·A₀ what the base lost.
    """
    wrong = right = 0.0
    for index, block in enumerate(there.blocks):
        found = _deviation(block, reader, starts.get(index))
        if found is None:
            return None
        wrong, right = wrong + found[0] ** 2, right + found[1] ** 2
    if not right:
        return 0.0 if not wrong else math.inf
    return math.sqrt(wrong / right)


def _deviation(block: Block, reader: Reader, start: Pair | None) -> tuple[float, float] | None:
    """‖engine − truth‖ and ‖truth‖ for one block."""
    kept = 0.0 if reader.dropped else reader.ratio
    if reader.plain_start and start is None:
        return None
    if block.magnitude is not None and (reader.no_magnitude or kept != 1.0):
        known = block.W.numel() and start is None
        return _dora(block, block.magnitude, kept, reader.no_magnitude) if known else None
    A, B = block.A, block.B
    if start is None:
        size = product_norm(B, A)
        return abs(kept - 1.0) * size, size
    A0, B0 = start
    wide = torch.cat([A, A0])
    return product_norm(torch.cat([(kept - 1.0) * B, B0], 1), wide), product_norm(torch.cat([B, -B0], 1), wide)


def _dora(block: Block, magnitude: Tensor, kept: float, no_magnitude: bool) -> tuple[float, float]:
    """The same with magnitudes: sums over rows of |a·Wᵢ + b·Uᵢ|², U = s·B·A."""
    W = block.W.to(_work(block.W))
    squares = linalg.row_norms_squared(block.W)
    cross = ((W @ block.A.T.to(W.dtype)).double() * block.B).sum(1)
    moved = ((block.B @ (block.A @ block.A.T)) * block.B).sum(1)

    def ratio(k: float) -> Tensor:
        return magnitude / (squares + 2 * k * cross + k * k * moved).clamp_min(1e-300).sqrt()

    def size(a: Tensor, b: Tensor) -> float:
        return float((a * a * squares + 2 * a * b * cross + b * b * moved).clamp_min(0).sum().sqrt())

    d = ratio(1.0)
    e, f = (torch.zeros_like(d), torch.full_like(d, kept)) if no_magnitude else (ratio(kept) - 1, ratio(kept) * kept)
    return size(e - (d - 1), f - d), size(d - 1, d)

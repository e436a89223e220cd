"""One layer of several adapters: its factors as they stand in a file, and one pair that does what all of them do.

linear, cat    [w₁·B₁ | w₂·B₂ | …]·[A₁ ; A₂ ; …]              exact, of rank Σ rᵢ
svd            two thin QRs and a small SVD of these          ΔW is never formed
ties, dare     on the ΔWᵢ themselves, cut to a rank
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headstart import linalg
from headstart.errors import KeyMismatch, UnsupportedLayer
from headstart.files.adapter import AdapterFile, Entry, few, parameters_in, plain_name
from headstart.files.peft_rules import OUTPUT
from headstart.linalg.blend import SPARSE, blend


@dataclass(frozen=True)
class Factors:
    """One layer's change as it stands in a file, in blocks: A (b, k, n), B (b, m, k), with s in B.

    A grouped convolution and a stack of experts have several blocks, everything else one.
    """

    A: Tensor
    B: Tensor

    @property
    def dense(self) -> Tensor:
        return torch.bmm(self.B.double(), self.A.double()).float()


def factors_of(file: AdapterFile, path: str) -> Factors:
    """A layer of a file in blocks, with s·B in B's place."""
    entry, scale = file.entries[path], _scale(file, path)
    A, B = entry.A.double(), entry.B.double() * scale
    blocks, rank = _blocks(file, entry), entry.A.shape[0]
    if is_stack(file, entry):  # A: (e·r, n) expert after expert, B: (m, r·e) with the experts next to one another
        return Factors(A.reshape(blocks, -1, A.shape[1]), B.reshape(len(B), -1, blocks).permute(2, 0, 1))
    return Factors(A.reshape(blocks, rank // blocks, -1), B.reshape(blocks, len(B) // blocks, -1))


def _scale(file: AdapterFile, path: str) -> float:
    # PEFT runs an attention's output projection at the scale of the attention.
    entry = file.entries.get(path.removesuffix(OUTPUT), file.entries[path])
    return entry.alpha / entry.rank


def is_stack(file: AdapterFile, entry: Entry) -> bool:
    """Whether this is a parameter of several matrices."""
    return bool(parameters_in(entry.path, file.config)) and entry.A.ndim == 2 and entry.A.shape[0] != entry.rank


def _blocks(file: AdapterFile, entry: Entry) -> int:
    """How many matrices there are: of experts, or groups of a convolution."""
    across = entry.rank if is_stack(file, entry) else entry.B.shape[1]
    if not across or entry.A.shape[0] % across:
        raise KeyMismatch(f"{file.folder}: A and B of {entry.name!r} have no rank in common")
    return int(entry.A.shape[0] // across)


def check_parameters(path: str, files: Sequence[AdapterFile]) -> None:
    """Refuse a module of which the files adapt other parameters: which is which then depends on the file."""
    named = {frozenset(parameters_in(path, file.config)) for file in files if path in file.entries}
    if len(named) > 1:
        raise UnsupportedLayer(
            f"the adapters change other parameters of {plain_name(path)!r} ({few(sorted(set().union(*named)))}): "
            "`headstart merge` them into the base"
        )


def check_alike(path: str, terms: Sequence[Factors]) -> None:
    sizes = {(f.A.shape[0], f.A.shape[2], f.B.shape[1]) for f in terms}
    if len(sizes) > 1:
        raise KeyMismatch(f"the adapters see {path!r} as matrices of different sizes: {sorted(sizes)}: other bases?")


def combined(
    path: str, terms: Sequence[tuple[float, Factors]], method: str, rank: int | None, density: float, seed: int
) -> tuple[Factors, float]:
    """One layer's factors, and the share of the energy that they drop."""
    if method in SPARSE:
        weights = [weight for weight, _ in terms]
        delta = blend([f.dense for _, f in terms], weights, method, density=density, seed=seed, name=plain_name(path))
        return _of_rank(delta, rank or max(f.A.shape[1] for _, f in terms), path)
    A = torch.cat([factors.A for _, factors in terms], dim=1)
    B = torch.cat([weight * factors.B for weight, factors in terms], dim=2)
    if method != "svd":
        return Factors(A, B), 0.0
    assert rank is not None
    smaller = [linalg.recompress(b, a, min(rank, len(b), a.shape[1])) for b, a in zip(B, A, strict=True)]
    return Factors(torch.stack([a for _, a, _ in smaller]), torch.stack([b for b, _, _ in smaller])), max(
        dropped for _, _, dropped in smaller
    )


def _of_rank(delta: Tensor, rank: int, path: str) -> tuple[Factors, float]:
    """The best factors of a dense change."""
    pairs, dropped = [], 0.0
    for i, block in enumerate(delta):
        generator = linalg.named_generator(0, "combine", f"{path}:{i}")
        found = linalg.topk_svd(block, min(rank, *block.shape), generator=generator)
        root = found.S.sqrt()
        A, B = (found.V * root).T, found.U * root
        pairs.append((A, B))
        total = float(block.double().square().sum())
        dropped = max(dropped, 1 - float(found.S.double().square().sum()) / total if total else 0.0)
    return Factors(torch.stack([A for A, _ in pairs]), torch.stack([B for _, B in pairs])), max(dropped, 0.0)


def stacked_in(files: Sequence[AdapterFile], path: str) -> bool:
    """Whether some file says that a layer is a parameter of several matrices."""
    return any(is_stack(file, file.entries[path]) for file in files if path in file.entries)


def padded(factors: Factors, rank: int) -> tuple[Tensor, Tensor]:
    """Zeros up to a rank: PEFT knows one for all the parameters of a module."""
    missing = rank - factors.A.shape[-2]
    return (
        torch.nn.functional.pad(factors.A, (0, 0, 0, missing)),
        torch.nn.functional.pad(factors.B, (0, missing)),
    )

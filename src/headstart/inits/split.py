r"""From singular triplets to two factors: the last step of every start that reads a spectrum.

    M = U·S·Vᵀ                                                        M: (m, n), S: (r,)
    B = U·√(S/s)                                                      B: (m, r)
    A = √(S/s)·Vᵀ                                                     A: (r, n)

so that s·B·A = M whatever the scaling, and both factors weigh the same. Where S is zero both would be zero, and stay
so: each one's gradient is a multiple of the other. There A gets the direction itself, orthogonal to all the others,
with the size of a Kaiming row, √(n·1/(3n)) = 1/√3; B stays zero. The product is the same, and the direction can learn.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from headstart.inits.checks import check_scaling
from headstart.inits.strategy import Factors
from headstart.linalg import Spectrum

KAIMING_ROW = 3**-0.5


def split_evenly(spectrum: Spectrum, scaling: float) -> Factors:
    """Anchored factors with s·B·A = U·S·Vᵀ.

    Example:
        >>> from headstart.linalg import named_generator, topk_svd
        >>> W = torch.diag(torch.tensor([4.0, 1.0, 0.0]))
        >>> start = split_evenly(topk_svd(W, 3, generator=named_generator(0, "example", "W")), scaling=4.0)
        >>> (start.B.norm(dim=0) ** 2 * 4).tolist(), (start.A.norm(dim=1) ** 2).tolist()
        ([4.0, 1.0, 0.0], [1.0, 0.25, 0.333...])
    """
    check_scaling(scaling)
    U, S, V = spectrum.U, spectrum.S, spectrum.V
    root = (S / scaling).sqrt()
    A = (V * torch.where(S > 0, root, KAIMING_ROW)).T
    B = U * root
    return Factors(A.float(), B.float(), anchored=True, facts=certified(spectrum))


def certified(spectrum: Spectrum) -> dict[str, Any]:
    """The certificate, as the init report shows it."""
    facts = asdict(spectrum.certificate)
    return {"effective_rank": facts.pop("rank"), **facts}

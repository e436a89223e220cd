r"""Init[AB]: noise in both factors, so that neither has to wait for the other.

    A₀ ~ U(−c/√n, c/√n)                                               A₀: (r, n)
    B₀ ~ U(−c/√n, c/√n)                                               B₀: (m, r)
    y  = W·x + s·B·A·x                        (reset: s·(B·A − B₀·A₀)·x)

With B₀ = 0 the first steps move B alone; here both factors move at once, which forgives learning rates that are too
small. The output does change at step zero, by a noise of order √r·s·c²/n for each weight, which the paper finds
harmless; `reset` takes that noise out again.

Li, Luo, Tang, Wang, Chen, Luo, Li, He, Li (2025), "Beyond Zero Initialization: Investigating the Impact of Non-Zero
Initialization on LoRA Fine-Tuning Dynamics", arXiv 2505.23194 (ICML 2025). Both bounds use the input width n, as in
the reference repository Leopold1423/non_zero_lora-icml25; its `reset` writes W − s·B₀·A₀ into the weight.
"""

from __future__ import annotations

import torch

from headstart.inits.checks import check_above_zero
from headstart.inits.strategy import Factors, register


@register("init_ab", paper="https://arxiv.org/abs/2505.23194", fact="noise in both factors, the function moves; free")
def init_ab(
    shape: tuple[int, int], rank: int, generator: torch.Generator, c: float = 1.0, reset: bool = False
) -> Factors:
    """Uniform A and B of one bound, c/√n.

    Args:
        shape: (m, n) of the weight seen as a matrix.
        rank: r.
        generator: draws the noise, A first.
        c: 1 is Kaiming's bound; the paper finds a wide range around it equally good.
        reset: keep the pretrained function at step zero.

    Returns:
        Factors, anchored where `reset` asks for it; otherwise the function moves at step zero.

    Raises:
        BadOption: if c is not above 0.

    Example:
        >>> start = init_ab((300, 100), 4, torch.Generator().manual_seed(0), c=2.0)
        >>> print(f"{start.A.abs().max():.2f} {start.B.abs().max():.2f} {start.anchored}")
        0.20 0.20 False
    """
    check_above_zero("c", c)
    m, n = shape
    bound = c * n**-0.5
    A = torch.empty(rank, n).uniform_(-bound, bound, generator=generator)
    B = torch.empty(m, rank).uniform_(-bound, bound, generator=generator)
    # Deviation: the reference resets by writing to W, which rounds a half-precision weight; anchoring does not.
    return Factors(A, B, anchored=reset)

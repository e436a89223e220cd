r"""The LoRA branch as pure functions of (x, W, factors); no module is known here.

    y = W·x + b + s·B·A·d(x)                                         W: (m, n)   A: (r, n)   B: (m, r)
    y = W·x + b + s·(B·A − B₀·A₀)·d(x)          anchored                        A₀: (r, n)  B₀: (m, r)
    y = g·(W·x + s·B·A·d(x)) + b                DoRA: g = magnitude / norm                     g: (m,)

`d` is dropout, one draw for both pairs. Tokens are rows in the code: Y = X·Wᵀ.

The anchored difference is one pair of rank 2r, and not the obvious one:

    B·A − B₀·A₀ = [B − B₀ | B₀] · [A ; A − A₀]                       (m, 2r) · (2r, n)

At step zero two of its four blocks are zero, so the branch adds nothing, to the bit, in every dtype. And what training
moved is rounded to bf16 as the small thing that it is: [B | −B₀]·[A ; A₀], or two products of rank r, round the large A
and A₀, and lose any change below 2⁻⁹ of an entry. PiSSA's factors of a (2816, 1024) weight, each entry moved by 0.1 %,
1024 tokens (relative error of the branch; how many outputs a step-zero branch changes; CPU milliseconds of the branch):

                                     float32                      bfloat16
    this pair                        3e-7    0 %    6.8 ms        0.003    0 %   15.3 ms
    [B | −B₀]·[A ; A₀]               3e-4   23 %    7.1 ms        2.4      0 %   13.7 ms
    two products                     3e-4   17 %   11.8 ms        2.7     13 %   18.4 ms

What a step keeps for its backward: x itself (the tensor that q, k and v share, no copy), h = A·x, r wide, and what
dropout dropped. Under DoRA also the output, which the next operation mostly keeps anyway (`reads_back`).

fused.py      the two functions and their one autograd node
product.py    the large product, in float32 tiles where a CPU emulates half-precision ones
dropout.py    what dropout drops, as positions
gain.py       DoRA's gain, and the output read back in place of what it scaled
"""

from headstart.lora.branch.fused import add_branch, linear

__all__ = ["add_branch", "linear"]

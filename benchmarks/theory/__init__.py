"""LoRA-One's theorems, run: what docs/theory/lora-one.md shows, in float64, in about a minute of one core.

    python -m benchmarks.theory          writes benchmarks/results/theory.json and the pictures in docs/theory

    setting       the two problems, the starts in the paper's form, and descent
    experiments   one function a theorem
    pictures      a result as a picture

Nothing here comes from headstart: the starts are written again in a few lines each, as an independent oracle.
"""

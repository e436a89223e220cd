"""The rate that an advice names: the one place where it asks for one.

Before a weight is loaded there is nothing to measure, so these are published ratios; `headstart.lora.rates` predicts
the same from the factors themselves once they exist.
"""

from __future__ import annotations

from dataclasses import dataclass

from headstart.choose.rules import LR_MATTERS, Confidence

# Plain LoRA's rate on a model of width 2000 at r = 16 and s = 1, and how it falls with the width: ten times full
# fine-tuning's, as tinker-cookbook's hyperparam_utils has it for Llamas. Runs up to a hundred steps want half as much
# again.
BASE, WIDTH, POWER, SHORT = 5e-4, 2000, 0.78, 100


@dataclass(frozen=True)
class Ratio:
    """What plain LoRA's best rate is divided by."""

    divisor: float
    source: str
    confidence: Confidence


TUNED = f"{LR_MATTERS}: best rates of both, tuned"
RATIOS = {
    "kaiming": Ratio(1, "tinker-cookbook's hyperparam_utils, fitted to Llamas", "medium"),
    "init_ab": Ratio(1.8, TUNED, "medium"),
    "milora": Ratio(3.2, TUNED, "medium"),
    "pissa": Ratio(10, TUNED, "medium"),
    "olora": Ratio(18, TUNED, "medium"),
    "lora_ga": Ratio(18, TUNED, "medium"),
    "qpissa": Ratio(10, f"as PiSSA, {LR_MATTERS}", "low"),
    "corda": Ratio(10, f"as PiSSA, {LR_MATTERS}: the same split of a part of W", "low"),
    "sc_lora": Ratio(10, f"as PiSSA, {LR_MATTERS}: the same split of a part of W", "low"),
    "lora_one": Ratio(1, "headstart's own sweeps, docs/rates.md: 0.9 to 1.1 of plain LoRA's on four tasks", "medium"),
    "kfac": Ratio(0.5, "headstart's own runs, docs/gap.md: one to 2.4 times plain LoRA's, few rates, two tasks", "low"),
    "lora_sb": Ratio(0.5, "as kfac: a core between two frozen factors", "low"),
    "eva": Ratio(1.5, "headstart's own sweeps, docs/rates.md: 0.2 to 1.1 of plain LoRA's on four tasks", "low"),
}
UNKNOWN = Ratio(1, "plain LoRA's: nobody has published a tuned one", "low")


@dataclass(frozen=True)
class Rate:
    """A learning rate, its reason, where that comes from, and how sure it is."""

    value: float
    reason: str
    source: str
    confidence: Confidence


def base_of(hidden: int, steps: int | None = None) -> float:
    """The rate that fits plain LoRA at r = 16 and s = 1.

    Example:
        >>> f"{base_of(4096):.1e}", f"{base_of(576, steps=24):.1e}"
        ('2.9e-04', '2.0e-03')
    """
    short = 1.5 if steps is not None and steps <= SHORT else 1.0
    return BASE * short * float((WIDTH / max(hidden, 1)) ** POWER)


def rate_of(init: str, rank: int, scaling: float, hidden: int, steps: int | None = None) -> Rate:
    """The peak rate of AdamW that fits a start.

    Args:
        init: the start. rank: r. scaling: s.
        hidden: the width of the model. steps: of the run.

    Example:
        >>> rate_of("pissa", 16, 1.0, 4096).value
        2.9e-05
    """
    base = base_of(hidden, steps)
    ratio = RATIOS.get(init, UNKNOWN)
    # A step of B under A moves the output by s·√r·rate, the product of both by s·√r·rate²: what is seen lies between.
    reach = (scaling * rank**0.5 / 4.0) ** 0.5
    value = float(f"{base / ratio.divisor / reach:.1e}")
    reason = f"{base:.1e}, plain LoRA's at a width of {hidden}"
    if ratio.divisor != 1:
        reason += f", / {ratio.divisor:g} for {init}"
    if abs(reach - 1) > 0.05:
        reason += f", / {reach:.2g} for r = {rank} and s = {scaling:.3g}"
    return Rate(value, reason, ratio.source, ratio.confidence)

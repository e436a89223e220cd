"""What each start asks for and costs, as plain numbers, so that an advice need not import torch to know it.

The tests hold this table against the strategies themselves. A start that is registered elsewhere is asked directly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from headstart.choose.shapes import Matrix

INPUTS = ("inputs", "preserved")
GRADIENTS = ("gradient", "output_gradients", "output_squares")
WIDTH = 4  # directions that calibration keeps of a gradient, for each rank of the adapter
SMALL = 4e8  # operations' worth of time of any iteration: its eigenproblems are small, and in float64
PIECE = 2048  # tokens of a batch that a language model's loss is asked of at once
ROWS = 192  # of a second moment in one block


@dataclass(frozen=True)
class Start:
    """One start.

    Attributes:
        needs: the statistics without which it cannot start.
        work: what it does with a weight, as `work_of` reads it.
        anchored: a frozen copy of both factors stays beside them.
        trains: of "A", "B" and "R", a core between them.
        base: it replaces the frozen weight by its quantised form.
    """

    needs: tuple[str, ...] = ()
    work: str = "free"
    anchored: bool = False
    trains: str = "AB"
    base: bool = False

    @property
    def looks_at_gradients(self) -> bool:
        return bool(set(self.needs) & set(GRADIENTS))


STARTS = {
    "kaiming": Start(),
    "gaussian": Start(),
    "normal": Start(),
    "random": Start(),
    "init_ab": Start(),
    "orthogonal": Start(anchored=True),
    "loram": Start(work="norm", anchored=True),
    "olora": Start(work="basis", anchored=True),
    "pissa": Start(work="leading", anchored=True),
    "milora": Start(work="trailing", anchored=True),
    "mica": Start(work="trailing", trains="A"),
    "eva": Start(("inputs",), "leading"),
    "corda": Start(("inputs",), "metric", anchored=True),
    "tara": Start(("inputs", "output_gradients"), "metric", anchored=True),
    "sc_lora": Start(("inputs", "preserved"), "metric", anchored=True),
    "lora_null": Start(("inputs",), "metric", anchored=True),
    "lora_ga": Start(("gradient",), "kept", anchored=True),
    "lora_one": Start(("gradient",), "kept"),
    "lora_sb": Start(("gradient",), "dense", trains="R"),
    "kfac": Start(("inputs", "output_gradients"), "axes", trains="R"),
    "lora_da": Start(("inputs", "gradient", "output_squares"), "metric"),
    "gora": Start(("gradient",), "dense"),
    "loftq": Start((), "quantise", base=True),
    "qpissa": Start((), "quantise", base=True),
}


def start_of(init: str | bool) -> Start:
    """The start of a name or of PEFT's spelling; one that is registered elsewhere is tried on a small matrix.

    Raises:
        UnknownInit: with the nearest name.
    """
    name = {True: "kaiming", False: "random"}[init] if isinstance(init, bool) else str(init)
    if name.startswith("pissa_niter_"):
        name = "pissa"
    if name in STARTS:
        return STARTS[name]
    from headstart.inits import get
    from headstart.inits.small import on_a_small_matrix

    strategy = get(init)[0]
    found = on_a_small_matrix(strategy, {})
    trains = "R" * (found.core is not None) or "".join(sorted(set("AB") - found.frozen))
    work = "leading" if strategy.reads_weight or strategy.needs else "free"
    return Start(strategy.needs, work, found.anchored, trains, found.base is not None)


@dataclass(frozen=True)
class Work:
    """Bytes that one weight takes on the way, and its operations.

    "basis" and "leading" are fitted to the project's benchmarks of decompositions; the others are counted roughly.
    """

    bytes: int
    flops: float


def work_of(kind: str, m: int, n: int, r: int) -> Work:
    """What a start does with one weight (m, n) at rank r."""
    d, factors, krylov = min(m, n), 4 * r * (m + n), 2.0 * m * n * (450 + 13 * r) + SMALL
    found = {
        "free": Work(0, float(r * (m + n))),
        "norm": Work(8 << 20, 2.0 * m * n),
        "kept": Work(4 * factors, 200.0 * r * r * (m + n)),
        "basis": Work(4 << 20, 2.0 * m * n * (10 + 2.2 * r)),
        "leading": Work((8 << 20) + 8 * factors, krylov),
        "trailing": Work(3 * 8 * d * d, 4.0 * m * n * d + 25.0 * d**3),
        "metric": Work(3 * 8 * n * n + 8 * factors, 30.0 * n**3 + 4 * krylov),
        "axes": Work(8 * (m * m + n * n), 10.0 * (m**3 + n**3)),
        "dense": Work(3 * 4 * m * n, krylov),
        "quantise": Work(4 * 4 * m * n, 5 * krylov),  # five rounds
    }
    return found[kind]


def statistics_bytes(needs: Sequence[str], matrices: Sequence[Matrix], leaders: Mapping[str, str], rank: int) -> int:
    """What a calibration keeps, to the last byte: it is all there before the first batch.

    Args:
        needs: of the start.
        matrices: that are adapted; leaders: for each, the one that keeps the inputs that they share.
        rank: of the adapter.
    """
    total = 0
    for matrix in matrices:
        k = min(WIDTH * rank, matrix.m, matrix.n)
        own = {
            "gradient": 4 * (matrix.m * k + k + matrix.n * k),
            "output_gradients": moments_bytes(matrix.m),
            "output_squares": 8 * matrix.m,
        }
        if leaders[matrix.name] == matrix.name:
            own |= dict.fromkeys(INPUTS, moments_bytes(matrix.n))
        total += matrix.count * sum(own.get(need, 0) for need in needs)
    return total


def halves_bytes(needs: Sequence[str], matrices: Sequence[Matrix], rank: int) -> int:
    """What the first half of the data gave of the gradients, kept apart to see how noisy they are."""
    if "gradient" not in needs:
        return 0
    return sum(2 * x.count * (x.m + x.n) * max(1, min(WIDTH * rank, x.m, x.n) // 2) for x in matrices)


def moments_bytes(n: int) -> int:
    """A second moment in blocks of rows up to its diagonal, float32, and a float64 sum."""
    blocks = [(start, min(start + ROWS, n)) for start in range(0, n, ROWS)]
    return sum(4 * (stop - start) * stop for start, stop in blocks) + 8 * n


def statistics_flops(needs: Sequence[str], matrices: Sequence[Matrix], leaders: Mapping[str, str], rank: int) -> float:
    """Operations for each token that a calibration adds to the passes."""
    total = 0.0
    for matrix in matrices:
        share = matrix.used * matrix.count
        if leaders[matrix.name] == matrix.name:
            total += sum(float(matrix.n) ** 2 for need in needs if need in INPUTS) * share
        if "output_gradients" in needs:
            total += float(matrix.m) ** 2 * share
        if "gradient" in needs:  # Merged as two thin factors, or formed first: whichever is cheaper.
            total += min(2.0 * matrix.m * matrix.n, 8.0 * WIDTH * rank * (matrix.m + matrix.n)) * share
    return total

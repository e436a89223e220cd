"""The decompositions that starts are made of, each with a statement of what it reached.

sides.py      a matrix as its short side sees it: one sweep in blocks, never a copy
lanczos.py    block Lanczos on that side
spectrum.py   from a subspace to triplets, signs and a certificate
triplets.py   the leading and the trailing triplets: routes and escalation
lowrank.py    thin factors: QR, recompression, merging, row norms
compiled.py   a bfloat16 weight changed in one pass over memory; fast.py: where numba is installed, and it pays
"""

from headstart.linalg.fast import prepare
from headstart.linalg.lowrank import add_lowrank, lowrank_row_norms, recompress, rounded, row_norms_squared, thin_qr
from headstart.linalg.sides import Operator
from headstart.linalg.spectrum import Certificate, Spectrum
from headstart.linalg.triplets import bottomk_svd, named_generator, topk_svd

__all__ = [
    "Certificate",
    "Operator",
    "Spectrum",
    "add_lowrank",
    "bottomk_svd",
    "lowrank_row_norms",
    "named_generator",
    "prepare",
    "recompress",
    "rounded",
    "row_norms_squared",
    "thin_qr",
    "topk_svd",
]

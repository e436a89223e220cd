"""Fixed-size running summaries of a layer's inputs and output gradients.

`NAMES` holds the parameter names by which a strategy asks for one; none is collected yet.
"""

NAMES: frozenset[str] = frozenset()

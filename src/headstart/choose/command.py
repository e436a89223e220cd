"""From the flags of `headstart estimate` and `headstart advise` to what they print."""

from __future__ import annotations

import json
from typing import Any

from headstart.choose.names import named
from headstart.errors import BadOption


def estimated(flags: dict[str, Any]) -> str:
    """What `headstart estimate` prints.

    Raises:
        HeadstartError: as `headstart.estimate`.
    """
    from headstart.choose.estimate import estimate

    model, as_json = flags.pop("model"), flags.pop("as_json")
    found = estimate(model, tflops=flags.pop("tflops"), **_fields(flags))
    return json.dumps(found.to_dict()) if as_json else str(found)


def advised(flags: dict[str, Any]) -> str:
    """What `headstart advise` prints.

    Raises:
        HeadstartError: as `headstart.advise`.
    """
    from headstart.choose.advise import advise

    as_json = flags.pop("as_json")
    given = {name: value for name, value in _fields(flags).items() if value is not None}
    found = advise(given.pop("model"), given.pop("data", None), **given)
    return found.to_json() if as_json else str(found)


def _fields(flags: dict[str, Any]) -> dict[str, Any]:
    """The fields of a setting: bits belong to quantised weights, and names are a list, unlike an expression."""
    quantised, bits = flags.pop("quantised"), flags.pop("bits")
    if bits not in (4, 8):
        raise BadOption(f"bits is {bits!r}: choose 4 or 8")
    if bits != 4 and not quantised:
        raise BadOption("bits are those of quantised weights: pass --quantised, too")
    flags["quantised"] = f"{bits}bit" if quantised else None
    for field in ("target_modules", "exclude_modules"):
        flags[field] = named(flags.get(field))
    return flags

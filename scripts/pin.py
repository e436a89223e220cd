"""Write constraints.txt from the environment that runs this script.

    python scripts/pin.py

Every installed distribution is pinned exactly, without local version labels (`+cpu`), so that a fresh environment
needs no search. A release that asks for a newer Python than headstart does gets a marker: an older interpreter
takes the newest release that still supports it.
"""

from __future__ import annotations

from importlib.metadata import Distribution, distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
OLDEST = Version("3.10")
HEADER = (
    "# Written by scripts/pin.py: the whole development set, pinned, so that a fresh environment is quick to make.\n"
)


def marker(requires_python: str) -> str:
    """The condition under which a release can be installed, where that is not everywhere."""
    floors = [Version(bound.version) for bound in SpecifierSet(requires_python) if bound.operator == ">="]
    newest = max(floors, default=OLDEST)
    return f' ; python_full_version >= "{newest}"' if newest > OLDEST else ""


def models() -> set[str]:
    """The names in models.txt: installed without their dependencies, and pinned there."""
    lines = (ROOT / "models.txt").read_text(encoding="utf-8").splitlines()
    return {canonicalize_name(Requirement(line).name) for line in lines if line and not line.startswith("#")}


def pin(distribution: Distribution) -> str:
    facts = distribution.metadata
    condition = marker(str(facts.json.get("requires_python", "")))
    return f"{canonicalize_name(facts['Name'])}=={Version(distribution.version).public}{condition}"


def main() -> None:
    absent = {"headstart", "pip"} | models()
    pins = {pin(found) for found in distributions() if canonicalize_name(found.metadata["Name"]) not in absent}
    (ROOT / "constraints.txt").write_text(HEADER + "\n".join(sorted(pins)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

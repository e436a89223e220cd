"""Layers as a command line names them."""

from __future__ import annotations

from typing import Any


def named(text: Any) -> Any:
    """Names with commas between them are a list, and so is one; "all-linear" and an expression stay what they are.

    Example:
        >>> named("q_proj"), named("q_proj, v_proj"), named(r".*\\.mlp\\..*")
        (['q_proj'], ['q_proj', 'v_proj'], '.*\\\\.mlp\\\\..*')
    """
    plain = isinstance(text, str) and text != "all-linear" and not set(text) & set(r"\()[]{}*+?|^$")
    return [name.strip() for name in text.split(",")] if plain else text

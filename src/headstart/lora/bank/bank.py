"""The bank: adapters come and go, and the rows of a batch are routed among them.

The base keeps its modules and its weights. A layer that some adapter reaches gets a forward hook, which adds nothing
outside a route: there the model is the base, to the bit. A route is a context variable, so that threads and tasks that
run the same model at once each have their own, and an exception ends it.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from headstart.errors import AdapterState, BadOption, BadRoute, nearest
from headstart.lora.adapt import check_plain
from headstart.lora.bank.held import Held, Site, hold
from headstart.lora.bank.route import Route, first_dimensions
from headstart.lora.layers import Start
from headstart.lora.targets import Target

if TYPE_CHECKING:
    from typing_extensions import Self

Names = str | Sequence[str | None] | None

_routes: ContextVar[Mapping[int, Route] | None] = ContextVar("headstart_routes", default=None)


class Bank:
    """`headstart.AdapterBank`, but for the files: its adapters are given as factors."""

    def __init__(self, model: nn.Module) -> None:
        check_plain(model)
        self.model = model
        self._adapters: dict[str, Held] = {}
        self._sites: dict[nn.Module, Site] = {}
        self._handles: list[RemovableHandle] = [model.register_forward_pre_hook(_check(id(self)), with_kwargs=True)]
        self._lock = threading.Lock()
        self._open = 0
        self._closed = False
        # A bank that is dropped leaves a plain model, too.
        self._unhook = weakref.finalize(self, _remove, self._handles)

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters, in the order in which they came."""
        return tuple(self._adapters)

    @property
    def nbytes(self) -> int:
        """The size of all factors that are held."""
        return sum(held.nbytes for held in list(self._adapters.values()))

    def __contains__(self, name: object) -> bool:
        return name in self._adapters

    def __len__(self) -> int:
        return len(self._adapters)

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{len(self)} adapters, {self.nbytes / 1e6:.1f} MB"
        return f"{type(self).__name__}({type(self.model).__name__}, {state})"

    def add(
        self,
        name: str,
        starts: Iterable[tuple[Target, Start]],
        *,
        dtype: torch.dtype | None = None,
        replace: bool = False,
    ) -> None:
        """Add an adapter from its factors.

        Args:
            name: what routes call it. starts: its layers, as `headstart.lora.starts.prepare` gives them.
            dtype: what its factors are held in, where the layer's own is not narrower; by default that of `starts`.
            replace: whether a name that is taken is an adapter to replace.

        Raises:
            UnsupportedLayer, BadOption, AdapterState: before anything is changed.
        """
        if not isinstance(name, str) or not name:
            raise BadOption(f"an adapter is called {name!r}: choose a name that is a string")
        self._check_free(name, replace)
        sites, held = hold(self.model, starts, dtype)
        with self._lock:
            self._check_free(name, replace)
            for site in sites:
                if site.module not in self._sites:
                    self._sites[site.module] = site
                    hook = site.module.register_forward_hook(_branch(id(self), site), with_kwargs=True)
                    self._handles.append(hook)
            # A new table: a thread that looks at the old one sees it whole.
            self._adapters = {**self._adapters, name: held}

    def remove(self, name: str) -> None:
        """Take an adapter out. Routes that are open keep it until they end.

        Raises:
            BadRoute: if there is none of this name.
        """
        with self._lock:
            self._held(name)
            self._adapters = {other: held for other, held in self._adapters.items() if other != name}

    @contextmanager
    def route(self, names: Names, *, copies: int = 1) -> Iterator[nn.Module]:
        """Within this context, and in this thread or task only, each row of a batch goes through its own adapter.

        Args:
            names: for each row of the batch the name of an adapter, or None for the base. One name alone, not in a
                list, is for all rows of a batch of any size.
            copies: how many rows in a row each of these stands for, where beams or several samples multiply them.

        Yields:
            The model.

        Raises:
            BadRoute: naming an adapter that is not there; in a forward, if its batch has other rows.
            AdapterState: if the bank is closed.
        """
        if isinstance(copies, bool) or not isinstance(copies, int) or copies < 1:
            raise BadOption(f"copies is {copies!r}: choose an integer of at least 1")
        listed = [names] if names is None or isinstance(names, str) else list(names)
        if not listed:
            raise BadRoute("no row is routed: give one name, or None, for each row of the batch")
        with self._lock:
            if self._closed:
                raise AdapterState("this bank is closed: make a new one")
            adapters = [None if name is None else self._held(name) for name in listed]
            self._open += 1
        stated = None if names is None or isinstance(names, str) else len(listed)
        try:
            token = _routes.set({**(_routes.get() or {}), id(self): Route(adapters, copies, stated)})
            try:
                yield self.model
            finally:
                _routes.reset(token)
        finally:
            with self._lock:
                self._open -= 1

    def generate(self, names: Names, *args: Any, **kwargs: Any) -> Any:
        """`model.generate`, each prompt with its own adapter.

        Args:
            names: as in `route`, one for each prompt, whatever the number of beams or of samples of each.
            args, kwargs: for the model's own `generate`.
        """
        model: Any = self.model
        if not callable(getattr(model, "generate", None)):
            raise BadOption(f"{type(model).__name__} has no generate(): open a route and call the model")
        config = kwargs.get("generation_config") or model.generation_config
        given = {**vars(config), **{name: value for name, value in kwargs.items() if value is not None}}
        copies = max(given.get("num_beams") or 1, given.get("num_return_sequences") or 1)
        with self.route(names, copies=copies):
            return model.generate(*args, **kwargs)

    def close(self) -> None:
        """Give back the memory and leave the model as it was. Closing twice is harmless.

        Raises:
            AdapterState: if a route is open: the forward in it would go on as the base.
        """
        with self._lock:
            if self._open:
                raise AdapterState(f"{self._open} routes are open: close the bank when they have ended")
            self._closed = True
            self._adapters = {}
            self._sites = {}
            self._unhook()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _held(self, name: object) -> Held:
        held = self._adapters.get(name) if isinstance(name, str) else None
        if held is None:
            near = nearest(str(name), self._adapters) or f" (it holds {_few(self._adapters)})"
            raise BadRoute(f"the bank holds no adapter {name!r}{near}")
        return held

    def _check_free(self, name: str, replace: bool) -> None:
        if self._closed:
            raise AdapterState("this bank is closed: make a new one")
        if name in self._adapters and not replace:
            raise AdapterState(f"the bank holds an adapter {name!r}: pass replace=True, or choose another name")


def _few(names: Iterable[str], count: int = 8) -> str:
    names = list(names)
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return (", ".join(map(repr, names[:count])) or "none") + more


# The hooks know the bank by its id alone: it is free to be dropped.


def _route_of(bank: int) -> Route | None:
    routes = _routes.get()
    return None if routes is None else routes.get(bank)


def _branch(bank: int, site: Site) -> Callable[..., Tensor | None]:
    def add_branches(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> Tensor | None:
        route = _route_of(bank)
        if route is None or not route.groups:
            return None
        return route.apply(site, args[0] if args else next(iter(kwargs.values())), y)

    return add_branches


def _check(bank: int) -> Callable[..., None]:
    def check_batch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        route = _route_of(bank)
        if route is None:
            return
        sizes = first_dimensions(args, kwargs)
        if sizes and not route.fits(sizes):
            raise BadRoute(
                f"{route.stated} rows are routed, and the batch has {max(set(sizes), key=sizes.count)}: give one name, "
                "or None, for each row; where beams or samples multiply the rows, use bank.generate or copies="
            )

    return check_batch


def _remove(handles: list[RemovableHandle]) -> None:
    while handles:
        handles.pop().remove()

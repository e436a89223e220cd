"""What merging adapters into a checkpoint will do, tensor by tensor, checked before anything is written."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from headstart.errors import BadOption, KeyMismatch, Unstreamable
from headstart.files import quantized_base
from headstart.files.adapter import AdapterFile
from headstart.files.bases import check_bases
from headstart.files.load import plan_load, sites_of
from headstart.files.merging.folding import Change, Mixture, Read, Replaced, Rows, change_of, columns_of
from headstart.files.merging.packed import Packed, packed_weights
from headstart.files.merging.shards import Checkpoint, Stored
from headstart.files.merging.skeleton import Place, Skeleton, skeleton
from headstart.lora import matrix, rebase
from headstart.lora.layers import Start
from headstart.lora.layouts import Layout, Pair
from headstart.lora.quantized import Recipe

_LOOKED_AT = 8  # quantised weights that are unpacked to see whether the base is the adapter's


@dataclass(frozen=True)
class Term:
    """What one adapter does to a parameter: a start and how it lies on it, or other values."""

    weight: float
    source: Start | Tensor
    layout: Layout = Layout()  # noqa: RUF009  frozen


@dataclass(frozen=True)
class Edit:
    """A parameter that adapters change.

    Attributes:
        label: what the report calls it; columns: the width of its rows.
        recipe: how the parameter is quantised first; taken: what is taken from it before that.
    """

    label: str
    columns: int
    terms: list[Term] = field(default_factory=list)
    recipe: Recipe | None = None
    taken: Pair | None = None

    def change(self, mixture: Mixture, ranges: Sequence[Rows], read: Read) -> tuple[Change, float]:
        """What becomes of it, and the share of the energy that a rank cut off."""
        terms: list[tuple[float, Change]] = []
        for term in self.terms:
            if isinstance(term.source, Start):
                terms.append((term.weight, change_of(term.source, term.layout, ranges, read)))
            else:
                terms.append((term.weight, Replaced(term.source.reshape(-1, self.columns))))
        if len(terms) == 1 and terms[0][0] == 1 and mixture.method in ("linear", "cat"):
            return terms[0][1], 0.0
        return mixture.combined(self.label, terms, ranges, read)

    def stands_on(self, weight: Tensor) -> Tensor:
        """What the adapter stands on: the weight, or its quantised image."""
        if self.recipe is None:
            return weight
        return rebase.replacement(weight, self.terms[0].layout, self.recipe, self.taken)


@dataclass(frozen=True)
class Task:
    """A tensor of the new checkpoint that is not simply that of the old one.

    Attributes:
        source: what it is made from; key: its name.
        edit: the change, if there is one; first: where its rows begin in the parameter that changes.
    """

    source: Stored
    key: str
    edit: Edit | None = None
    first: int = 0


@dataclass(frozen=True)
class Plan:
    """Everything that a merge writes.

    Attributes:
        packed: the quantised weights; skeleton: the model; tasks: by the key of their source, beside which they land.
        untied: whether embedding and head are two weights from now on.
    """

    checkpoint: Checkpoint
    packed: Mapping[str, Packed]
    skeleton: Skeleton
    tasks: Mapping[str, Sequence[Task]]
    untied: bool

    def edits(self) -> Iterator[Edit]:
        found = {id(task.edit): task.edit for task in itertools.chain(*self.tasks.values()) if task.edit is not None}
        yield from found.values()


def plan(checkpoint: Checkpoint, files: Sequence[AdapterFile], weights: Sequence[float], strict: bool = True) -> Plan:
    """Check adapters against a checkpoint, and say what becomes of every tensor.

    Raises:
        Unstreamable: if a changed parameter does not lie in the files as the model holds it.
        NoTarget, KeyMismatch, WrongBase: if an adapter does not fit.
    """
    packed = packed_weights(checkpoint)
    draft = _Draft(checkpoint, packed, skeleton(checkpoint, packed, files))
    for file, weight in zip(files, weights, strict=True):
        draft.enter(file, weight, alone=len(files) == 1, strict=strict)
    tasks, untied = draft.placed()
    return Plan(checkpoint, packed, draft.frame, tasks, untied)


class _Draft:
    """The edits while they are gathered."""

    def __init__(self, checkpoint: Checkpoint, packed: Mapping[str, Packed], frame: Skeleton) -> None:
        self.checkpoint, self.packed, self.frame = checkpoint, packed, frame
        self.edits: dict[str, Edit] = {}
        self.paths: dict[nn.Module, list[str]] = defaultdict(list)
        for path, module in frame.model.named_modules(remove_duplicate=False):
            self.paths[module].append(path)
        self.state = {**_named(frame.model.named_parameters), **_named(frame.model.named_buffers)}
        self.sharing: dict[int, list[str]] = defaultdict(list)
        for name, tensor in self.state.items():
            self.sharing[id(tensor)].append(name)

    def enter(self, file: AdapterFile, weight: float, alone: bool, strict: bool) -> None:
        """What one adapter changes, checked against the model."""
        recipes = {path: recipe for path, recipe, _ in quantized_base.recipes_of(file)}
        # Nothing is quantised here and now: the base of such an adapter is made tensor by tensor.
        plain = {name: value for name, value in file.provenance.items() if name != "quantized"}
        loaded = plan_load(self.frame.model, replace(file, provenance=plain), strict)
        path_of = {site: path for path, site in sites_of(self.frame.model, file).items()}
        readers: dict[str, Callable[[], Tensor]] = {}
        for target, start in loaded.starts:
            path = path_of[target.module, target.parameter]
            name = self._own(target.module, matrix.weight_name(target.module, target.parameter))
            key = self._places(name, file)[0].key
            recipe = None if key in self.packed else recipes.get(path)
            if recipe is not None and not alone:
                raise BadOption(f"{file.folder} stands on a quantised base of its own: merge it alone")
            taken = None if recipe is None else quantized_base.taken_of(path, target, file)
            columns = columns_of(target.layout, self.state[name].shape)
            edit = self.edits.setdefault(name, Edit(target.name, columns, [], recipe, taken))
            edit.terms.append(Term(weight, start, target.layout))
            if key in self.packed and len(readers) < _LOOKED_AT:
                readers[path] = self.packed[key].values
        if strict:
            check_bases(readers, set(readers), file)
        for name, values in loaded.extras.items():
            here = self.state[name]
            self._places(name, file)
            edit = self.edits.setdefault(name, Edit(name, columns_of(Layout(), here.shape)))
            edit.terms.append(Term(weight, values))

    def _own(self, module: nn.Module, leaf: str) -> str:
        """The name of a module's parameter: of several, one that the files hold."""
        names = [f"{path}.{leaf}" if path else leaf for path in self.paths[module]]
        return next((name for name in names if self.frame.places.get(name)), names[0])

    def _places(self, name: str, file: AdapterFile) -> Sequence[Place]:
        """Where a parameter lies: under its own name, or under that of one that shares its memory."""
        for known in (name, *self.sharing[id(self.state[name])]):
            if self.frame.places.get(known):
                return self.frame.places[known]
        if name in self.frame.places:
            raise Unstreamable(f"{self.checkpoint.folder} holds {name!r} in another form than the model does")
        raise KeyMismatch(f"{self.checkpoint.folder} has no tensor for {name!r}, which {file.folder} changes")

    def placed(self) -> tuple[dict[str, list[Task]], bool]:
        """The tasks, and whether weights that were one are several from now on."""
        tasks: dict[str, list[Task]] = defaultdict(list)
        untied = False
        for name, edit in self.edits.items():
            if self.frame.places.get(name):
                for place in self.frame.places[name]:
                    tasks[place.key].append(Task(self.checkpoint.tensors[place.key], place.key, edit, place.first))
            for other in self._tied(name):
                untied = True
                self._check_tie(name, other)
        for name in self._without_own():
            place = next(
                self.frame.places[n][0] for n in self.sharing[id(self.state[name])] if self.frame.places.get(n)
            )
            source = self.checkpoint.tensors[place.key]
            if place.key not in tasks:  # What the shared one was stays where it is.
                tasks[place.key].append(Task(source, place.key))
            tasks[place.key].append(Task(source, self.frame.key_for(name, place), self.edits.get(name)))
        return dict(tasks), untied

    def _tied(self, name: str) -> list[str]:
        """The names of other modules' parameters that are the same one."""
        owner = self._module(name)
        return [n for n in self.sharing[id(self.state[name])] if self._module(n) is not owner]

    def _without_own(self) -> list[str]:
        """Parameters that need a tensor of their own now, and had none."""
        found: dict[int, str] = {}
        for changed in self.edits:
            for name in (changed, *self._tied(changed)):
                if not any(self.frame.places.get(f"{path}.{_leaf(name)}") for path in self.paths[self._module(name)]):
                    found.setdefault(id(self._module(name)), name)
        return list(found.values())

    def _module(self, name: str) -> nn.Module:
        return self.frame.model.get_submodule(name.rpartition(".")[0])

    def _check_tie(self, name: str, other: str) -> None:
        """A config can untie embedding and head, and nothing else."""
        model = self.frame.model
        ends = [getattr(model, end, None) for end in _ENDS]
        embeddings = {id(end()) for end in ends if callable(end)}
        if {id(self._module(name)), id(self._module(other))} != embeddings:
            raise Unstreamable(f"{name!r} shares its memory with {other!r}, and no config can say that it stopped to")


_ENDS = ("get_input_embeddings", "get_output_embeddings")


def _named(walk: Callable[..., Iterator[tuple[str, Tensor]]]) -> dict[str, Tensor]:
    return dict(walk(remove_duplicate=False))


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]

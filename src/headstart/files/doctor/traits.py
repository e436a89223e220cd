"""What an adapter has that some engine minds: each finds it in a survey, by name, or finds nothing."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from headstart.files.adapter import PREFIX
from headstart.files.doctor.survey import Survey
from headstart.files.peft_rules import OUTPUT

_HEADS = {"classifier", "score"}
Found = Sequence[str]
When = Callable[[Survey], Found]


def says(*fields: str) -> When:
    """The fields, of these, that are set."""
    return lambda survey: [f"{name}={survey.raw[name]!r:.60}" for name in fields if survey.raw.get(name)]


def starts(pattern: str) -> When:
    """The start, where its name is one of these."""
    return lambda survey: [survey.init] if re.fullmatch(pattern, survey.init) else []


def not_a_start_of(pattern: str) -> When:
    return lambda survey: [] if re.fullmatch(pattern, survey.init) else [survey.init]


def tensors(pattern: str, but: str = r"(?!)") -> When:
    """The tensors beside the factors that are called so."""
    return lambda survey: [n for n in survey.extras if re.search(pattern, n) and not re.search(but, n)]


def unaccounted(survey: Survey) -> Found:
    """The tensors beside the factors that no field of the config explains."""
    saved = "|".join(re.escape(str(name)) for name in survey.config.get("modules_to_save") or ()) or "(?!)"
    biases = r"|bias$" if survey.raw.get("bias") not in (None, "none") or survey.raw.get("lora_bias") else ""
    known = rf"\.base_layer\.weight$|({saved})\.|token_adapter\.trainable_tokens_delta$|\.lora_diag{biases}"
    return tensors("", but=known)(survey)


def unsaved(survey: Survey) -> Found:
    """The modules that the config says were trained in full, and of which the file has nothing."""
    named = [str(name) for name in survey.config.get("modules_to_save") or ()]
    # PEFT goes by the end of a module's name, dot or no dot.
    saved = {name for name in named if tensors(rf"{re.escape(name)}\.")(survey)}
    # PEFT adds both to every classifier's config, and a model has one of them.
    saved |= _HEADS if saved & _HEADS else set()
    return [name for name in named if name not in saved]


def magnitudes(survey: Survey) -> Found:
    return [layer.path for layer in survey.layers.values() if "magnitude" in layer.keys]


def without_magnitude(survey: Survey) -> Found:
    """The layers whose magnitude the config promises and the file lacks."""
    return [x.path for x in survey.layers.values() if survey.raw.get("use_dora") and "magnitude" not in x.keys]


def magnitude_untold(survey: Survey) -> Found:
    return [] if survey.raw.get("use_dora") else magnitudes(survey)


def untargeted(survey: Survey) -> Found:
    """The layers that the config's lists leave out or exclude. A stranger's regular expression is not run."""
    targets, excluded = (survey.raw.get(name) for name in ("target_modules", "exclude_modules"))
    named = targets if isinstance(targets, list) else ()
    every = not isinstance(targets, list) or "all-linear" in named or survey.raw.get("target_parameters")
    own = [x for x in survey.layers.values() if not x.path.endswith(OUTPUT)]

    def is_left_out(name: str) -> bool:
        if _listed(excluded, name):
            return True
        return not every and name not in named and not (_listed(targets, name) and _transformed(survey, name))

    return [x.path for x in own if is_left_out(x.name)]


def _transformed(survey: Survey, name: str) -> bool:
    """Whether a layer lies in a block that layers_to_transform counts, as PEFT reads the block's number."""
    wanted, lists = survey.raw.get("layers_to_transform"), survey.raw.get("layers_pattern")
    named = [str(entry) for entry in ([lists] if isinstance(lists, str) else lists or ())]
    if wanted in (None, []) or not all(entry.isidentifier() for entry in named):
        return True
    start = rf"(?:^|.*?\.)(?:{'|'.join(named)})" if named else r".*?\.[^.]*"
    block = re.match(rf"{start}\.(\d+)\.", name)
    return block is not None and int(block[1]) in (wanted if isinstance(wanted, list) else [wanted])


def _listed(entries: object, name: str) -> bool:
    return isinstance(entries, list) and any(name == one or name.endswith(f".{one}") for one in entries)


def other_rank_than_stated(survey: Survey) -> Found:
    return [x.path for x in survey.layers.values() if not x.experts and x.rank != x.stated]


def other_rank_than_r(survey: Survey) -> Found:
    return [x.path for x in survey.layers.values() if x.rank != survey.config["r"]]


def rank_above(limit: int) -> When:
    return lambda survey: (
        [f"rank {top}"] if (top := max((x.rank for x in survey.layers.values()), default=0)) > limit else []
    )


def rank_to_pad(survey: Survey) -> Found:
    """The ranks that LoRAX's kernels do not have, where more than one kind of layer is adapted."""
    kinds = {x.name.rpartition(".")[2] for x in survey.layers.values()}
    ranks = {x.rank for x in survey.layers.values() if padded(x.rank) != x.rank}
    return [f"rank {rank}" for rank in sorted(ranks)] if len(kinds) > 1 else []


def uneven_kinds(survey: Survey) -> Found:
    """The kinds of layer whose ranks differ from block to block, as LoRAX pads them."""
    ranks: dict[str, set[int]] = {}
    for layer in survey.layers.values():
        ranks.setdefault(layer.name.rpartition(".")[2], set()).add(padded(layer.rank))
    return [kind for kind, found in ranks.items() if len(found) > 1]


def padded(rank: int) -> int:
    """The next rank that LoRAX's kernels have: 8, or a multiple of 16."""
    return 8 if rank <= 8 else -(-rank // 16) * 16


def lacks(*fields: str) -> When:
    return lambda survey: [name for name in fields if survey.raw.get(name) is None] if survey.raw else []


def without_prefix(survey: Survey) -> Found:
    return [x.path for x in survey.layers.values() if not x.keys["A"].startswith(PREFIX)]


def targets_no_list(survey: Survey) -> Found:
    named = survey.raw.get("target_modules")
    fine = isinstance(named, list) or named in ("all", "all-linear")
    return [] if fine or not survey.raw else [f"target_modules={named!r:.60}"]


def of_pictures(survey: Survey) -> Found:
    """The layers whose names are those of diffusion pipelines."""
    known = r"(^|\.)(unet|text_encoder|down_blocks|mid_block|up_blocks|(single_)?transformer_blocks)\b|^lora_(unet|te)"
    return [path for path in survey.layers if re.search(known, path)]


def query_without_value(survey: Survey) -> Found:
    """Queries beside which no value is adapted: SGLang stacks the three."""
    queries = [path for path in survey.layers if path.endswith("q_proj")]
    return [path for path in queries if f"{path.removesuffix('q_proj')}v_proj" not in survey.layers]


def some_layers_only(survey: Survey) -> Found:
    """The kinds of layer that are not adapted in every block that is adapted at all."""
    blocks: dict[str, set[str]] = {}
    for layer in survey.layers.values():
        if match := re.fullmatch(r"(?:.*\.)?(?:layers|h|blocks)\.(\d+)\.(.+)", layer.name):
            blocks.setdefault(match[2], set()).add(match[1])
    every = set().union(*blocks.values()) if blocks else set()
    # Blocks are counted from zero: what the last adapted block follows must be adapted as well.
    complete = {str(i) for i in range(max(map(int, every)) + 1)} if every else set()
    partial = {kind for kind, numbers in blocks.items() if numbers != complete}
    return [path for path in survey.layers if any(path.endswith(f".{kind}") for kind in partial)]


def embeddings(survey: Survey) -> Found:
    return [layer.path for layer in survey.layers.values() if layer.embedding]


def heads(survey: Survey) -> Found:
    return [path for path in survey.layers if path.endswith("lm_head")]


def added_tokens(survey: Survey) -> Found:
    return [name for name in survey.neighbours if name == "added_tokens.json"]


def no_base_name(survey: Survey) -> Found:
    return [] if survey.raw.get("base_model_name_or_path") else ["base_model_name_or_path"]

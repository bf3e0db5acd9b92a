"""T5's three mixing strategies and UniMax, and mixtures of C4, GLUE and SQuAD.

  proportional   min(examples, K): examples-proportional mixing with artificial limit K
  temperature    min(examples, K)^(1/T): T = 1 is proportional, a large T nearly equal
  equal          the same rate for each task
  unimax         equal, but no task is repeated more than `max_epochs` times within the budget of examples

Rates are computed from the published example counts below, without reading data. Sources: T5 paper, section 3.5.2;
UniMax: Chung et al. 2023 (arXiv 2304.09151), algorithm 1, as used for UMT5.

Mixtures are registered for the sets `glue_v002`, `glue_squad` and `c4_glue_squad` as SET_proportional (K = 2^19, the
paper's choice for multi-task training), SET_proportional_k16 ... _k21 (K = 2^16 ... 2^21), SET_temperature_2, _4 and
_8 (K = 2^21) and SET_equal. As in t5, GLUE excludes WNLI, and MNLI's two dev sets and AX have rate 0: they are
evaluated but not trained on.

For leave-one-out training (section 3.5.3), SET_leave_out_TASK is SET_proportional without one task: `_leave_out_mnli`,
`_leave_out_squad`, `_leave_out_c4` ..., and `_leave_out_glue` without all of GLUE. `python -m tasks.mixtures` prints
the share of each task in any of these, or in your own list of tasks.

Must not import: text, files, models.
"""

import difflib
import math
from collections.abc import Iterable, Mapping
from typing import Literal, get_args

import seqio

from tasks import c4, glue, squad  # noqa: F401  registers the tasks of the mixtures below
from tasks.errors import UserError

Strategy = Literal["proportional", "temperature", "equal", "unimax"]

MULTI_TASK_LIMIT = 2**19
TEMPERATURE_LIMIT = 2**21

# Published numbers of training examples. Other tasks on the same source, such as other objectives on C4, have the same
# count (`train_examples`). WSC's are its true examples, and ReCoRD has one for each answer. QQP's count is that of the
# release used by t5 (the current one has three fewer).
TRAIN_EXAMPLES: dict[str, int] = {
    "c4_v220_span_corruption": 364_868_892,
    "c4_v020_unsupervised": 364_868_892,
    "glue_cola_v002": 8_551,
    "glue_sst2_v002": 67_349,
    "glue_mrpc_v002": 3_668,
    "glue_qqp_v002": 363_849,
    "glue_stsb_v002": 5_749,
    "glue_mnli_v002": 392_702,
    "glue_qnli_v002": 104_743,
    "glue_rte_v002": 2_490,
    "glue_wnli_v002": 635,
    "glue_mnli_matched_v002": 0,
    "glue_mnli_mismatched_v002": 0,
    "glue_ax_v002": 0,
    "squad_v010_allanswers": 87_599,
    "squad_v110": 87_599,
    "squad_v010_context_free": 87_599,
    "cnn_dailymail_v002": 287_113,
    "wmt_t2t_ende_v003": 4_592_289,
    "wmt15_enfr_v003": 40_853_298,
    "wmt16_enro_v003": 610_320,
    "dpr_v001_simple": 1_322,
    "super_glue_boolq_v102": 9_427,
    "super_glue_cb_v102": 250,
    "super_glue_copa_v102": 400,
    "super_glue_multirc_v102": 27_243,
    "super_glue_record_v102": 138_854,
    "super_glue_rte_v102": 2_490,
    "super_glue_wic_v102": 5_428,
    "super_glue_wsc_v102_simple_train": 259,
    "super_glue_wsc_v102_simple_eval": 0,
    "super_glue_axb_v102": 0,
    "super_glue_axg_v102": 0,
    "trivia_qa_v010": 138_384,
    "trivia_qa_open": 78_785,
    "trivia_qa_open_test": 98_935,
    "natural_questions_open": 79_168,
    "natural_questions_open_test": 87_925,
    "web_questions_open": 3_417,
    "web_questions_open_test": 3_778,
}

GLUE = tuple(f"glue_{name}_v002" for name in ("cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte"))
GLUE_EVALUATED_ONLY = tuple(f"glue_{name}_v002" for name in ("mnli_mismatched", "mnli_matched", "ax"))
SETS = {
    "glue_v002": GLUE,
    "glue_squad": (*GLUE, "squad_v010_allanswers"),
    "c4_glue_squad": ("c4_v220_span_corruption", *GLUE, "squad_v010_allanswers"),
}


def rates(
    tasks: Iterable[str] | Mapping[str, float],
    strategy: Strategy = "proportional",
    limit: float | None = None,
    temperature: float = 1.0,
    scale: float = 1.0,
    budget: float | None = None,
    max_epochs: float | None = None,
) -> dict[str, float]:
    """Return the share of each task: (min(examples * scale, limit))^(1 / temperature), normalised to sum 1.

    UniMax shares the budget equally, and what a task cannot use within its epochs goes to the others.

    Args:
      tasks: names with a published count (`TRAIN_EXAMPLES`), or a mapping of any names to example counts.
      strategy: "proportional", "temperature", "unimax", or "equal" (which takes none of the settings below).
      limit: the artificial limit K on a task's examples; None for no limit.
      temperature: T, only for strategy "temperature".
      scale: factor on the counts, applied before the limit.
      budget: number of examples to be drawn in all (any unit that the counts have), only for "unimax".
      max_epochs: passes over a task's examples at most, only for "unimax"; None: 1, as for UMT5.

    Returns:
      Probabilities by task, in the given order.

    Raises:
      UserError: unknown tasks, counts below 0 or all 0, or settings that are out of range or of another strategy.
    """
    raw = raw_rates(tasks, strategy, limit, temperature, scale, budget, max_epochs)
    total = math.fsum(raw.values())
    if not total:
        raise UserError(f"none of {', '.join(raw)} has training examples: there is nothing to sample from")
    return {name: rate / total for name, rate in raw.items()}


def raw_rates(
    tasks: Iterable[str] | Mapping[str, float],
    strategy: Strategy = "proportional",
    limit: float | None = None,
    temperature: float = 1.0,
    scale: float = 1.0,
    budget: float | None = None,
    max_epochs: float | None = None,
) -> dict[str, float]:
    """Like `rates`, before normalisation: proportional and UniMax rates are numbers of examples, equal rates 1."""
    counts = dict(tasks) if isinstance(tasks, Mapping) else _published(tasks)
    if not counts:
        raise UserError("no tasks to mix")
    for name, count in counts.items():
        if not (math.isfinite(count) and count >= 0):
            raise UserError(f"task {name} has {count} examples; counts are finite and at least 0")
    if strategy not in get_args(Strategy):
        raise UserError(f"strategy {strategy!r}: use 'proportional', 'temperature', 'equal' or 'unimax'")
    if limit is not None and not limit > 0:
        raise UserError(f"limit K = {limit}: it must be above 0, or None for no limit")
    if not (math.isfinite(temperature) and temperature > 0):
        raise UserError(f"temperature T = {temperature}: it must be finite and above 0 (1 is proportional)")
    if not (math.isfinite(scale) and scale > 0):
        raise UserError(f"scale {scale}: it must be finite and above 0")
    if strategy != "temperature" and temperature != 1:
        raise UserError(f"temperature {temperature} needs strategy='temperature', not {strategy!r}")
    if strategy == "unimax":
        if limit is not None or scale != 1:
            raise UserError("strategy 'unimax' caps the epochs (max_epochs): it takes no limit and no scale")
        return _unimax(counts, budget, 1.0 if max_epochs is None else max_epochs)
    if budget is not None or max_epochs is not None:
        raise UserError(f"budget and max_epochs are for strategy 'unimax', not {strategy!r}")
    if strategy == "equal":
        if limit is not None or scale != 1:
            raise UserError("strategy 'equal' gives each task the same rate: it takes no limit and no scale")
        return dict.fromkeys(counts, 1.0)
    try:
        return {name: min(count * scale, limit or math.inf) ** (1 / temperature) for name, count in counts.items()}
    except OverflowError:
        raise UserError(f"temperature T = {temperature} is too small for these counts") from None


def _unimax(counts: Mapping[str, float], budget: float | None, max_epochs: float) -> dict[str, float]:
    """Return how much of the budget each task gets: the smallest first, each at most an equal part of what is left.

    A budget that all tasks together cannot use within their epochs is not used up, and the rates are proportional.
    """
    if budget is None or not (math.isfinite(budget) and budget > 0):
        raise UserError(f"strategy 'unimax' needs a budget of examples above 0, not {budget}")
    if not max_epochs > 0:
        raise UserError(f"max_epochs {max_epochs}: it must be above 0")
    shares, left = {}, budget
    for k, name in enumerate(sorted(counts, key=lambda name: counts[name])):
        shares[name] = min(counts[name] * max_epochs, left / (len(counts) - k))
        left -= shares[name]
    return {name: shares[name] for name in counts}


def train_examples(name: str) -> int | None:
    """Return the published number of training examples of a task, or of one on the same source; None if unknown."""
    if name in TRAIN_EXAMPLES or name not in seqio.TaskRegistry.names():
        return TRAIN_EXAMPLES.get(name)
    source = seqio.TaskRegistry.get(name).source
    for task, count in TRAIN_EXAMPLES.items():
        if task in seqio.TaskRegistry.names() and seqio.TaskRegistry.get(task).source is source:
            return count
    return None


def _published(names: Iterable[str]) -> dict[str, float]:
    if isinstance(names, str):
        raise UserError(f"give a list of task names, not the single string {names!r}")
    counts = {}
    for name in names:
        count = train_examples(name)
        if count is None:
            near = difflib.get_close_matches(name, TRAIN_EXAMPLES, n=3)
            hint = f"did you mean {', '.join(near)}?" if near else f"known: {', '.join(TRAIN_EXAMPLES)}."
            raise UserError(f"no published example count for task {name!r}; {hint} Or give a mapping of name to count")
        counts[name] = count
    return counts


def add_mixture(name: str, task_rates: Mapping[str, float]) -> seqio.Mixture:
    """Register a mixture; with GLUE's MNLI, its dev sets and AX are added at rate 0, for evaluation."""
    extra = GLUE_EVALUATED_ONLY if "glue_mnli_v002" in task_rates else ()
    return seqio.MixtureRegistry.add(name, [*task_rates.items(), *((task, 0.0) for task in extra)])


for _set, _tasks in SETS.items():
    # Proportional rates are the capped counts, as in t5: SeqIO divides them by their sum.
    add_mixture(f"{_set}_proportional", raw_rates(_tasks, limit=MULTI_TASK_LIMIT))
    for _k in range(16, 22):
        add_mixture(f"{_set}_proportional_k{_k}", raw_rates(_tasks, limit=2**_k))
    for _t in (2, 4, 8):
        add_mixture(f"{_set}_temperature_{_t}", rates(_tasks, "temperature", TEMPERATURE_LIMIT, _t))
    add_mixture(f"{_set}_equal", rates(_tasks, "equal"))
    _parts = {task.split("_")[1 if task in GLUE else 0]: {task} for task in _tasks}  # cola, ..., squad, c4
    for _part, _without in {**_parts, "glue": set(GLUE)}.items():
        if _rest := [task for task in _tasks if task not in _without]:
            add_mixture(f"{_set}_leave_out_{_part}", raw_rates(_rest, limit=MULTI_TASK_LIMIT))

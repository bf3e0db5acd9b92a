"""T5's mixtures of all its tasks, under the t5 package's names: `all_mix`, `super_glue_v102_proportional`, ...

The rates are t5's. Where it asks TFDS for a number of examples, these are the published ones (`TRAIN_EXAMPLES`; for
GLUE and SuperGLUE those of t5's own weights, which count examples after preprocessing). t5 leaves them without a limit
until gin sets one; NAME_k19 has the paper's limit, 2^19. Must not import: text, files, models.
"""

from collections.abc import Iterable

import seqio

from tasks import c4, closed_book, cnn_dailymail, squad, super_glue, trivia_qa, winograd, wmt  # noqa: F401  tasks
from tasks.mixtures import GLUE, GLUE_EVALUATED_ONLY, MULTI_TASK_LIMIT, raw_rates
from tasks.sentinels import twin_name

C4 = "c4_v020_unsupervised"
C4_RATE = 1e6  # t5's rate_unsupervised
CNN, SQUAD = "cnn_dailymail_v002", "squad_v010_allanswers"
EN_DE, EN_FR, EN_RO = "wmt_t2t_ende_v003", "wmt15_enfr_v003", "wmt16_enro_v003"
WINOGRAD = ("dpr_v001_simple", "super_glue_wsc_v102_simple_train", "super_glue_wsc_v102_simple_eval")
SUPER_GLUE = (
    *WINOGRAD,
    *(f"super_glue_{name}_v102" for name in ("boolq", "cb", "copa", "multirc", "record", "rte", "wic", "axb", "axg")),
)
_GLUE = (*GLUE, *GLUE_EVALUATED_ONLY)
SUPERVISED = (*_GLUE, *SUPER_GLUE, CNN, SQUAD, EN_DE, EN_FR, EN_RO)
# What is left out, one at a time. GLUE and SuperGLUE count as one task each.
LEFT_OUT = {
    "glue_v002_proportional": _GLUE,
    "super_glue_v102_proportional": SUPER_GLUE,
    **{task: (task,) for task in (CNN, SQUAD, EN_DE, EN_FR, EN_RO)},
}
_IN_BOTH = ("glue_rte_v002", "super_glue_rte_v102")  # the same examples
Rates = dict[str, float]


def _each_once(rates: Rates) -> Rates:
    """Halve the rates of RTE, which is in GLUE and in SuperGLUE."""
    return {task: rate / 2 if task in _IN_BOTH else rate for task, rate in rates.items()}


def _equal(tasks: Iterable[str]) -> Rates:
    return raw_rates(tasks, "equal")


_ALL = raw_rates((*SUPERVISED, C4))
MIXTURES: dict[str, Rates] = {
    "super_glue_v102_proportional": raw_rates(SUPER_GLUE),
    "super_glue_v102_proportional_sentinel": {twin_name(task): rate for task, rate in raw_rates(SUPER_GLUE).items()},
    "wsc_dpr_simple_proportional": raw_rates(WINOGRAD),
    "glue_mnli_and_dev_v002": _equal(task for task in _GLUE if "mnli" in task),
    "en_mix": raw_rates((C4, *_GLUE, *SUPER_GLUE, SQUAD)) | {C4: C4_RATE},
    "all_equal": _equal(_ALL),
    "all_proportional": _each_once(_ALL),
    "all_mix": _each_once(_ALL) | {C4: C4_RATE},
    "large_supervised_equal": _equal((EN_DE, EN_FR, CNN)),
    "large_supervised_proportional": raw_rates((EN_DE, EN_FR, CNN)),
    "large_translation_equal": _equal((EN_DE, EN_FR)),
    "squad_trivia_qa_equal": _equal((SQUAD, "trivia_qa_v010")),
    "closed_book_qa": raw_rates(("trivia_qa_open", "natural_questions_open", "web_questions_open")),
    "closed_book_qa_test": raw_rates(("trivia_qa_open_test", "natural_questions_open_test", "web_questions_open_test")),
}
for _name, _tasks in LEFT_OUT.items():
    _rates = _ALL if "glue" in _name else _each_once(_ALL)  # without one of the two, RTE is there once
    MIXTURES[f"leave_one_out_{_name}"] = {task: rate for task, rate in _rates.items() if task not in _tasks}
for _name, _rates in [*MIXTURES.items()]:
    _limited = {task: min(rate, MULTI_TASK_LIMIT) for task, rate in _rates.items()}
    if _limited != _rates and _rates.get(C4) != C4_RATE:
        MIXTURES[f"{_name}_k19"] = _limited

for _name, _rates in MIXTURES.items():
    seqio.MixtureRegistry.add(_name, list(_rates.items()))

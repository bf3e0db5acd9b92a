"""Mixtures for `make study`: six GLUE tasks, in three proportions of the training rows that there really are."""

import seqio

import tasks  # noqa: F401  registers GLUE
from tasks import mixtures

GLUE = tuple(f"glue_{name}_v002" for name in ("cola", "sst2", "mrpc", "stsb", "qnli", "rte"))

_rows = {name: seqio.TaskRegistry.get(name).source.num_input_examples("train") for name in GLUE}
counts: dict[str, float] = {name: rows for name, rows in _rows.items() if rows is not None}

mixtures.add_mixture("study_proportional", mixtures.rates(counts))
mixtures.add_mixture("study_temperature_2", mixtures.rates(counts, "temperature", temperature=2))
mixtures.add_mixture("study_equal", mixtures.rates(counts, "equal"))

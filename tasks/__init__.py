"""SeqIO tasks and mixtures under T5's names. `import tasks` registers them without reading data.

Must not import: t5x_lite, JAX.
"""

import tasks.mixtures.t5  # noqa: F401
from tasks import (
    bert,
    c4,
    closed_book,
    cnn_dailymail,
    glue,
    glue_classes,
    mc4,
    mixtures,
    quickstart,
    readers,
    squad,
    super_glue,
    trivia_qa,
    user_files,
    vocabulary,
    wikipedia,
    winograd,
    wmt,
)

__all__ = [
    "bert",
    "c4",
    "closed_book",
    "cnn_dailymail",
    "glue",
    "glue_classes",
    "mc4",
    "mixtures",
    "quickstart",
    "readers",
    "squad",
    "super_glue",
    "trivia_qa",
    "user_files",
    "vocabulary",
    "wikipedia",
    "winograd",
    "wmt",
]

"""SeqIO tasks and mixtures under T5's names. `import tasks` registers them without reading data.

Must not import: t5x_lite, JAX.
"""

from tasks import (
    bert,
    c4,
    cnn_dailymail,
    glue,
    glue_bert,
    mixtures,
    quickstart,
    readers,
    squad,
    super_glue,
    user_files,
    vocabulary,
    winograd,
)

__all__ = [
    "bert",
    "c4",
    "cnn_dailymail",
    "glue",
    "glue_bert",
    "mixtures",
    "quickstart",
    "readers",
    "squad",
    "super_glue",
    "user_files",
    "vocabulary",
    "winograd",
]

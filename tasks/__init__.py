"""Tasks and mixtures under the names T5 users know. `import tasks` fills SeqIO's registries and reads no data.

Must not know: t5x_lite, JAX.
"""

from tasks import bert, c4, cnn_dailymail, glue, glue_bert, mixtures, quickstart, readers, squad, user_files, vocabulary

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
    "user_files",
    "vocabulary",
]

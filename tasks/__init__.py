"""Tasks and mixtures under the names T5 users know. `import tasks` fills SeqIO's registries and reads no data.

Must not know: t5x_lite, JAX.
"""

from tasks import bert, c4, cnn_dailymail, files, formats, glue, glue_bert, mixtures, quickstart, squad, vocabulary

__all__ = [
    "bert",
    "c4",
    "cnn_dailymail",
    "files",
    "formats",
    "glue",
    "glue_bert",
    "mixtures",
    "quickstart",
    "squad",
    "vocabulary",
]

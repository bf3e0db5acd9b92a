"""English Wikipedia of 2019-03-01 under t5's name, with span corruption.

Reads TFDS wikipedia/20190301.en:1.0.0, or articles extracted from the dump, as JSON Lines with `text`:
wikipedia/20190301.en/train*.json*. In t5 gin sets the objective; here it has that of the final T5, as C4. Must not
import: mixtures.
"""

from tasks import c4, objectives

c4.add(
    "wikipedia_20190301.en_v003_unsupervised",
    objectives.span_corruption,
    c4.documents("wikipedia/20190301.en", {"train": "train*.json*"}, "wikipedia/20190301.en:1.0.0"),
)

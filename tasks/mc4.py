"""Multilingual C4 by language under mT5's names, `mc4.de`: span corruption.

Reads c4/multilingual/c4-de.tfrecord-*.json.gz and c4-de-validation.tfrecord-*.json.gz, as Hugging Face's copy names
them, or TFDS c4/multilingual:3.0.1. The vocabulary is the run's, so mT5's is given as VOCABULARY. Must not import:
mixtures.
"""

from tasks import c4, objectives

LANGUAGES = (
    "af am ar az be bg bg-Latn bn ca ceb co cs cy da de el el-Latn en eo es et eu fa fi fil fr fy ga gd gl gu ha haw "
    "hi hi-Latn hmn ht hu hy id ig is it iw ja ja-Latn jv ka kk km kn ko ku ky la lb lo lt lv mg mi mk ml mn mr ms mt "
    "my ne nl no ny pa pl ps pt ro ru ru-Latn sd si sk sl sm sn so sq sr st su sv sw ta te tg th tr uk ur uz vi xh yi "
    "yo zh zh-Latn zu"
).split()

for _language in LANGUAGES:
    _files = {
        "train": f"c4-{_language}.tfrecord-*.json.gz",
        "validation": f"c4-{_language}-validation.tfrecord-*.json.gz",
    }
    c4.add(
        f"mc4.{_language.replace('-', '_')}",
        objectives.span_corruption,
        c4.documents(
            "c4/multilingual",
            _files,
            "c4/multilingual:3.0.1",
            {"train": _language, "validation": f"{_language}-validation"},
        ),
    )

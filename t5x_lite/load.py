"""python -m t5x_lite.load PATH: the command of pretrained.py.

In Python `t5x_lite.load` is the function `pretrained.load`.
"""

import sys

from t5x_lite.inference.pretrained import LoadedModel as LoadedModel
from t5x_lite.inference.pretrained import load as load
from t5x_lite.inference.pretrained import main

if __name__ == "__main__":
    sys.exit(main())

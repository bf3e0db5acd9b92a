"""python -m t5x_lite.load PATH: the command of inference/pretrained.py. In Python, `t5x_lite.load` is a function."""

import sys

from t5x_lite.inference.pretrained import main

if __name__ == "__main__":
    sys.exit(main())

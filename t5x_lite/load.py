"""The command `python -m t5x_lite.load PATH`, see inference/pretrained.py; `t5x_lite.load` is a function in Python."""

import sys

from t5x_lite.inference.pretrained import main

if __name__ == "__main__":
    sys.exit(main())

"""python -m t5x_lite.features MODEL TASK: the command of linear_probe.py."""

import sys

from t5x_lite.linear_probe import main

if __name__ == "__main__":
    sys.exit(main())

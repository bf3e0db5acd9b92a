"""Alias of `python -m t5x_lite.linear_probe MODEL TASK`."""

import sys

from t5x_lite.linear_probe import main

if __name__ == "__main__":
    sys.exit(main())

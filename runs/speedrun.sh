#!/bin/sh
# A T5 of 11.5 million parameters from nothing, on two cores: ten minutes of training, then what C4's validation text
# costs it. This script is the record to beat; benchmarks/LOG.md has all records, and what did not help.
#
#   runs/speedrun.sh                                        the record
#   runs/speedrun.sh NAME RUN_FLAG... [-- RUN_FLAG...]      another recipe: flags of run.py; -- begins a run that starts
#                                                           from the one before it. NAME is done once.
# Results are in runs/speedrun/results.jsonl; benchmarks/speedrun.py says what is measured. Needs T5X_LITE_DATA_DIR.
set -eu
cd "$(dirname "$0")/.."
if [ $# -eq 0 ]; then
  # The recipe of `make study`, cut to a tenth of its steps.
  set -- study \
    --gin_file=study/pretrain.gin --gin_file=study/short_rows.gin --gin.TRAIN_STEPS=190 -- \
    --gin_file=study/pretrain.gin --gin.TRAIN_STEPS=380
fi
exec "${PYTHON:-.venv/bin/python}" benchmarks/speedrun.py "$@"

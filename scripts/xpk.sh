#!/usr/bin/env bash
# Trains on TPU slices in Google Kubernetes Engine through XPK (pip install xpk; github.com/AI-Hypercomputer/xpk).
#
#   scripts/xpk.sh create --cluster=t5 --zone=us-west4-a --project=P --type=v5litepod-16 --slices=2
#   scripts/xpk.sh run    --cluster=t5 --zone=us-west4-a --project=P --type=v5litepod-16 --slices=2 -- \
#       --gin_file=models/t5_1_1/xl.gin --gin_file=mesh/multislice.gin --gin_file=runs/pretrain.gin \
#       --gin.MODEL_DIR="'gs://my-bucket/xl'"
#   scripts/xpk.sh delete --cluster=t5 --zone=us-west4-a --project=P
#
# create  makes a cluster of spot slices.
# run     starts `python run.py ARGUMENTS` on every host, from this folder. Kubernetes starts it again where a host is
#         lost, and it resumes from the last checkpoint in its MODEL_DIR.
# delete  gives the cluster back.
#
# --dry_run prints each xpk command instead.
set -euo pipefail

refuse() {
  echo "xpk.sh: $*" >&2
  exit 2
}

[[ $# -gt 0 ]] || refuse "say create, run or delete; see the head of this file"
action=$1
shift
cluster="" type="" slices=1 dry_run="" where=() arguments=()
while [[ $# -gt 0 ]]; do
  case $1 in
    --cluster=*) cluster=${1#*=} ;;
    --zone=* | --project=*) where+=("$1") ;;
    --type=*) type=${1#*=} ;;
    --slices=*) slices=${1#*=} ;;
    --dry_run) dry_run=yes ;;
    --)
      shift
      arguments=("$@")
      break
      ;;
    *) refuse "unknown option $1 (arguments of run.py come behind --)" ;;
  esac
  shift
done
[[ -n $cluster && ${#where[@]} -eq 2 ]] || refuse "$action needs --cluster, --zone and --project"
[[ $action == delete || -n $type ]] || refuse "$action needs --type, such as v5litepod-16"

xpk() {
  if [[ -n $dry_run ]]; then
    printf 'xpk' && printf ' %q' "$@" && printf '\n'
  else
    command xpk "$@"
  fi
}

case $action in
  create)
    xpk cluster create "--cluster=$cluster" "${where[@]}" "--tpu-type=$type" "--num-slices=$slices" --spot
    ;;
  run)
    [[ ${#arguments[@]} -gt 0 ]] || refuse "run needs the arguments of run.py behind --"
    command=$(printf ' %q' "${arguments[@]}")
    xpk workload create "--cluster=$cluster" "${where[@]}" "--workload=t5x-lite-$(date +%m%d%H%M)" \
      "--tpu-type=$type" "--num-slices=$slices" --base-docker-image=python:3.12 --script-dir=. --max-restarts=100 \
      "--command=pip install -q -r requirements-tpu.txt -c constraints.txt && python run.py$command"
    ;;
  delete) xpk cluster delete "--cluster=$cluster" "${where[@]}" ;;
  *) refuse "unknown command $action: create, run or delete" ;;
esac

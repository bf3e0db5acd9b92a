#!/usr/bin/env bash
# Trains on a Cloud TPU VM, of one host or of many: every command goes to all of them.
#
#   scripts/tpu_vm.sh create --name=t5 --zone=us-west4-a --type=v5litepod-8 [--spot] [--queued]
#   scripts/tpu_vm.sh setup  --name=t5 --zone=us-west4-a
#   scripts/tpu_vm.sh run    --name=t5 --zone=us-west4-a -- --gin_file=models/t5_1_1/base.gin --gin_file=runs/pretrain.gin
#   scripts/tpu_vm.sh logs   --name=t5 --zone=us-west4-a
#   scripts/tpu_vm.sh delete --name=t5 --zone=us-west4-a
#
# create  rents the machine; --queued waits for it in Google's queue, --spot takes one that may be taken back.
# setup   copies this repository as committed (HEAD) and installs it with JAX for TPU.
# run     starts `python run.py ARGUMENTS` on every host, in a tmux session that outlives this connection, with
#         --data=FOLDER as T5X_LITE_DATA_DIR, such as gs://my-bucket/data.
# logs    follows what the first host prints. Stop with Ctrl-C; the run goes on.
# stop    ends the run on every host.
# resume  where the machine was taken back: create, setup and run again, with the same options and arguments as for
#         these. The run resumes from its last checkpoint, if its MODEL_DIR is in a bucket (gs://...). Nothing is done while
#         the machine is there and the run is on. --every=SECONDS looks again and again until the run has ended by itself.
# delete  gives the machine back.
#
# --project=P, --version=RUNTIME (the VM's image) are for all. --dry_run prints each gcloud command instead.
set -euo pipefail

usage() {
  sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"
}

refuse() {
  echo "tpu_vm.sh: $*" >&2
  exit 2
}

[[ $# -gt 0 ]] || { usage >&2; exit 2; }
case $1 in -h | --help | help) usage; exit 0 ;; esac
action=$1
shift

name="" zone="" type="" version="" data="" project=() spot=() queued="" every="" dry_run="" arguments=()
while [[ $# -gt 0 ]]; do
  case $1 in
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --version=*) version=${1#*=} ;;
    --data=*) data=${1#*=} ;;
    --project=*) project=("--project=${1#*=}") ;;
    --every=*) every=${1#*=} ;;
    --spot) spot=(--spot) ;;
    --queued) queued=yes ;;
    --dry_run) dry_run=yes ;;
    --)
      shift
      arguments=("$@")
      break
      ;;
    *) refuse "unknown option $1; see scripts/tpu_vm.sh --help (arguments of run.py come behind --)" ;;
  esac
  shift
done
[[ -n $name && -n $zone ]] || refuse "$action needs --name and --zone"
where=("--zone=$zone" ${project[@]+"${project[@]}"})

# The image that goes with each chip: cloud.google.com/tpu/docs/runtimes.
if [[ -z $version ]]; then
  case $type in
    v5litepod-*) version=v2-alpha-tpuv5-lite ;;
    v5p-*) version=v2-alpha-tpuv5 ;;
    v6e-*) version=v2-alpha-tpuv6e ;;
    *) version=tpu-ubuntu2204-base ;;
  esac
fi

cloud() {
  if [[ -n $dry_run ]]; then
    printf 'gcloud' && printf ' %q' "$@" && printf '\n'
  else
    gcloud "$@"
  fi
}

on_all() { cloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker=all --command="$1"; }

# The machine's state, such as READY or PREEMPTED; nothing if there is none.
state() {
  gcloud compute tpus tpu-vm describe "$name" "${where[@]}" --format='value(state)' 2>/dev/null || true
}

create() {
  [[ -n $type ]] || refuse "$action needs --type, such as v5litepod-8, v4-128, v5p-16 or v6e-8"
  if [[ -z $queued ]]; then
    cloud compute tpus tpu-vm create "$name" "${where[@]}" \
      "--accelerator-type=$type" "--version=$version" ${spot[@]+"${spot[@]}"}
    return
  fi
  cloud compute tpus queued-resources create "$name" "${where[@]}" "--node-id=$name" \
    "--accelerator-type=$type" "--runtime-version=$version" ${spot[@]+"${spot[@]}"}
  [[ -z $dry_run ]] || return 0
  local now=""
  until [[ $now == ACTIVE ]]; do
    now=$(gcloud compute tpus queued-resources describe "$name" "${where[@]}" --format='value(state.state)')
    case $now in
      FAILED | SUSPENDED) refuse "the queued resource $name is $now: tpu_vm.sh delete --queued, then create again" ;;
      ACTIVE) ;;
      *) echo "queued: $now" && sleep 30 ;;
    esac
  done
}

setup() {
  local here archive
  here=$(git -C "$(dirname "$0")" rev-parse --show-toplevel)
  archive=$(mktemp -d)/t5x_lite.tar.gz
  git -C "$here" archive --format=tar.gz --output="$archive" HEAD
  cloud compute tpus tpu-vm scp "$archive" "$name:t5x_lite.tar.gz" "${where[@]}" --worker=all
  rm -r "$(dirname "$archive")"
  # uv brings a Python of its own: the images have 3.10, which is too old.
  on_all "mkdir -p t5x_lite && tar -xzf t5x_lite.tar.gz -C t5x_lite && cd t5x_lite &&\
 python3 -m pip install --quiet --user uv &&\
 ~/.local/bin/uv venv --quiet --allow-existing --python 3.12 .venv &&\
 ~/.local/bin/uv pip install --quiet -r requirements-tpu.txt -c constraints.txt"
}

run() {
  [[ ${#arguments[@]} -gt 0 ]] || refuse "$action needs the arguments of run.py behind --"
  local job
  job=$(mktemp -d)/job.sh
  {
    echo 'cd ~/t5x_lite || exit'
    [[ -z $data ]] || printf 'export T5X_LITE_DATA_DIR=%q\n' "$data"
    printf '.venv/bin/python run.py'
    printf ' %q' "${arguments[@]}"
    # The exit code of the last run, for `resume`; none while it is on.
    printf ' >> ~/job.log 2>&1\necho $? > ~/job.exit\n'
  } >"$job"
  [[ -z $dry_run ]] || sed 's/^/# job.sh: /' "$job"
  cloud compute tpus tpu-vm scp "$job" "$name:job.sh" "${where[@]}" --worker=all
  rm -r "$(dirname "$job")"
  on_all "rm -f job.exit && tmux new-session -d -s t5x_lite 'bash job.sh'"
}

# Whether a run is on, or has ended with which code: "on", "0", "1" ..., or nothing.
progress() {
  gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker=0 \
    --command="tmux has-session -t t5x_lite 2>/dev/null && echo on || cat job.exit 2>/dev/null || true" || true
}

# Once: 0 if the run has ended, 1 if it is on, or is to be.
look() {
  local now on=""
  now=$(state)
  case $now in
    READY)
      on=$(progress)
      case $on in
        on) echo "$name is READY and the run is on" && return 1 ;;
        0) echo "the run has ended" && return 0 ;;
        2) refuse "the run was refused (exit code 2), and would be again: see tpu_vm.sh logs" ;;
      esac
      echo "$name is READY and the run is not on (exit code: ${on:-none}): starting it"
      run || echo "could not start it" >&2
      ;;
    CREATING | STARTING | RESTARTING | REPAIRING) echo "$name is $now" ;;
    *)
      echo "$name is ${now:-not there}: making it again"
      if [[ -n $now || -n $queued ]]; then delete || true; fi
      { create && setup && run; } || echo "could not make it" >&2  # no capacity, say
      ;;
  esac
  return 1
}

resume() {
  [[ ${#arguments[@]} -gt 0 && -n $type ]] || refuse "resume needs --type and, behind --, the arguments of run.py"
  if [[ -n $dry_run ]]; then
    cloud compute tpus tpu-vm describe "$name" "${where[@]}" '--format=value(state)'
    echo "# and if that says PREEMPTED or nothing:"
    delete && create && setup && run
    return
  fi
  until look; do
    [[ -n $every ]] || return 0
    sleep "$every"
  done
}

delete() {
  if [[ -n $queued ]]; then
    cloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet
  else
    cloud compute tpus tpu-vm delete "$name" "${where[@]}" --quiet
  fi
}

case $action in
  create | setup | run | resume | delete) "$action" ;;
  logs) cloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker=0 --command="tail -n 50 -F job.log" ;;
  stop) on_all "tmux kill-session -t t5x_lite" ;;
  *) refuse "unknown command $action: create, setup, run, logs, stop, resume or delete" ;;
esac

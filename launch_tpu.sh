#!/usr/bin/env bash
# Starts a run on TPUs, or on this machine, and brings it back after a preemption.
#
#   bash launch_tpu.sh VERB --config=FILE --workdir=DIR [options] [-- arguments of dr_jax.train]
#
# Verbs, in the order of a run; each may be given again:
#   create    reserves the slice that the config's topology names, and waits until it is there
#   setup     copies this checkout to every worker and installs it
#   train     starts the run on every worker, detached; a run that was stopped goes on from its last checkpoint
#   logs      follows a worker's log
#   status    the slice's state and the last line of metrics
#   resume    after a preemption: create again, setup and train; does only what is needed
#   delete    gives the slice back; the workdir stays
#
# Options (or the environment variable of the same name in capitals, e.g. ZONE):
#   --backend=queued      queued: Cloud TPU queued resources, v4 to v6e | xpk: GKE | local: this machine | tpu7x: prints how
#   --name=dr-jax         of the slice, and of the xpk workload
#   --project= --zone=    of the slice
#   --accelerator_type=   of a slice that you have; checked against the config
#   --spot | --reserved   instead of on demand
#   --internal_ips        workers without public addresses: the web then needs a Cloud NAT
#   --nfs=SERVER:/SHARE   mounted on every worker at /mnt/dr_jax; put the workdir there (all workers must share it)
#   --keys=SERPER_API_KEY names of environment variables to copy to the workers, comma-separated
#   --worker=0            whose log to follow
#   --cluster=            xpk only
#   --dry_run             prints the commands instead of running them
set -euo pipefail
cd "$(dirname "$0")"

fail() {
  echo "error: $*" >&2
  exit 2
}

# Runs a command, or prints it.
run() {
  if [ -n "$dry_run" ]; then
    printf '%s\n' "$(printf '%q ' "$@" | sed 's/ $//')"
  else
    "$@"
  fi
}

usage() {
  sed -n '2,/^set -euo/p' "$0" | sed '$d; s/^# \{0,1\}//'
}

verb="${1:-}"
case "$verb" in
  create | setup | train | logs | status | resume | delete) shift ;;
  "" | -h | --help | help) usage && exit 0 ;;
  *) fail "unknown verb '$verb'; allowed: create, setup, train, logs, status, resume, delete" ;;
esac

backend="${BACKEND:-queued}" name="${NAME:-dr-jax}" project="${PROJECT:-}" zone="${ZONE:-}" cluster="${CLUSTER:-}"
config="${CONFIG:-}" workdir="${WORKDIR:-}" accelerator_type="${ACCELERATOR_TYPE:-}" nfs="${NFS:-}"
keys="${KEYS:-}" worker="${WORKER:-0}" capacity="" internal_ips="" dry_run=""
train_args=()
while [ $# -gt 0 ]; do
  case "$1" in
    --backend=* | --name=* | --project=* | --zone=* | --cluster=* | --config=* | --workdir=* | --accelerator_type=* | \
      --nfs=* | --keys=* | --worker=*)
      option="${1%%=*}"
      printf -v "${option#--}" '%s' "${1#*=}"
      ;;
    --spot | --reserved)
      [ -z "$capacity" ] || [ "$capacity" = "$1" ] || fail "--spot and --reserved exclude each other; give one"
      capacity="$1"
      ;;
    --internal_ips) internal_ips=1 ;;
    --dry_run) dry_run=1 ;;
    --config.*) train_args+=("$1") ;; # a setting of the run
    --)
      shift
      train_args+=("$@")
      break
      ;;
    *) fail "unknown option '$1'; see bash launch_tpu.sh --help" ;;
  esac
  shift
done

python="${PYTHON:-.venv/bin/python}"
attempt="${ATTEMPT:-$(date -u +%Y%m%dT%H%M%S)}" # one folder of logs for each start
poll_s="${POLL_S:-30}"
scratch="$(mktemp -d -t dr_jax.XXXXXX)"
trap 'rm -rf "$scratch"' EXIT

need() {
  local option
  for option in "$@"; do
    [ -n "${!option}" ] || fail "--$option is required for $verb with --backend=$backend"
  done
}

# Asks the config which slice it is for; nothing is reserved for a config that is not right.
find_slice() {
  need config
  [ -x "$(command -v "$python")" ] || fail "no Python with dr_jax at '$python': run '. tools/venv.sh && install -e .' first, or set PYTHON"
  local said argument settings=()
  case "$verb" in create | resume) settings+=(--programs) ;; esac
  for argument in "${train_args[@]+"${train_args[@]}"}"; do
    case "$argument" in --config.*) settings+=("$argument") ;; esac
  done
  said="$(JAX_PLATFORMS=cpu PYTHONPATH=. "$python" tools/slice.py --config="$config" --accelerator_type="$accelerator_type" \
    "${settings[@]+"${settings[@]}"}")" || exit 2
  read -r accelerator_type runtime workers <<<"$said"
}

# local -----------------------------------------------------------------------------------------------------------------

local_train() {
  need config workdir
  local log="$workdir/logs/attempt_$attempt"
  run mkdir -p "$log"
  run ln -sfn "attempt_$attempt" "$workdir/logs/latest"
  if [ -n "$dry_run" ]; then
    run "$python" -m dr_jax.train --config="$config" --workdir="$workdir" "${train_args[@]+"${train_args[@]}"}"
    return
  fi
  PYTHONPATH=. "$python" -m dr_jax.train --config="$config" --workdir="$workdir" \
    "${train_args[@]+"${train_args[@]}"}" 2>&1 | tee "$log/worker-0.log"
}

last_metrics() {
  printf 'tail -n 1 %q 2>/dev/null || echo "no step is done yet"' "$workdir/metrics.jsonl"
}

backend_local() {
  case "$verb" in
    create) echo "nothing to reserve: --backend=local trains on this machine" ;;
    setup) run bash -c '. tools/venv.sh && install -e .' ;;
    train | resume) local_train ;;
    logs) need workdir && run tail -n 100 -F "$workdir/logs/latest/worker-0.log" ;;
    status) need workdir && run bash -c "$(last_metrics)" ;;
    delete) echo "nothing to give back: remove $workdir yourself when you no longer need it" ;;
  esac
}

# queued resources --------------------------------------------------------------------------------------------------------

tpus() {
  local group="$1" action="$2"
  shift 2
  run gcloud compute tpus "$group" "$action" "$@" --project="$project" --zone="$zone"
}

# on WORKER COMMAND: runs COMMAND on a worker, or on 'all'. Long silences must not end the connection.
on() {
  local where=()
  [ -z "$internal_ips" ] || where+=(--internal-ip)
  tpus tpu-vm ssh "$name" --worker="$1" --command="$2" --ssh-flag=-oServerAliveInterval=30 --quiet \
    "${where[@]+"${where[@]}"}"
}

copy() {
  local where=()
  [ -z "$internal_ips" ] || where+=(--internal-ip)
  tpus tpu-vm scp "$1" "$name:$2" --worker=all --quiet "${where[@]+"${where[@]}"}"
}

# ABSENT where there is none, UNKNOWN where nobody answers.
state() {
  local said
  if said="$(gcloud compute tpus queued-resources describe "$name" --project="$project" --zone="$zone" \
    --format='value(state.state)' 2>&1)"; then
    echo "${said##*$'\n'}"
  elif [[ "$said" = *NOT_FOUND* || "$said" = *"not found"* ]]; then
    echo ABSENT
  else
    echo UNKNOWN
  fi
}

queued_create() {
  local flags=()
  [ -z "$capacity" ] || flags+=("$capacity")
  [ -z "$internal_ips" ] || flags+=(--internal-ips)
  if [ -n "$dry_run" ] || [[ "$(state)" = @(ABSENT|UNKNOWN) ]]; then # gcloud itself says why nobody answers
    tpus queued-resources create "$name" --node-id="$name" --accelerator-type="$accelerator_type" \
      --runtime-version="$runtime" "${flags[@]+"${flags[@]}"}" --quiet
  fi
  [ -z "$dry_run" ] || return 0
  local now
  while :; do
    now="$(state)"
    case "$now" in
      ACTIVE) break ;;
      FAILED | SUSPENDED | SUSPENDING | ABSENT)
        fail "the request for $accelerator_type in $zone is $now; 'gcloud compute tpus queued-resources describe $name' says why. Run 'bash launch_tpu.sh delete' and try another zone, --spot, or later"
        ;;
    esac
    echo "waiting for $accelerator_type in $zone: $now"
    sleep "$poll_s"
  done
  echo "$accelerator_type is there: $workers workers"
}

queued_setup() {
  local index archive secrets
  # The first connection to a worker makes and spreads its key: with --worker=all they would race.
  for ((index = 0; index < workers; index++)); do on "$index" true; done
  archive="$scratch/dr_jax.tar.gz" secrets="$scratch/keys.env"
  write_keys "$secrets"
  git archive --format=tar.gz --output="$archive" HEAD
  copy "$archive" dr_jax.tar.gz
  copy "$secrets" .dr_jax.env
  on all "$(setup_script)"
}

# write_keys FILE: a file and not arguments, which are for everyone on a machine to read.
write_keys() {
  local key
  (umask 077 && : >"$1")
  for key in ${keys//,/ }; do
    [ -n "${!key:-}" ] || fail "--keys: $key is not set in this shell; export it first"
    printf 'export %s=%q\n' "$key" "${!key}" >>"$1"
  done
}

# What a worker does once. TPU images bring an older Python than dr_jax needs.
setup_script() {
  cat <<SETUP
set -e
chmod 600 ~/.dr_jax.env
rm -rf ~/dr_jax && mkdir ~/dr_jax && tar -xzf ~/dr_jax.tar.gz -C ~/dr_jax
curl -LsSf https://astral.sh/uv/install.sh | sh
export PATH="\$HOME/.local/bin:\$PATH"
cd ~/dr_jax && uv venv --python 3.12 .venv && uv pip install --quiet --python .venv/bin/python -e '.[tpu]'
SETUP
  [ -z "$nfs" ] || cat <<MOUNT
sudo apt-get install -y -qq nfs-common && sudo mkdir -p /mnt/dr_jax
mountpoint -q /mnt/dr_jax || sudo mount -t nfs -o nconnect=4 $(printf %q "$nfs") /mnt/dr_jax
sudo chmod 1777 /mnt/dr_jax
MOUNT
}

# What a worker does at each start. ssh ends at once: --worker=all would hold all output back until the end of the run.
train_script() {
  local log="$workdir/logs/attempt_$attempt"
  cat <<TRAIN
cd ~/dr_jax
if ! flock --nonblock ~/.dr_jax.lock true; then echo "\$(hostname): a run is already going"; exit 0; fi
. ~/.dr_jax.env
mkdir -p $(printf %q "$log") && ln -sfn attempt_$attempt $(printf %q "$workdir/logs/latest")
export JAX_PLATFORMS=tpu,cpu TPU_MIN_LOG_LEVEL=2
export LIBTPU_INIT_ARGS="\${LIBTPU_INIT_ARGS:-}$(libtpu_args)"
nohup setsid flock --nonblock ~/.dr_jax.lock .venv/bin/python -m dr_jax.train $(printf '%q ' --config="$config" --workdir="$workdir" "${train_args[@]+"${train_args[@]}"}")> $(printf %q "$log")/"\$(hostname)".log 2>&1 < /dev/null &
echo "\$(hostname): started"
TRAIN
}

# Added to what the user gives, never instead of it.
libtpu_args() {
  case "$accelerator_type" in
    v6e-*) printf ' --xla_tpu_scoped_vmem_limit_kib=98304' ;;
  esac
}

queued_resume() {
  if [ -z "$dry_run" ] && [ "$(state)" = ACTIVE ]; then
    echo "$name is there"
  else
    # What is left of a preempted slice keeps its name taken.
    [ -n "$dry_run" ] || [[ "$(state)" = @(ABSENT|UNKNOWN) ]] || tpus queued-resources delete "$name" --force --quiet
    queued_create
    queued_setup
  fi
  on all "$(train_script)"
}

backend_queued() {
  need project zone
  [ -n "$dry_run" ] || command -v gcloud >/dev/null || fail "gcloud is not installed: see cloud.google.com/sdk/docs/install"
  case "$verb" in
    create | setup | train | resume) find_slice ;;
  esac
  case "$verb" in
    create) queued_create ;;
    setup) queued_setup ;;
    train)
      need workdir
      on all "$(train_script)"
      ;;
    logs)
      need workdir
      on "$worker" "tail -n 100 -F $(printf %q "$workdir")/logs/latest/\$(hostname).log"
      ;;
    status)
      need workdir
      tpus queued-resources describe "$name" --format='value(state.state)'
      on 0 "$(last_metrics)"
      ;;
    resume)
      need workdir
      queued_resume
      ;;
    delete) tpus queued-resources delete "$name" --force --async --quiet ;;
  esac
}

# GKE by xpk ----------------------------------------------------------------------------------------------------------------

backend_xpk() {
  need project zone cluster
  [ -n "$dry_run" ] || command -v xpk >/dev/null || fail "xpk is not installed: pip install xpk"
  local there=(--cluster="$cluster" --project="$project" --zone="$zone")
  case "$verb" in
    create)
      [ "$capacity" != --reserved ] || fail "--reserved: xpk wants the reservation's name; create the cluster with 'xpk cluster create --reservation=...', then train"
      find_slice
      run xpk cluster create "${there[@]}" --tpu-type="$accelerator_type" --num-slices=1 "${capacity:---on-demand}"
      ;;
    setup) echo "nothing to set up: train builds an image from this checkout" ;;
    train | resume)
      need workdir
      find_slice
      xpk_train
      ;;
    logs) run kubectl logs --follow --prefix --max-log-requests=64 -l "jobset.sigs.k8s.io/jobset-name=$name" ;;
    status) run xpk workload list "${there[@]}" --filter-by-job="$name" ;;
    delete) run xpk workload delete "${there[@]}" --workload="$name" ;;
  esac
}

xpk_train() {
  write_keys "$scratch/keys.env"
  sed -i 's/^export //' "$scratch/keys.env"
  run xpk workload create "${there[@]}" --workload="$name" --tpu-type="$accelerator_type" --num-slices=1 \
    --max-restarts=50 --base-docker-image=python:3.12 --script-dir=. --env-file="$scratch/keys.env" \
    --command "$(xpk_script)"
}

# A run that was stopped before its end exits with 0; GKE must start it again all the same.
xpk_script() {
  printf "pip install -q -e '.[tpu]' && JAX_PLATFORMS=tpu,cpu python -m dr_jax.train "
  printf '%q ' --config="$config" --workdir="$workdir" "${train_args[@]+"${train_args[@]}"}"
  printf '&& test -e %q' "$workdir/summary.json"
}

# TPU7x ---------------------------------------------------------------------------------------------------------------------

backend_tpu7x() {
  cat <<TEXT
TPU7x is not served by the Cloud TPU API (queued resources). Use Compute Engine, with its own commands:

1. gcloud compute resource-policies create workload-policy $name --type=high-throughput \\
     --accelerator-topology=4x4x4 --project=${project:-PROJECT} --region=REGION
2. an instance template of machine type tpu7x-standard-4t, and a managed instance group with that policy:
   cloud.google.com/tpu/docs/quickstart-create-multi-host-slice
3. on every VM: this checkout, Python 3.11 or newer, pip install -e '.[tpu]', and a workdir that all VMs mount
4. on every VM, at the same time:
   JAX_PLATFORMS=tpu,cpu python -m dr_jax.train --coordinator=auto --config=${config:-FILE} --workdir=${workdir:-DIR}

dr_jax has no TPU7x config and no plan for it: tools/plan.py knows v4, v5e, v5p and v6e.
TEXT
}

case "$backend" in
  local | queued | xpk | tpu7x) "backend_$backend" ;;
  *) fail "unknown --backend=$backend; allowed: queued, xpk, local, tpu7x" ;;
esac

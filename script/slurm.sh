#!/usr/bin/env bash
#SBATCH --ntasks-per-node=1 --exclusive
# A recipe over the nodes of a Slurm job: SFT by torchrun's rendezvous, RL and inference on a Ray cluster of the job's own.
#
#   sbatch --nodes=2 --gpus-per-node=8 script/slurm.sh echo-7b [STAGE ...]
#
# The checkout with its .venv, RUN_DIR, the models and the data are on a file system that all nodes share, under the same
# path. NUM_GPUS is the number of a node. RAY_START_ARGS: more words for `ray start`. Given again after a kill it goes on.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
recipe="${1:?is the name of a recipe}"
shift
ray=("$PWD/.venv/bin/ray")
[[ -z "${PYTHON:-}" ]] || ray=("${PYTHON%/*}/ray")

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export NUM_NODES="${#nodes[@]}" MASTER_ADDR="${nodes[0]}" RAY_ADDRESS="${nodes[0]}:${RAY_PORT:-6379}"
export NODE_LAUNCHER="srun --overlap --ntasks-per-node=1"
# Nobody else's job joins this cluster: srun hands the token to the nodes.
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN="${RAY_AUTH_TOKEN:-$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')}"
read -ra more <<< "${RAY_START_ARGS:-}"
started=()
trap '((${#started[@]} == 0)) || kill "${started[@]}" 2> /dev/null; wait' EXIT

srun --overlap --nodes=1 --ntasks=1 --nodelist="${nodes[0]}" \
  "${ray[@]}" start --head --block --port="${RAY_ADDRESS##*:}" --include-dashboard=false "${more[@]}" &
started+=($!)
for node in "${nodes[@]:1}"; do
  # A worker that comes before the head tries again for a minute.
  srun --overlap --nodes=1 --ntasks=1 --nodelist="$node" "${ray[@]}" start --address="$RAY_ADDRESS" --block "${more[@]}" &
  started+=($!)
done
for ((tries = 0; tries < 60; tries++)); do
  alive="$("${ray[@]}" status --address="$RAY_ADDRESS" 2> /dev/null | grep -c '^ *[0-9]* node_' || true)"
  ((alive < NUM_NODES)) || break
  sleep 2
done
bash "recipes/$recipe/run.sh" "$@"

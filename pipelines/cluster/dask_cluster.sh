#!/usr/bin/env bash
# The reduction on several hosts: a Dask scheduler here, workers there, all of which see the store.
# Usage:  STORE=/shared/llama.store HOSTS="node1 node2" pipelines/cluster/dask_cluster.sh
# Any other Dask cluster does as well (dask-jobqueue, Kubernetes): give its address to --scheduler.
set -euo pipefail

: "${STORE:?set STORE to a store that all hosts see}" "${HOSTS:?set HOSTS to the names of the hosts}"
PORT="${PORT:-8786}"
ADDRESS="tcp://$(hostname -f):$PORT"

dask scheduler --port "$PORT" &
pids=($!)
trap 'kill "${pids[@]}" 2>/dev/null || true' EXIT
for host in $HOSTS; do
    # One BLAS thread a worker thread; ranges are read and reduced where the worker runs.
    ssh "$host" "OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 dask worker $ADDRESS --nworkers 4 --nthreads 1 --memory-limit 8GiB" &
    pids+=($!)
done

ghoststream select --store "$STORE" --remove 8 --scheduler "$ADDRESS" --out "$(dirname "$STORE")/plan.json"
ghoststream fit --store "$STORE" --plan "$(dirname "$STORE")/plan.json" --scheduler "$ADDRESS" --out "$(dirname "$STORE")/operators.safetensors"

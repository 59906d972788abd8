#!/usr/bin/env bash
# The reduction by a Dask cluster: a scheduler here, workers here or on several hosts, all of which see the store.
# Usage:  STORE=/data/llama.store pipelines/cluster/dask_cluster.sh                                 (this host alone)
#         STORE=/shared/llama.store INTERFACE=ib0 HOSTS="node1 node2" TLS=/shared/tls pipelines/cluster/dask_cluster.sh
# Who can connect to Dask can run code: it unpickles what it is sent. So all of it listens on one named INTERFACE, the
# loopback interface if none is named. With TLS only holders of the key can connect. TLS is a folder that all hosts see
# and only you can read, with ca.pem, cert.pem and key.pem. One certificate that signed itself does:
#   openssl req -x509 -newkey rsa:3072 -nodes -days 30 -subj /CN=dask -keyout key.pem -out cert.pem; cp cert.pem ca.pem
# Any other Dask cluster does as well (dask-jobqueue, Kubernetes): give its address to --scheduler.
set -euo pipefail

: "${STORE:?set STORE to a store that all hosts see}"
INTERFACE="${INTERFACE:-lo}" HOSTS="${HOSTS:-localhost}" PORT="${PORT:-8786}" TLS="${TLS:-}" PROTOCOL=tcp
if [ "$INTERFACE" = lo ] && [ "$HOSTS" != localhost ]; then
    echo "set INTERFACE to the network that $HOSTS share; ip -brief address lists those of this host" >&2
    exit 2
fi
# One BLAS thread a worker thread. The HTTP pages of Dask would listen everywhere otherwise.
settings=(OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1)
listen=(--interface "$INTERFACE" --dashboard-address 127.0.0.1:0 --no-dashboard)
if [ -n "$TLS" ]; then
    PROTOCOL=tls
    settings+=(DASK_DISTRIBUTED__COMM__REQUIRE_ENCRYPTION=true "DASK_DISTRIBUTED__COMM__TLS__CA_FILE=$TLS/ca.pem")
    for role in SCHEDULER WORKER CLIENT; do
        settings+=("DASK_DISTRIBUTED__COMM__TLS__${role}__CERT=$TLS/cert.pem" "DASK_DISTRIBUTED__COMM__TLS__${role}__KEY=$TLS/key.pem")
    done
elif [ "$INTERFACE" != lo ]; then
    echo "without TLS everybody who reaches $INTERFACE can run code on $HOSTS and here" >&2
fi
export "${settings[@]}"

work="$(mktemp -d)" pids=()
trap 'kill "${pids[@]}" 2>/dev/null || true; rm -rf "$work"' EXIT
dask scheduler --port "$PORT" --protocol "$PROTOCOL" --scheduler-file "$work/scheduler.json" "${listen[@]}" &
pids+=($!)
until [ -s "$work/scheduler.json" ]; do kill -0 "${pids[0]}"; sleep 0.2; done
ADDRESS="$(python3 -c 'import json, sys; print(json.load(open(sys.argv[1]))["address"])' "$work/scheduler.json")"

for host in $HOSTS; do
    worker=(env "${settings[@]}" dask worker "$ADDRESS" "${listen[@]}" --nworkers 4 --nthreads 1 --memory-limit 8GiB)
    if [ "$host" = localhost ]; then "${worker[@]}" & else ssh "$host" "$(printf '%q ' "${worker[@]}")" & fi
    pids+=($!)
done

ghoststream select --store "$STORE" --remove 8 --scheduler "$ADDRESS" --out "$(dirname "$STORE")/plan.json"
ghoststream fit --store "$STORE" --plan "$(dirname "$STORE")/plan.json" --scheduler "$ADDRESS" --out "$(dirname "$STORE")/operators.safetensors"

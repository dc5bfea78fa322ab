#!/bin/sh
# Replaces the replicas one by one, each by a new container of the image and the settings as they are now. A replica that
# stops gives its sessions to the others, and the next one stops when the new one is healthy: no call fails.
set -eu
cd "$(dirname "$0")/.."
old=$(docker compose --profile scale ps --quiet replica)
count=$(echo "$old" | wc -w)
if [ "$count" -lt 2 ]; then
    echo "roll: $count replicas run, and it takes two for one to stop: docker compose --profile scale up -d --wait router" >&2
    exit 1
fi
for container in $old; do
    docker stop "$container" > /dev/null # within its stop_grace_period
    docker rm "$container" > /dev/null
    docker compose --progress quiet --profile scale up --detach --no-deps --no-recreate --wait --scale "replica=$count" replica
    echo "roll: $container replaced"
done

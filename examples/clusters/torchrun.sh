#!/usr/bin/env bash
# On each machine of several, with the address of the first and the number of machines:
#
#     examples/clusters/torchrun.sh node0 2
#
# Each has its own disk, to which shards of the data are copied from a bucket; process 0 writes checkpoints there.
# When a machine is lost, the others end, and torchrun starts all processes again once a machine has taken its
# place, within a day; they go on from the newest checkpoint.
set -euo pipefail
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=330 # seconds to save and upload after a signal; else 30
# Otherwise a torchrun that replaces a lost one waits for an address that the others gave in the first round alone.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
exec torchrun --nnodes="$2" --nproc_per_node=gpu --rdzv_backend=c10d --rdzv_endpoint="$1:29500" --rdzv_id=first --rdzv_conf=join_timeout=86400 --max-restarts=100 -m rsnet train --data s3://bucket/imagenet --arch parallel_resnet50 --batch-size 16 --output s3://bucket/runs/first

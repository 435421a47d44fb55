#!/usr/bin/env bash
# Made by: dydit cluster render recipes/flux/dev_td_lora.yaml --target torchrun --nodes 4
node=${1:?which machine is this? expected 0 to 3}
[ "$node" -ge 0 ] && [ "$node" -le 3 ] || { echo "expected 0 to 3, got $node" >&2; exit 64; }
export PYTHONUNBUFFERED=1
export PYTHONFAULTHANDLER=1
export OMP_NUM_THREADS=8
export NCCL_DEBUG=WARN
export TORCH_NCCL_ASYNC_ERROR_HANDLING=1
export TORCH_NCCL_DUMP_ON_TIMEOUT=1
export TORCH_FR_BUFFER_SIZE=2000
export TORCH_FR_DUMP_TEMP_FILE=runs/flux/dev_td_lora/nccl-trace-rank-
export PET_NNODES=4
export PET_NPROC_PER_NODE=8
export PET_MASTER_PORT=29500
export PET_MASTER_ADDR=node-0
export PET_NODE_RANK=$node
exec python -m dydit_scale.cluster.supervise --grace=3600 -- \
    torchrun --max-restarts=0 --shutdown-timeout=3600 --rdzv-conf=timeout=3600 \
    -m dydit_scale.train recipes/flux/dev_td_lora.yaml --resume

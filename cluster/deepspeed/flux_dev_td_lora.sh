#!/usr/bin/env bash
# Made by: dydit cluster render recipes/flux/dev_td_lora.yaml --target deepspeed --nodes 4
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
hostfile=$(mktemp)
cat > "$hostfile" <<'HOSTS'
node-0 slots=8
node-1 slots=8
node-2 slots=8
node-3 slots=8
HOSTS
exec python -m dydit_scale.cluster.supervise --grace=3600 -- \
    deepspeed --no_ssh --hostfile="$hostfile" --node_rank="$node" --master_addr=node-0 --master_port=29500 \
    --module dydit_scale.train recipes/flux/dev_td_lora.yaml --resume

#!/usr/bin/env bash
# Made by: dydit cluster render recipes/flux/dev_td_lora.yaml --target deepspeed
export PYTHONUNBUFFERED=1
export PYTHONFAULTHANDLER=1
export OMP_NUM_THREADS=8
export NCCL_DEBUG=WARN
export TORCH_NCCL_ASYNC_ERROR_HANDLING=1
export TORCH_NCCL_DUMP_ON_TIMEOUT=1
export TORCH_FR_BUFFER_SIZE=2000
export TORCH_FR_DUMP_TEMP_FILE=runs/flux/dev_td_lora/nccl-trace-rank-
exec python -m dydit_scale.cluster.supervise --grace=3600 -- \
    deepspeed --num_gpus=8 \
    --module dydit_scale.train recipes/flux/dev_td_lora.yaml --resume

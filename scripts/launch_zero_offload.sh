#!/bin/sh
# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
# A small causal language model, optimizer state in CPU memory: for elementwise optimizers.
# More arguments go to the script: scripts/launch_zero_offload.sh --optim adamw --max_steps 50
# Without GPUs add --use_cpu: the processes then meet over gloo.
set -e
cd "$(dirname "$0")/.."
accelerate launch --config_file configs/accelerate/zero_offload.yaml scripts/finetune_clm.py \
    --optim adamw --learning_rate 1e-3 --bf16 \
    --max_steps 200 --do_train --do_eval --output_dir outputs/clm_zero_offload "$@"

#!/bin/sh
# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
# A small causal language model, its weights sharded over the devices.
# More arguments go to the script: scripts/launch_fsdp2.sh --optim adamw --max_steps 50
# Without GPUs add --use_cpu; accelerate shards on accelerators only, so that run is DDP.
set -e
cd "$(dirname "$0")/.."
accelerate launch --config_file configs/accelerate/fsdp2.yaml scripts/finetune_clm.py \
    --optim adafactor_corrected --learning_rate 1e-3 \
    --max_steps 200 --do_train --do_eval --output_dir outputs/clm_fsdp2 "$@"

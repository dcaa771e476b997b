#!/bin/sh
# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
# A small causal language model on one device.
# More arguments go to the script: scripts/launch_single.sh --optim adamw --max_steps 50
# Without a GPU it runs on the CPU as it is.
set -e
cd "$(dirname "$0")/.."
accelerate launch --config_file configs/accelerate/single.yaml scripts/finetune_clm.py \
    --optim adafactor_corrected --learning_rate 1e-3 \
    --max_steps 200 --do_train --do_eval --output_dir outputs/clm_single "$@"

# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Several ranks in a second: gloo processes forked from the test, after the imports."""

import os
import tempfile
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _rank(rank, world, store, fn, args):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    fn(*args)
    dist.barrier()
    os._exit(0)  # gloo's threads may abort an orderly exit


def launch(world, fn, *args):
    """Run `fn(*args)` on `world` ranks. A failure on any of them is raised here, with its traceback."""
    with tempfile.TemporaryDirectory() as folder:  # a file instead of a port: nothing to collide with
        # a CUDA context does not survive a fork
        method = "spawn" if torch.cuda.is_available() else "fork"
        mp.start_processes(_rank, (world, os.path.join(folder, "store"), fn, args), nprocs=world, start_method=method)

# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Several ranks in a second: gloo processes forked from the test, after the imports."""

import faulthandler
import os
import sys
import tempfile
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


LIMIT = 300  # seconds after which a rank prints where it is and fails: one that waits in itself has no other end


def _rank(rank, world, store, fn, args):
    faulthandler.dump_traceback_later(LIMIT, exit=True, file=sys.__stderr__)
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


def as_launched():
    """Leave in the environment what torchrun would: Trainer looks there."""
    rank, world = str(dist.get_rank()), str(dist.get_world_size())
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world, MASTER_ADDR="localhost", MASTER_PORT="0")
    os.environ["OMP_NUM_THREADS"] = "1"  # else accelerate takes one thread for each core, on every rank


def shard_on_cpu():
    """accelerate takes DDP in place of FSDP on CPUs, without a word: let it see accelerators."""
    from accelerate.state import AcceleratorState, PartialState  # late: most users of this file do without
    from accelerate.utils import DistributedType

    init = AcceleratorState.__init__

    def __init__(self, *args, **kwargs):
        if PartialState._shared_state.get("distributed_type") == DistributedType.MULTI_CPU:
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        init(self, *args, **kwargs)

    AcceleratorState.__init__ = __init__

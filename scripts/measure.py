# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""
What the scripts that measure share: the clock, the size of optimizer state, and where figures come from. It needs
torch and transformers only, so that the benchmarks do too.
"""

import datetime
import platform
import time

import torch
import transformers


def now() -> float:
    """Seconds on a clock, after the accelerator (if any) has finished what it was given."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the optimizer state. Tensors that share memory count once."""
    tensors = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def machine(device: torch.device | None = None) -> str:
    """What `device` (default: the accelerator, if there is one) is."""
    device = device or torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    if device.type != "cpu":
        return torch.get_device_module(device).get_device_name()
    threads = torch.get_num_threads()
    vectors = torch.backends.cpu.get_cpu_capability()
    return f"{platform.machine()} CPU with {vectors}, {threads} thread{'s' * (threads > 1)}"


def environment(device: torch.device | None = None) -> dict:
    return {
        "date": datetime.date.today().isoformat(),
        "machine": machine(device),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }

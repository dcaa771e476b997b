# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The outer layer that knows transformers: names for `--optim`, the loss, groups, callbacks."""

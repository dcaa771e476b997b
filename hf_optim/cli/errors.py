# Copyright 2026 The hf_optim team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""What a command raises for a mistake of the user."""


class UserError(Exception):
    """Shown as one line on stderr; the process ends with exit code 2."""

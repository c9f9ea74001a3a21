# Copyright (c) 2026, the Tribrick authors
# SPDX-License-Identifier: BSD-3-Clause
"""Filters of the role recovery: comparing what the bricks hold."""

from __future__ import annotations

from typing import Any

from ansible_collections.tribrick.media.plugins.module_utils import contradictions, recovery


class FilterModule:
    """Comparing bricks."""

    def filters(self) -> dict[str, Any]:
        return {
            "brick_directories": recovery.differing_directories,
            "brick_differences": recovery.differences,
            "brick_lasting": recovery.lasting,
            "brick_choose": contradictions.choose,
            "brick_explain": recovery.explain,
        }

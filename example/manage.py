#!/usr/bin/env python3
"""Run a management command from a checkout; installed, it is ``python -m example``."""

from example.__main__ import main

if __name__ == "__main__":
    main()

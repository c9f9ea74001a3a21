"""The judge: a workload, faults under it, and a checker that says what became of every file.

`./scripts/torture` runs it by hand, the scenario `faults` runs it in the tests. It sees what an outsider sees: HTTP,
SSH, Docker, the bricks' files.
"""

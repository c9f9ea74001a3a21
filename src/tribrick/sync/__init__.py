"""Reconciliation of media directories that were changed directly, each on its own side.

Each node has a *side*: a directory, its *history* (every content, by hash, in a directory that only the
site's user can enter) and its *state* (SQLite: every version of every name, and what lies on the disk).
A run goes through these steps, each of which can be killed and done again::

    scan      disk -> history, then versions into the state            (side)
    pull      versions of each peer -> the state                       (move, door)
    settle    concurrent versions -> one version and conflict copies   (versions)
    plan      state against disk -> what to fetch, write, remove       (plan)
    fetch     contents of each peer -> the history, by rsync           (move, door)
    apply     history -> disk; what is replaced stays in the history   (side)
    replay    disk -> the catalog, where there is a database           (replay)

A node only ever writes its own disk. What it tells others is a set of versions that only grows, so
messages may be lost, repeated, or come in any order.

Only :mod:`tribrick.sync.move` and :mod:`tribrick.sync.replay` need Django.
"""

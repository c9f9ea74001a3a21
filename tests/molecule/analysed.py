"""What gixy, a static analyser, finds in nginx's configuration and nobody has given a reason for.

A reason is a comment straight above what was found, `# gixy NAME: reason`, with further lines below it if it is long.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from gixy.core.config import Config
from gixy.core.manager import Manager


def findings(dump: Path) -> Iterator[tuple[str, str, int, str]]:
    """Yield check, file, line of the dump and what is said, of a configuration as `nginx -T` prints it."""
    manager = Manager(config=Config())
    with dump.open("rb") as file:
        manager.audit(str(dump), file)
    for plugin in manager.results:
        for issue in plugin.issues:
            place = next((one for one in issue.directives if getattr(one, "line", None)), None)
            said = " ".join(str(issue.reason or issue.summary or plugin.summary).split())
            yield plugin.name, str(getattr(place, "file", None) or dump), getattr(place, "line", None) or 0, said


def comment_above(lines: list[str], line: int) -> str:
    """Return the comment that ends straight above a line (which counts from 1)."""
    above = []
    with contextlib.suppress(IndexError):
        while (one := lines[line - 2 - len(above)].strip()).startswith("#"):
            above.insert(0, one.lstrip("# "))
    return " ".join(above)


def unexcused(dump: Path, foreign: Mapping[str, str] | None = None) -> list[str]:
    """Return the findings without a reason; *foreign* has those of files that are not ours: "CHECK FILE" -> reason."""
    text, bad = dump.read_text(encoding="utf-8"), []
    lines, main = text.split("\n"), text.split("\n", 1)[0].removeprefix("# configuration file ").rstrip(":")
    for check, file, line, said in findings(dump):
        name = main if file == str(dump) else file
        if f"{check} {name}" in (foreign or {}):
            continue
        if not re.search(rf"\bgixy {check}: \S", comment_above(lines, line)):
            bad.append(f"{check} {name}: {said}: {lines[line - 1].strip()}")
    return bad

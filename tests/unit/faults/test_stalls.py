"""What is made of the result of a node's loop."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from faults import stalls


def test_a_result_is_told_with_times_since_the_fault() -> None:
    text = json.dumps([90, [[101.0, 1.25, ""], [103.5, 0.01, "No such device"], [104.0, 0.02, "No such device"]]])
    line = stalls.Seen.of(text).line(100.0)
    assert line == (
        "longest 1.25 s, 90 operations, 2 errors from 3.5 to 4.0 s (No such device); slow ones (at:seconds) 1.0:1.2"
    )
    assert stalls.Seen.of("[7, []]").line(0) == "longest below 0.5 s, 7 operations"


def test_the_loop_writes_reads_back_and_tells_errors(tmp_path: Path) -> None:
    def loop(directory: Path) -> stalls.Seen:
        result = tmp_path / "result"
        subprocess.run([sys.executable, "-c", stalls.LOOP, "0.3", str(directory), str(result)], check=True, timeout=30)
        return stalls.Seen.of(result.read_text())

    seen = loop(tmp_path / "files")
    assert seen.operations == len(list((tmp_path / "files").iterdir())) > 2
    assert not seen.errors
    (tmp_path / "link").symlink_to("/proc/self")  # nobody can make a file there
    assert len(loop(tmp_path / "link").errors) > 2


def test_the_command_line_takes_what_the_documents_show() -> None:
    options = stalls.parser().parse_args(["--name", "x", "fence:brick", "node2", "--hold", "1", "--times", "25"])
    assert (options.fault, options.times) == ("fence:brick", 25)

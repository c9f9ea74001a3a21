"""The module files, run in this process on a real directory."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest
from ansible.module_utils.testing import patch_module_args
from ansible_collections.tribrick.media.plugins.modules import files

ME = {"owner": str(os.getuid()), "group": str(os.getgid())}


def run(capsys: pytest.CaptureFixture[str], check: bool = False, **arguments: object) -> dict:
    with patch_module_args({**ME, **arguments, "_ansible_check_mode": check}), pytest.raises(SystemExit):
        files.main()
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def wanted(tmp_path: Path) -> dict:
    return {
        "directories": [{"path": str(tmp_path / "a/b"), "mode": "0750"}],
        "files": [{"dest": str(tmp_path / "a/b/one"), "content": "1\n", "mode": "0640"}],
        "links": [{"path": str(tmp_path / "link"), "target": "a/b/one"}],
    }


def test_check_real_check_again(wanted: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    predicted = run(capsys, check=True, **wanted)
    assert predicted["changed"] and list(tmp_path.iterdir()) == []
    done = run(capsys, **wanted)
    assert done["changed_files"] == predicted["changed_files"]
    assert (tmp_path / "link").read_text() == "1\n"
    assert stat.S_IMODE((tmp_path / "a/b").stat().st_mode) == 0o750
    assert stat.S_IMODE((tmp_path / "a/b/one").stat().st_mode) == 0o640
    assert not run(capsys, check=True, **wanted)["changed"]
    assert not run(capsys, **wanted)["changed"]


def test_line_ends_stay_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [{"dest": str(tmp_path / "given.crt"), "content": "-----BEGIN\r\n-----END\r\n"}]
    assert run(capsys, files=given)["changed"]
    assert (tmp_path / "given.crt").read_bytes() == b"-----BEGIN\r\n-----END\r\n"
    assert not run(capsys, files=given)["changed"]


def test_rights_alone_are_a_change(wanted: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, **wanted)
    (tmp_path / "a/b/one").chmod(0o666)
    assert run(capsys, **wanted)["changed_files"] == [str(tmp_path / "a/b/one")]
    assert stat.S_IMODE((tmp_path / "a/b/one").stat().st_mode) == 0o640


def test_one_refused_file_leaves_all_as_they_were(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = str(tmp_path / "good"), str(tmp_path / "bad")
    result = run(
        capsys,
        files=[{"dest": good, "content": "x"}, {"dest": bad, "content": "y", "validate": "grep --quiet z %s"}],
    )
    assert result["failed"] and bad in result["msg"] and "nothing was changed" in result["msg"]
    assert list(tmp_path.iterdir()) == []
    assert run(capsys, files=[{"dest": bad, "content": "z", "validate": "grep --quiet z %s"}])["changed"]


def test_other_things_at_a_path_are_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "f").write_text("keep")
    place = str(tmp_path)
    for arguments in (
        {"files": [{"dest": f"{place}/d", "content": "x"}]},
        {"directories": [{"path": f"{place}/f"}]},
        {"links": [{"path": f"{place}/f", "target": "d"}]},
        {"absent": [f"{place}/d"]},
    ):
        assert run(capsys, **arguments)["failed"], arguments
    assert (tmp_path / "f").read_text() == "keep" and (tmp_path / "d").is_dir()


def test_absent_removes_files_and_links_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "f").write_text("x")
    assert run(capsys, absent=[str(tmp_path / "f")])["changed"]
    assert not run(capsys, absent=[str(tmp_path / "f")])["changed"]


def test_a_missing_user_is_an_error_and_only_predicted_in_check_mode(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = {"dest": str(tmp_path / "x"), "content": "x", "owner": "nobody-of-that-name"}
    assert run(capsys, check=True, files=[entry])["changed"]
    result = run(capsys, files=[entry])
    assert result["failed"] and "there is no user nobody-of-that-name" in result["msg"]

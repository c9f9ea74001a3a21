"""What goes into a bundle of wheels, and what is refused."""

from __future__ import annotations

import hashlib
import os
import tarfile

import pytest
from ansible_collections.tribrick.media.plugins.module_utils import wheelhouse as kit
from ansible_collections.tribrick.media.plugins.modules.wheelhouse import marker_test

HASH = "--hash=sha256:" + "a" * 64
OTHER = "--hash=sha256:" + "b" * 64


def never(marker: str) -> bool:
    raise AssertionError(f"no marker expected, got {marker}")


def test_lock_lines_are_joined_and_comments_dropped():
    text = f"# lock\na==1 \\\n    {HASH} \\\n    {OTHER}\n    # via b\nb[c]==2.0 {HASH}\n"
    assert kit.select_requirements(text, never) == [f"a==1 {HASH} {OTHER}", f"b[c]==2.0 {HASH}"]


@pytest.mark.parametrize(("python", "expected"), [("3.11", ["a==1", "old==2"]), ("3.13", ["a==1", "new==3"])])
def test_markers_are_evaluated_for_the_node_and_not_for_the_controller(python, expected):
    text = f'a==1 {HASH}\nold==2 ; python_version < "3.13" {HASH}\nnew==3 ; python_full_version >= "3.13" {HASH}\n'
    text += f'win==4 ; sys_platform == "win32" {HASH}\narm==5 ; platform_machine == "aarch64" {HASH}\n'
    selected = kit.select_requirements(text, marker_test(python, "x86_64"))
    assert [line.split()[0] for line in selected] == expected
    assert all(";" not in line for line in selected)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (f"a>=1 {HASH}", "not pinned"),
        (f"a==1.* {HASH}", "not pinned"),
        (f"a {HASH}", "not pinned"),
        (f"a @ https://example.org/a.whl {HASH}", "not pinned"),
        ("a==1", "no SHA-256"),
        ("a==1 --hash=md5:00", "no SHA-256"),
        ("--index-url https://example.org", "options are not allowed"),
        ("-e .", "options are not allowed"),
        ("# nothing", "names no package"),
    ],
)
def test_anything_but_exact_hashed_pins_is_refused(line, said):
    with pytest.raises(kit.WheelhouseError, match=said):
        kit.select_requirements(line + "\n", never)


def test_platforms_reach_up_to_the_oldest_supported_debian():
    tags = kit.platform_tags("x86_64")
    assert tags[0] == "manylinux_2_36_x86_64"
    assert {"manylinux_2_28_x86_64", "manylinux2014_x86_64", "manylinux1_x86_64"} <= set(tags)
    assert "manylinux_2_16_aarch64" not in kit.platform_tags("aarch64")
    with pytest.raises(kit.WheelhouseError, match="riscv64"):
        kit.platform_tags("riscv64")


def make_project(root, packaged=True):
    (root / "src/pkg/__pycache__").mkdir(parents=True)
    (root / "src/pkg/__init__.py").write_text("x = 1\n")
    (root / "src/pkg/__pycache__/x.pyc").write_bytes(b"1")
    (root / "docs").mkdir()
    (root / "docs/a.md").write_text("a")
    (root / ".git").mkdir()
    (root / ".git/HEAD").write_text("ref")
    if packaged:
        (root / "pyproject.toml").write_text('[project]\nname = "pkg"\n')
    return root


def test_of_a_packaged_source_tree_only_what_enters_the_wheel_counts(tmp_path):
    root = make_project(tmp_path)
    assert kit.source_files(str(root)) == ["pyproject.toml", "src/pkg/__init__.py"]
    before = kit.hash_project(str(root))
    (root / "docs/a.md").write_text("b")
    (root / "src/pkg/__pycache__/x.pyc").write_bytes(b"2")
    assert kit.hash_project(str(root)) == before
    (root / "src/pkg/__init__.py").write_text("x = 2\n")
    assert kit.hash_project(str(root)) != before


def test_of_a_plain_tree_everything_but_leftovers_counts(tmp_path):
    root = make_project(tmp_path, packaged=False)
    (root / "myenv").mkdir()
    (root / "myenv/pyvenv.cfg").write_text("")
    (root / "db.sqlite3").write_text("")
    assert kit.source_files(str(root)) == ["docs/a.md", "src/pkg/__init__.py"]
    assert not kit.is_packaged(str(root))


def test_a_renamed_or_executable_file_changes_the_hash(tmp_path):
    root = make_project(tmp_path)
    before = kit.hash_project(str(root))
    (root / "src/pkg/__init__.py").chmod(0o755)
    executable = kit.hash_project(str(root))
    (root / "src/pkg/__init__.py").rename(root / "src/pkg/other.py")
    assert len({before, executable, kit.hash_project(str(root))}) == 3


def test_packaging_is_recognised(tmp_path):
    assert not kit.is_packaged(str(tmp_path))
    (tmp_path / "pyproject.toml").write_text("[tool.ruff]\n")
    assert not kit.is_packaged(str(tmp_path))
    (tmp_path / "pyproject.toml").write_text("[tool.ruff]\n[build-system]\n")
    assert kit.is_packaged(str(tmp_path))


def test_each_input_changes_the_digest():
    base = (["a==1"], ["h"], "3.13", "x86_64")
    others = [(["a==2"], *base[1:]), (base[0], ["i"], *base[2:]), (*base[:2], "3.11", base[3]), (*base[:3], "aarch64")]
    assert len({kit.bundle_digest(*case) for case in [base, *others]}) == 5
    assert kit.bundle_digest(*base) == kit.bundle_digest(*base)


def test_the_same_inputs_give_the_same_bytes(tmp_path):
    wheel = tmp_path / "a-1-py3-none-any.whl"
    wheel.write_bytes(b"wheel")
    source = tmp_path / "plain"
    source.mkdir()
    (source / "manage.py").write_text("x")
    digests = []
    for name in ("one.tar", "two.tar"):
        kit.write_bundle(str(tmp_path / name), {"b": 1, "a": 2}, [str(wheel)], [str(source)])
        digests.append(hashlib.sha256((tmp_path / name).read_bytes()).hexdigest())
        (source / "manage.py").touch()
    assert digests[0] == digests[1]
    with tarfile.open(tmp_path / "one.tar") as archive:
        assert archive.getnames() == ["manifest.json", "wheels/a-1-py3-none-any.whl", "source/0/manage.py"]
    assert sorted(path.name for path in tmp_path.glob("*.tar*")) == ["one.tar", "two.tar"]


@pytest.mark.parametrize(
    ("output", "said"),
    [
        (
            (
                "WARNING: Retrying after connection broken by 'NewConnectionError'\n"
                "ERROR: Could not find a version that satisfies the requirement a==1 (from versions: none)\n"
                "ERROR: No matching distribution found for a==1"
            ),
            "could not be reached",
        ),
        (
            (
                "ERROR: Could not find a version that satisfies the requirement a==1 (from versions: 2, 3)\n"
                "ERROR: No matching distribution found for a==1"
            ),
            "the index has 2, 3",
        ),
        ("ERROR: No matching distribution found for a==1", "no wheel of a==1 for Python 3.13"),
        ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE.", "does not match the hash"),
        ("something else broke", "something else broke"),
        ("", "said nothing"),
    ],
)
def test_failures_of_pip_become_a_sentence(output, said):
    assert said in kit.explain_pip(output, "3.13")


def test_only_the_oldest_beyond_the_limit_are_surplus(tmp_path):
    for age, name in enumerate(["new.tar", "middle.tar", "old.tar", "other.txt"]):
        (tmp_path / name).write_text("")
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    assert list(kit.surplus(str(tmp_path), ".tar", 2)) == [str(tmp_path / "old.tar")]

"""Pure functions of the module media_layout; the rest is proven on a real mount by the scenarios."""

from __future__ import annotations

from ansible_collections.tribrick.media.plugins.modules.media_layout import file_system, tree

MOUNTS = """\
/dev/vda / ext4 rw 0 0
node1:/media /srv/media fuse.glusterfs rw 0 0
tmpfs /srv/media2 tmpfs rw 0 0
"""


def test_file_system_takes_the_exact_path() -> None:
    assert file_system("/srv/media", MOUNTS) == "fuse.glusterfs"
    assert file_system("/srv", MOUNTS) is None


def test_file_system_takes_the_mount_on_top() -> None:
    assert file_system("/srv/media", MOUNTS + "x /srv/media tmpfs rw 0 0\n") == "tmpfs"


def test_tree_lists_parents_first_and_everything_once() -> None:
    paths = tree(["photos", "a/b"], levels=2, width=1)
    assert len(paths) == len(set(paths)) == 3 + 2 * (16 + 256)
    for path in paths:
        parent = path.rpartition("/")[0]
        assert not parent or paths.index(parent) < paths.index(path)
    assert "photos/f/0" in paths


def test_tree_without_levels() -> None:
    assert tree(["photos"], levels=0, width=1) == ["photos"]

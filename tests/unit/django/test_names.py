"""Names of stored files."""

from __future__ import annotations

import re

import pytest
from django.core.exceptions import SuspiciousFileOperation
from hypothesis import given
from hypothesis import strategies as st

from tribrick import names

STORED = re.compile(r"photos/[0-9a-f]/[0-9a-f]/([a-z0-9]+(-[a-z0-9]+)*-)?[a-z2-7]{20}(\.[a-z0-9]{1,10})?")
ANY_TEXT = st.text(st.characters(), max_size=400)  # surrogates, controls and all
HOSTILE = st.lists(
    st.sampled_from(["../", "..\\", "/", "\0", "\n", "\r", "\u202e", "\u2066", ".", "a", "é", "٣", "😀"])
).map("".join)


def unique(name: str, **options: object) -> str:
    return names.unique_name(name, **({"levels": 2, "width": 1} | options))  # type: ignore[arg-type]


@given(ANY_TEXT | HOSTILE)
def test_any_client_name_gives_a_safe_one(original: str) -> None:
    assert STORED.fullmatch(unique(f"photos/{names.safe_name(original)}"))


@given(ANY_TEXT | HOSTILE, st.integers(35, 255))
def test_max_length_is_kept_and_the_token_never_cut(original: str, most: int) -> None:
    name = unique(f"photos/{names.safe_name(original)}", max_length=max(most, 42))
    assert len(name) <= max(most, 42)
    assert STORED.fullmatch(name)


@given(ANY_TEXT | HOSTILE)
def test_displayed_name_cannot_deceive(original: str) -> None:
    shown = names.display_name(original)
    assert 1 <= len(shown) <= 1024
    assert not re.search("[\0-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\u2028\u2029]", shown)
    shown.encode()  # can be sent and stored: no lone surrogates


@given(ANY_TEXT | HOSTILE, st.integers(0, 4), st.integers(1, 4))
def test_a_stored_name_saved_again_keeps_its_place(original: str, levels: int, width: int) -> None:
    first = unique(f"photos/{names.safe_name(original)}", levels=levels, width=width)
    second = unique(first, levels=levels, width=width)
    assert first != second
    assert first.count("/") == second.count("/") == 1 + levels
    old, new = (names.parse(name, levels, width) for name in (first, second))
    assert old and new
    assert (old.directory, old.stem, old.extension) == (new.directory, new.stem, new.extension)


@pytest.mark.parametrize(
    ("original", "safe"),
    [
        ("Café au lait.JPG", "cafe-au-lait.jpg"),
        ("عکس خانواده.jpg", "file.jpg"),
        ("صورة.PNG", "file.png"),
        ("👩‍👩‍👧.gif", "file.gif"),
        ("../../etc/passwd", "passwd"),
        ("..\\..\\boot.ini", "boot.ini"),
        ("a\0b\n.jpg", "ab.jpg"),
        ("photo\u202egpj.exe", "photogpj.exe"),
        ("archive.tar.gz", "archive-tar.gz"),
        ("evil.php.jpg", "evil-php.jpg"),
        (".htaccess", "htaccess"),
        ("x.jp g", "x-jp-g"),
        ("x." + "a" * 11, "x-" + "a" * 11),
        ("x.", "x"),
        ("", "file"),
        ("..", "file"),
        ("n" * 300 + ".jpeg", "n" * 60 + ".jpeg"),
    ],
)
def test_safe_names(original: str, safe: str) -> None:
    assert names.safe_name(original) == safe


@pytest.mark.parametrize(
    ("original", "shown"),
    [
        ("می\u200cروم.jpg", "می\u200cروم.jpg"),
        ("👩\u200d👩\u200d👧.gif", "👩\u200d👩\u200d👧.gif"),
        ("photo\u202egpj.exe", "photogpj.exe"),
        (" a\nb\0c ", "abc"),
        ("\u202e", "file"),
        ("x" * 2000, "x" * 1024),
    ],
)
def test_displayed_names(original: str, shown: str) -> None:
    assert names.display_name(original) == shown


@pytest.mark.parametrize("directory", ["../up", "/etc", "a/../../b", ".hidden", "a/.b", "a\0b", "a b", "\\x"])
def test_hostile_directories_are_refused(directory: str) -> None:
    with pytest.raises(SuspiciousFileOperation):
        unique(f"{directory}/x.jpg")


def test_tokens_are_long_enough_and_differ() -> None:
    tokens = {names.new_token() for _ in range(1000)}
    assert len(tokens) == 1000
    assert all(re.fullmatch("[a-z2-7]{20}", token) for token in tokens)  # 20 x 5 bits


def test_hash_directories_fill_evenly() -> None:
    counts: dict[str, int] = {}
    for number in range(2560):
        first = names.hash_directories(f"token{number}", 1, 1)[0]
        counts[first] = counts.get(first, 0) + 1
    assert len(counts) == 16
    assert min(counts.values()) > 100


def test_too_small_max_length_is_refused_with_the_needed_number() -> None:
    with pytest.raises(SuspiciousFileOperation, match="at least 35"):
        unique("photos/x.jpg", max_length=34)
    assert len(unique("photos/x.jpg", max_length=35)) == 35

"""VolumeStorage: what is on the disk after success, after each failure, and in between."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import itertools
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from django.core.exceptions import ImproperlyConfigured, SuspiciousFileOperation
from django.core.files import File
from django.core.files.base import ContentFile
from django.core.files.uploadedfile import SimpleUploadedFile, TemporaryUploadedFile
from django.db.migrations.writer import MigrationWriter
from django.test import override_settings

from tribrick import names
from tribrick.errors import FULL, UNAVAILABLE
from tribrick.storage import StorageFull, StorageUnavailable, VolumeStorage, mount, opened, saving
from tribrick.storage import volume as module

FilesIn = Callable[[Path], list[str]]


@pytest.fixture
def storage(volume: Path) -> VolumeStorage:
    return VolumeStorage(location=volume, base_url="/media/")


class Recorder:
    """Stands for the modules' ``os``: passes calls on, notes them, fails one on demand."""

    WATCHED = ("open", "write", "fsync", "close", "unlink", "mkdir", "stat", "fstat", "fchmod", "rename", "link")

    def __init__(self, real: Any) -> None:
        self.real = real
        self.calls: list[tuple[str, str]] = []
        self.failures: dict[str, list[OSError]] = {}
        self.paths: dict[int, str] = {}

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.real, name)
        return self._wrap(name, found) if name in self.WATCHED else found

    def _wrap(self, name: str, found: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            first = args[0]
            path = self.paths.get(first, "?") if isinstance(first, int) else str(first)
            self.calls.append((name, path))
            about_file = path.endswith((".bin", ".png", ".part"))
            if about_file and self.failures.get(name):
                error = self.failures[name].pop(0)
                if name == "close":
                    found(*args, **kwargs)
                raise error
            result = found(*args, **kwargs)
            if name == "open":
                self.paths[result] = path
            return result

        return call

    def about(self, path: str) -> list[str]:
        return [name for name, at in self.calls if at == path]


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    made = Recorder(os)
    take_over(monkeypatch, made)
    return made


def take_over(monkeypatch: pytest.MonkeyPatch, recorder: Recorder) -> None:
    for part in (module, mount, saving, opened):
        monkeypatch.setattr(part, "os", recorder)


# Success


def test_what_is_stored_is_what_was_given(storage: VolumeStorage, volume: Path, files_in: FilesIn) -> None:
    data = os.urandom(3_000_001)
    stored = storage.store(ContentFile(data), "photos/Été 1.JPG")
    assert (volume / stored.name).read_bytes() == data
    assert (stored.sha256, stored.size) == (hashlib.sha256(data).hexdigest(), len(data))
    parsed = names.parse(stored.name, 2, 1)
    assert parsed
    assert (parsed.directory, parsed.stem, parsed.extension) == ("photos", "ete-1", "jpg")
    assert files_in(volume) == [stored.name]
    assert storage.url(stored.name) == f"/media/{stored.name}"


def test_durable_form(storage: VolumeStorage, volume: Path, recorder: Recorder) -> None:
    """Created beside the name, all written and on the bricks, renamed, then fsync, then close."""
    storage.store(ContentFile(b"warm"), "photos/a.bin")
    for first, second in itertools.product("0123456789abcdef", repeat=2):
        (volume / "photos" / first / second).mkdir(parents=True, exist_ok=True)
    recorder.calls.clear()
    name = storage.save("photos/b.bin", ContentFile(os.urandom(module.CHUNK * 3 + 5)))
    [temporary] = {path for _call, path in recorder.calls if path.endswith(".part")}
    directory, _, last = temporary.rpartition("/")
    assert directory == os.path.dirname(name) and saving.TEMPORARY.fullmatch(last)
    # The look at the size waits until the bricks have all that was written.
    assert recorder.about(temporary) == ["open", *["write"] * 4, "fstat", "rename", "fsync", "close"]
    assert recorder.about(name) == ["stat"]
    others = [call for call in recorder.calls if call[1] not in (name, temporary)]
    # Nothing else but opening and closing the root: no listing.
    assert others == [("open", str(volume)), ("close", str(volume))]


def test_nobody_meets_a_part_under_the_name(storage: VolumeStorage, volume: Path, files_in: FilesIn) -> None:
    """Who lists the directory on another node would have its mount remember the size of that moment."""
    seen: list[str] = []

    def pieces() -> Iterator[bytes]:
        for _ in range(3):
            yield os.urandom(module.CHUNK)
            seen.extend(files_in(volume))

    class Streamed(File):  # type: ignore[type-arg]  # Django's class takes no parameter when it runs
        def chunks(self, chunk_size: int | None = None) -> Iterator[bytes]:  # noqa: ARG002  as Django calls it
            return pieces()

    name = storage.store(Streamed(io.BytesIO(), "b.bin"), "photos/b.bin").name
    assert seen and all(saving.TEMPORARY.fullmatch(os.path.basename(one)) for one in seen), seen
    assert files_in(volume) == [name]


def test_the_umask_is_undone_before_fsync(storage: VolumeStorage, volume: Path, recorder: Recorder) -> None:
    old = os.umask(0o077)
    try:
        name = storage.save("photos/a.bin", ContentFile(b"x"))
    finally:
        os.umask(old)
    assert (volume / name).stat().st_mode & 0o777 == 0o644
    assert (volume / "photos").stat().st_mode & 0o700 == 0o700
    [temporary] = {path for _call, path in recorder.calls if path.endswith(".part")}
    calls = recorder.about(temporary)
    assert calls.index("fchmod") < calls.index("rename") < calls.index("fsync")


def test_same_name_many_times(storage: VolumeStorage, volume: Path, files_in: FilesIn) -> None:
    saved: list[str] = []

    def save() -> None:
        saved.extend(storage.save("photos/same.bin", ContentFile(b"x")) for _ in range(10))

    threads = [threading.Thread(target=save) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(set(saved)) == 80
    assert files_in(volume) == sorted(saved)


def test_an_existing_name_is_never_overwritten(
    storage: VolumeStorage, volume: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = storage.save("photos/a.bin", ContentFile(b"first"))
    with pytest.raises(FileExistsError):
        storage._save(name, ContentFile(b"second"))
    monkeypatch.setattr(storage, "get_available_name", lambda *args: name)
    with pytest.raises(FileExistsError):
        storage.store(ContentFile(b"third"), "photos/a.bin")
    assert (volume / name).read_bytes() == b"first"


@pytest.mark.parametrize("mode", ["w", "wb", "a", "r+b", "xb", "w+", "rw", "btw", "q", ""])
def test_stored_files_cannot_be_opened_for_writing(
    storage: VolumeStorage, volume: Path, files_in: FilesIn, mode: str
) -> None:
    name = storage.save("photos/a.bin", ContentFile(b"first"))
    taken = mode in {"w", "wb", "xb", "w+"}
    with pytest.raises(FileExistsError if taken else io.UnsupportedOperation, match="never changed"):
        storage.open(name, mode)
    assert (volume / name).read_bytes() == b"first"
    assert files_in(volume) == [name]


# Content


def test_content_that_was_read_is_rewound(storage: VolumeStorage, volume: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_bytes(b"content")
    temporary = TemporaryUploadedFile("x.bin", "", 7, None)
    temporary.write(b"content")
    with plain.open("rb") as handle:
        for content in (
            SimpleUploadedFile("x.bin", b"content"),
            ContentFile(b"content"),
            io.BytesIO(b"content"),
            temporary,
            File(handle),
        ):
            content.read()
            name = storage.save("photos/x.bin", content)  # type: ignore[arg-type]
            assert (volume / name).read_bytes() == b"content"
    temporary.close()


def test_text_is_stored_as_utf8(storage: VolumeStorage, volume: Path) -> None:
    stored = storage.store(ContentFile("سلام"), "photos/x.txt")
    assert (volume / stored.name).read_text("utf-8") == "سلام"
    assert stored.size == 8


def test_closed_content(storage: VolumeStorage, volume: Path, files_in: FilesIn, tmp_path: Path) -> None:
    plain = tmp_path / "plain.bin"
    plain.write_bytes(b"content")
    with plain.open("rb") as handle:
        content = File(handle)
    name = storage.save("photos/x.bin", content)
    assert (volume / name).read_bytes() == b"content"

    temporary = TemporaryUploadedFile("x.bin", "", 7, None)
    temporary.write(b"content")
    temporary.close()
    # The client's word is no path: this one must not read the file of that name.
    lying = SimpleUploadedFile(str(plain), b"gone")
    lying._name = str(plain)  # type: ignore[attr-defined]
    lying.close()
    for closed in (temporary, lying):
        with pytest.raises(ValueError, match="closed"):
            storage.save("photos/x.bin", closed)
    assert files_in(volume) == [name]


# The sentinel


def break_missing(volume: Path) -> None:
    (volume / ".tribrick-volume").unlink()


def break_other_id(volume: Path) -> None:
    (volume / ".tribrick-volume").write_text('{"tribrick": 1, "id": "another"}')


def break_not_json(volume: Path) -> None:
    (volume / ".tribrick-volume").write_text('{"id": ')


def break_not_a_dictionary(volume: Path) -> None:
    (volume / ".tribrick-volume").write_text("[1]")


def break_symlink(volume: Path) -> None:
    sentinel = volume / ".tribrick-volume"
    sentinel.rename(volume.parent / "elsewhere")
    sentinel.symlink_to(volume.parent / "elsewhere")


def break_unmounted(volume: Path) -> None:
    volume.rename(volume.parent / "gone")
    volume.mkdir()
    (volume / "photos").mkdir()


def break_no_root(volume: Path) -> None:
    volume.rename(volume.parent / "gone")


@pytest.mark.parametrize(
    "breakage",
    [
        break_missing,
        break_other_id,
        break_not_json,
        break_not_a_dictionary,
        break_symlink,
        break_unmounted,
        break_no_root,
    ],
)
def test_nothing_is_done_in_the_wrong_directory(
    storage: VolumeStorage, volume: Path, files_in: FilesIn, breakage: Callable[[Path], None]
) -> None:
    name = storage.save("photos/a.bin", ContentFile(b"x"))  # the sentinel was right before
    breakage(volume)
    before = files_in(volume)
    calls: list[Callable[[], object]] = [
        lambda: storage.save("photos/b.bin", ContentFile(b"x")),
        lambda: storage.open(name),
        lambda: storage.delete(name),
        lambda: storage.exists(name),
        lambda: storage.size(name),
        lambda: storage.listdir("photos"),
        lambda: storage.get_modified_time(name),
        storage.verify,
    ]
    for call in calls:
        with pytest.raises(StorageUnavailable, match=str(volume)):
            call()
    assert files_in(volume) == before


def test_it_works_again_once_the_mount_is_back(storage: VolumeStorage, volume: Path) -> None:
    name = storage.save("photos/a.bin", ContentFile(b"x"))
    break_unmounted(volume)
    with pytest.raises(StorageUnavailable):
        storage.open(name)
    (volume / "photos").rmdir()
    volume.rmdir()
    (volume.parent / "gone").rename(volume)
    with storage.open(name) as file:
        assert file.read() == b"x"
    assert str(volume) in storage.verify()


def test_the_sentinel_is_looked_at_each_time_but_read_once(
    storage: VolumeStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tribrick import sentinel

    recorder = Recorder(os)
    monkeypatch.setattr(sentinel, "os", recorder)
    for _ in range(5):
        storage.save("photos/a.bin", ContentFile(b"x"))
    assert recorder.about(".tribrick-volume").count("stat") == 5
    assert recorder.about(".tribrick-volume").count("open") == 1
    storage.verify()
    assert recorder.about(".tribrick-volume").count("open") == 2


def test_sentinel_settings(volume: Path, tmp_path: Path) -> None:
    given = VolumeStorage(location=volume, sentinel_id="other")
    with pytest.raises(StorageUnavailable, match="'other'"):
        given.verify()
    with override_settings(TRIBRICK={}), pytest.raises(ImproperlyConfigured, match="SENTINEL_ID"):
        VolumeStorage(location=volume).verify()
    with override_settings(TRIBRICK={"SENTINAL_ID": "x"}), pytest.raises(ImproperlyConfigured, match="SENTINAL_ID"):
        VolumeStorage(location=volume).verify()
    plain = tmp_path / "plain"
    plain.mkdir()
    with override_settings(TRIBRICK={"SENTINEL_ID": False, "HASH_LEVELS": 0}):
        name = VolumeStorage(location=plain).save("docs/a.txt", ContentFile(b"x"))
        assert name.count("/") == 1
        assert (plain / name).exists()


# Failures


def no_errno(number: int) -> OSError:
    return OSError(number, os.strerror(number))


@pytest.mark.parametrize("step", ["open", "write", "fstat", "fsync", "close"])
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOTCONN, errno.EROFS, errno.ENOSPC, errno.EDQUOT])
def test_each_step_cleans_up(
    storage: VolumeStorage, volume: Path, files_in: FilesIn, recorder: Recorder, step: str, number: int
) -> None:
    recorder.failures[step] = [no_errno(number)]
    with pytest.raises(StorageFull if number in FULL else StorageUnavailable) as caught:
        storage.save("photos/a.bin", ContentFile(b"x" * 3_000_000))
    assert caught.value.errno == number
    assert files_in(volume) == []
    assert open_descriptors(volume) == []
    assert storage.save("photos/a.bin", ContentFile(b"x"))  # nothing is remembered against it


def open_descriptors(volume: Path) -> list[str]:
    found = []
    for entry in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found.append(os.readlink(f"/proc/self/fd/{entry}"))
    return [path for path in found if path.startswith(str(volume))]


@pytest.mark.parametrize("number", sorted(UNAVAILABLE - {errno.ESTALE}))
def test_every_sign_of_absence(storage: VolumeStorage, recorder: Recorder, number: int) -> None:
    recorder.failures = {"open": [no_errno(number)]}
    with pytest.raises(StorageUnavailable, match="not available"):
        storage.save("photos/a.bin", ContentFile(b"x"))
    name = storage.save("photos/a.bin", ContentFile(b"x"))
    recorder.failures = {"unlink": [no_errno(number)]}
    with pytest.raises(StorageUnavailable):
        storage.delete(name)
    recorder.failures = {"stat": [no_errno(number)]}
    with pytest.raises(StorageUnavailable):
        storage.exists(name)


def test_other_errors_stay_what_they_are(storage: VolumeStorage, recorder: Recorder) -> None:
    recorder.failures["open"] = [no_errno(errno.EACCES)]
    with pytest.raises(PermissionError):
        storage.save("photos/a.bin", ContentFile(b"x"))
    with pytest.raises(FileNotFoundError):
        storage.open("photos/none.bin")


def test_a_failing_source_leaves_nothing(storage: VolumeStorage, volume: Path, files_in: FilesIn) -> None:
    class Broken(ContentFile):  # type: ignore[type-arg]
        def chunks(self, _size: int | None = None) -> Iterator[bytes]:
            yield b"half"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        storage.save("photos/a.bin", Broken(b""))
    assert files_in(volume) == []


def test_a_rest_that_cannot_be_removed_is_reported(
    storage: VolumeStorage, recorder: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    recorder.failures = {"fsync": [no_errno(errno.EIO)], "unlink": [no_errno(errno.ENOTCONN)]}
    with pytest.raises(StorageUnavailable) as caught:
        storage.save("photos/a.bin", ContentFile(b"x"))
    assert caught.value.errno == errno.EIO  # the first error, not the one of the clean-up
    assert "a failed save left photos/" in caplog.text


@pytest.mark.parametrize("step", ["open", "write", "fsync", "close"])
def test_stale_handles_are_tried_once_more(
    storage: VolumeStorage, volume: Path, files_in: FilesIn, recorder: Recorder, step: str
) -> None:
    data = os.urandom(2_500_000)
    recorder.failures[step] = [no_errno(errno.ESTALE)]
    stored = storage.store(ContentFile(data), "photos/a.bin")
    assert files_in(volume) == [stored.name]
    assert (volume / stored.name).read_bytes() == data
    assert stored.sha256 == hashlib.sha256(data).hexdigest()
    recorder.failures[step] = [no_errno(errno.ESTALE), no_errno(errno.ESTALE)]
    with pytest.raises(StorageUnavailable):
        storage.store(ContentFile(data), "photos/a.bin")
    assert files_in(volume) == [stored.name]


def test_the_second_try_has_another_name(storage: VolumeStorage, volume: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first create may have happened on the bricks although it was reported as failed."""
    recorder = Recorder(os)
    take_over(monkeypatch, recorder)
    lied: list[str] = []
    real = recorder._wrap

    def wrap(name: str, found: Callable[..., Any]) -> Callable[..., Any]:
        call = real(name, found)

        def create_and_fail(*args: Any, **kwargs: Any) -> Any:
            descriptor = call(*args, **kwargs)
            if not lied and str(args[0]).endswith(".bin"):
                lied.append(args[0])
                os.close(descriptor)
                raise no_errno(errno.ESTALE)
            return descriptor

        return create_and_fail if name == "open" else call

    monkeypatch.setattr(recorder, "_wrap", wrap)
    stored = storage.store(ContentFile(b"x"), "photos/a.bin")
    assert [stored.name] != lied
    assert (volume / stored.name).read_bytes() == b"x"


def test_a_stream_is_not_stored_from_its_middle(
    storage: VolumeStorage, volume: Path, files_in: FilesIn, recorder: Recorder
) -> None:
    reading, writing = os.pipe()
    os.write(writing, b"x" * 1000)
    os.close(writing)
    recorder.failures["fsync"] = [no_errno(errno.ESTALE)]
    with os.fdopen(reading, "rb") as pipe, pytest.raises(StorageUnavailable, match="stream"):
        storage.save("photos/a.bin", File(pipe))
    assert files_in(volume) == []


# Names that come from elsewhere


@pytest.mark.parametrize(
    "name", ["../out.bin", "/etc/passwd", "photos/../../out.bin", "a\0b", ".tribrick-volume", ".glusterfs/x", "."]
)
def test_no_way_out_of_the_tree(storage: VolumeStorage, volume: Path, files_in: FilesIn, name: str) -> None:
    for call in (storage.open, storage.delete, storage.exists, storage.size):
        with pytest.raises((SuspiciousFileOperation, ValueError)):
            call(name)
    with pytest.raises(SuspiciousFileOperation):
        storage.save(name + "/x" if name == "." else name.rpartition("/")[0] + "/../x", ContentFile(b"x"))
    with pytest.raises(SuspiciousFileOperation):
        storage._save(name, ContentFile(b"x"))
    assert (volume / ".tribrick-volume").exists()
    assert files_in(volume) == []
    assert not (volume.parent / "out.bin").exists()


def test_links_are_not_followed(storage: VolumeStorage, volume: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (volume / "photos").mkdir()
    (volume / "photos" / "link").symlink_to(tmp_path / "secret")
    with pytest.raises(OSError, match="link"):
        storage.open("photos/link")


# The rest of Django's interface


def test_reading(storage: VolumeStorage) -> None:
    name = storage.save("photos/a.bin", ContentFile(b"0123456789"))
    with storage.open(name) as file:
        assert (file.name, file.read(4)) == (name, b"0123")
        assert file.size == 10
    assert storage.exists(name)
    assert storage.size(name) == 10
    assert storage.get_modified_time(name) <= storage.get_created_time(name)
    assert storage.get_accessed_time(name).tzinfo is not None
    directories, files = storage.listdir("")
    assert (directories, files) == (["photos"], [])
    assert storage.listdir(name.rpartition("/")[0]) == ([], [name.rpartition("/")[2]])


def test_delete_may_be_repeated(storage: VolumeStorage) -> None:
    name = storage.save("photos/a.bin", ContentFile(b"x"))
    storage.delete(name)
    assert not storage.exists(name)
    storage.delete(name)
    storage.delete("photos/never/was")
    with pytest.raises(ValueError, match="name must be given"):
        storage.delete("")


def test_names_need_no_disk(storage: VolumeStorage, recorder: Recorder) -> None:
    name = storage.get_available_name("photos/a b.PNG", max_length=60)
    assert len(name) <= 60
    assert storage.get_valid_name("../a b.PNG") == "a-b.png"
    assert storage.is_name_available(name)
    assert not storage.is_name_available(name, max_length=10)
    assert recorder.calls == []


def test_it_goes_into_migrations() -> None:
    made = VolumeStorage(location="/srv/media", hash_levels=3, sentinel_id=False)
    text, imports = MigrationWriter.serialize(made)
    assert text == "tribrick.storage.VolumeStorage(hash_levels=3, location='/srv/media', sentinel_id=False)"
    assert imports == {"import tribrick.storage"}
    assert VolumeStorage(location="/srv/media").deconstruct()[1:] == ((), {"location": "/srv/media"})  # type: ignore[attr-defined]

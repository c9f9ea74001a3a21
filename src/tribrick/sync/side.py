"""A directory, its history, and how both change: scan, apply, and what a killed process left.

The history is ``.tribrick-history`` in the root: the same file system, so contents go to and fro by
rename, by link, and where the file system can (XFS, Btrfs) by cloning, without copying bytes. A version
is recorded only once its content is durable in the history. A file is replaced by exchanging two names
(renameat2(2), RENAME_EXCHANGE), so what lay there is in our hands, never overwritten, and is looked at
again before it is let go.

Links are never followed: every directory is opened by its descriptor.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import errno
import fcntl
import hashlib
import json
import os
import secrets
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from tribrick.sentinel import HISTORY
from tribrick.sync import versions
from tribrick.sync.plan import Step, too_many
from tribrick.sync.state import NOTHING, Stamp, State, SyncError, new_actor
from tribrick.sync.versions import Version, VersionVector

BATCH: Final = 200
CHUNK: Final = 1024 * 1024
_SIDE: Final = "side.json"
_FICLONE: Final = 0x40049409
_EXCHANGE: Final = 2
_NO_EXCHANGE: Final = frozenset({errno.EINVAL, errno.ENOSYS, errno.ENOTSUP})
_AT: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY | os.O_CLOEXEC
_FILE: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK

Progress = Callable[[str, int, int], None]


def _no_progress(_what: str, _done: int, _total: int) -> None:
    pass


class Moved(SyncError):
    """A file was changed by somebody else in the meantime; the next run looks at it."""


@dataclass
class Scan:
    """What a scan found: names whose changes were recorded, and names that were left alone."""

    seen: int = 0
    new: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)
    young: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)

    @property
    def recorded(self) -> int:
        """How many changes there were."""
        return len(self.new) + len(self.changed) + len(self.gone)


@dataclass
class Applied:
    """What was done on the disk, and what could not be."""

    written: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    rescued: list[str] = field(default_factory=list)
    """Names under which somebody wrote while they were replaced: that is a change of its own now."""


class Side:
    """The directory that *state* describes.

    *prove* raises an error unless the directory, given as a descriptor and a path, is the right one.
    With *linked* the history shares its bytes with the files instead of having copies.
    """

    def __init__(
        self,
        state: State,
        *,
        prove: Callable[[int, str], None] | None = None,
        linked: bool = False,
        mode: int | None = None,
        progress: Progress = _no_progress,
    ) -> None:
        self.state, self.linked, self.mode, self.progress, self._prove = state, linked, mode, progress, prove
        self.root = Path(state.meta("root"))
        self.history = self.root / HISTORY
        self.dry = False

    # Beginning, and the proof that this is the right directory.

    def begin(self) -> None:
        """Make the history of a new state. Refuses a directory that has belonged to another one."""
        root = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            if self._prove is not None:
                self._prove(root, str(self.root))
        finally:
            os.close(root)
        place = self.history / _SIDE
        if place.exists() and self.state.meta("id") not in place.read_text(encoding="utf-8", errors="replace"):
            raise SyncError(f"{self.root} belongs to a state already; if that is lost, remove {place} and run again")
        for part in ("objects", "incoming", "fetch"):
            (self.history / part).mkdir(mode=0o700, parents=True, exist_ok=True)
        self.history.chmod(0o700)
        self._mark()

    def check(self) -> bool:
        """Raise :class:`~tribrick.sync.state.SyncError` unless the root is the one that the state was begun for.

        Returns whether changes are counted under another name from now on.
        """
        with contextlib.ExitStack() as stack:
            try:
                root = _opened(stack, os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
            except OSError as error:
                raise SyncError(f"{self.root}: {error.strerror}") from error
            if self._prove is not None:
                self._prove(root, str(self.root))
            try:
                history = _opened(stack, os.open(HISTORY, _AT, dir_fd=root))
                text = os.read(_opened(stack, os.open(_SIDE, _FILE, dir_fd=history)), 4096)
                told = json.loads(text)
                found, mark = told["state"], told["mark"]
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise SyncError(
                    f"{self.root} is not the directory that {self.state.path} describes: it has no readable "
                    f"{HISTORY}/{_SIDE} (is it mounted?)"
                ) from error
        if found != self.state.meta("id"):
            raise SyncError(f"{self.root} belongs to another state than {self.state.path}")
        if mark == self.state.meta("mark") and mark.endswith(_boot()):
            return False
        # A process was killed, or one of the two is a restored copy, or both are, as those of a machine that was set
        # back: that one has booted since. Then counts may have been given before.
        with self.state.transaction():
            self.state.rename()
        return True

    def _mark(self) -> None:
        """Leave the same mark in the directory and in the state, before changes are counted."""
        mark = f"{secrets.token_hex(8)} {_boot()}"
        told = {"tribrick": 1, "state": self.state.meta("id"), "mark": mark}
        _write(self.history / _SIDE, json.dumps(told).encode())
        with self.state.transaction():
            self.state.set_meta("mark", mark)

    # The history.

    def object(self, sha256: str) -> Path:
        """Return where a content is kept."""
        return self.history / "objects" / sha256[:2] / sha256

    def has(self, sha256: str) -> bool:
        """Whether a content is here."""
        return self.object(sha256).exists()

    def _keeps(self, sha256: str) -> bool:
        """Whether a content is here, also when somebody may have written into it under another name."""
        return self.has(sha256) and (not self.linked or _hash(self.object(sha256)) == sha256)

    def keep(self, files: Iterable[tuple[Path, str]]) -> None:
        """Move files of the history's own into their places, all of them durable.

        First all are written and then all are flushed: a file system writes its journal once for many.
        """
        files = list(files)
        directories: set[Path] = set()
        for path, _sha256 in files:
            _sync(path)
        for path, sha256 in files:
            target = self.object(sha256)
            if not target.parent.is_dir():
                target.parent.mkdir(mode=0o700, exist_ok=True)
                directories.add(target.parent.parent)
            os.rename(path, target)
            directories.add(target.parent)
        for directory in directories:
            _sync(directory)

    # Scanning.

    def scan(self, *, accept: int = 0, quiet: float | None = None) -> Scan:
        """Record what was changed on the disk since it was last looked at.

        A directory that cannot be read ends the scan before anything is recorded, and so do more
        deletions than :func:`tribrick.sync.plan.too_many` lets pass; *accept* is the number agreed to.
        """
        renamed = self.check()
        if not self.dry:
            if renamed:
                self._mark()  # once is enough
            self.recover()
        found, known = Scan(), self.state.stamps()
        changed: list[tuple[str, Stamp]] = []
        here: set[str] = set()
        youngest = time.time_ns() - int((float(self.state.meta("quiet")) if quiet is None else quiet) * 1e9)
        for name, status in self._walk(found):
            here.add(name)
            found.seen += 1
            stamp = Stamp.of(status)
            if known.get(name) == stamp:
                continue
            if not stat.S_ISREG(status.st_mode):
                found.refused[name] = "it is not a regular file"
            elif name not in known and (why := versions.refusal(name, versions.OWN_NAME_LENGTH)):
                found.refused[name] = why
            elif stamp.changed > youngest:
                found.young.append(name)
            else:
                changed.append((name, stamp))
        gone = [name for name in sorted(known.keys() - here) if self._is_gone(name)]
        if why := too_many(len(gone), len(known), accept):
            raise SyncError(f"{self.root}: {why}")
        if (changed or gone) and not self.dry:
            self._mark()
        for start in range(0, len(changed), BATCH):
            self._record(changed[start : start + BATCH], found)
            self.progress("read", start + len(changed[start : start + BATCH]), len(changed))
        with self.state.transaction():
            for name in gone:
                self._record_deletion(name)
                found.gone.append(name)
        return found

    def _is_gone(self, name: str) -> bool:
        """Whether really nothing has this name: a walk can miss what is renamed meanwhile."""
        if any(name.startswith(f"{place}/") for place in self._exclude()):
            return False
        try:
            with self._directory(name) as (directory, last):
                os.stat(last, dir_fd=directory, follow_symlinks=False)
        except (FileNotFoundError, NotADirectoryError):
            return True
        return False

    def _exclude(self) -> list[str]:
        return list(json.loads(self.state.meta("exclude")))

    def _walk(self, found: Scan) -> Iterator[tuple[str, os.stat_result]]:
        """Yield everything that is no directory, with its status; dot names in the root are not the site's."""
        exclude = set(self._exclude())

        def below(at: int, directory: str) -> Iterator[tuple[str, os.stat_result]]:
            inside = []
            with os.scandir(at) as entries:
                for entry in entries:
                    name = f"{directory}{entry.name}"
                    if (not directory and entry.name.startswith(".")) or versions.TEMPORARY.fullmatch(entry.name):
                        continue
                    if not entry.is_dir(follow_symlinks=False):
                        with contextlib.suppress(FileNotFoundError):
                            yield name, entry.stat(follow_symlinks=False)
                    elif len(name) > versions.NAME_LENGTH:
                        found.refused[name] = "it is too deep"
                    elif name not in exclude:
                        inside.append(entry.name)
            for last in inside:
                with contextlib.suppress(FileNotFoundError):
                    descriptor = os.open(last, _AT, dir_fd=at)
                    try:
                        yield from below(descriptor, f"{directory}{last}/")
                    finally:
                        os.close(descriptor)

        root = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            yield from below(root, "")
        except OSError as error:
            raise SyncError(f"{self.root} cannot be read: {error}; nothing was recorded") from error
        finally:
            os.close(root)

    def _record(self, changed: Sequence[tuple[str, Stamp]], found: Scan) -> None:
        """Take contents into the history, all durable, and then their versions into the state."""
        taken: list[tuple[str, str, Stamp]] = []
        new: list[tuple[Path, str]] = []
        for name, stamp in changed:
            try:
                sha256 = self._take(name, stamp, new)
            except (Moved, FileNotFoundError):
                found.young.append(name)
            except OSError as error:
                found.refused[name] = error.strerror or str(error)
            else:
                taken.append((name, sha256, stamp))
        self.keep(new)
        with self.state.transaction():
            for name, sha256, stamp in taken:
                before = self.state.on_disk(name)
                known = [head for head in self.state.heads(name) if head.sha256 == sha256]
                if before is not None and before.sha256 == sha256:
                    version = before
                elif known:  # a killed run wrote it, or somebody wrote the same
                    version = known[-1]
                else:
                    version = self._change(name, before, sha256, stamp)
                    self.state.add([version])
                    (found.changed if before is not None and not before.deleted else found.new).append(name)
                self.state.set_disk(version, self._stamp_now(name, stamp))

    def _record_deletion(self, name: str) -> None:
        before = self.state.on_disk(name)
        tombstones = [head for head in self.state.heads(name) if head.deleted]
        if tombstones:
            version = tombstones[-1]
        else:
            version = self._change(name, before, "", NOTHING)
            self.state.add([version])
        self.state.set_disk(version, NOTHING)

    def _change(self, name: str, before: Version | None, sha256: str, stamp: Stamp) -> Version:
        """Return the version of a change that somebody made of what the disk showed."""
        actor, count = self.state.next_count("replica")
        vector = (before.vector if before else VersionVector()).with_count(actor, count)
        origin = before.origin if before else ""
        size, modified = (stamp.size, stamp.modified) if sha256 else (0, 0)
        return Version(name, vector, sha256, size, modified, self.time_of(stamp), self.state.meta("node"), origin)

    def time_of(self, stamp: Stamp) -> int:
        """Return when a change was made, by this node's clock: the inode's time, which no user sets."""
        return stamp.changed or time.time_ns()

    def _stamp_now(self, name: str, stamp: Stamp) -> Stamp:
        """Return the stamp of a file whose inode got one more link by us."""
        if not self.linked:
            return stamp
        with contextlib.suppress(OSError), self._directory(name) as (directory, last):
            now = Stamp.of(os.stat(last, dir_fd=directory, follow_symlinks=False))
            if now._replace(changed=stamp.changed) == stamp:
                return now
        return stamp

    def _take(self, name: str, stamp: Stamp, taken: list[tuple[Path, str]]) -> str:
        """Copy the content of a file beside the history, if it is not there; return its hash."""
        with self._directory(name) as (directory, last), contextlib.ExitStack() as stack:
            source = _opened(stack, os.open(last, _FILE, dir_fd=directory))
            if Stamp.of(os.fstat(source)) != stamp:
                raise Moved(name)
            if self.dry:
                return _copy(source, None)
            new = self.history / "incoming" / f"scan-{_token()}"
            try:
                if self.linked:
                    self._forget_overwritten(name, stamp)
                    os.link(last, new, src_dir_fd=directory, follow_symlinks=False)
                    sha256 = _copy(source, None)
                else:
                    target = _opened(stack, os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
                    sha256 = _copy(target, None) if _clone(source, target) else _copy(source, target)
                now = Stamp.of(os.fstat(source))
                if now._replace(changed=stamp.changed) != stamp or (not self.linked and now.changed != stamp.changed):
                    raise Moved(name)
            except BaseException:
                new.unlink(missing_ok=True)
                raise
            if self._keeps(sha256):
                new.unlink()
            else:
                taken.append((new, sha256))
            return sha256

    def _forget_overwritten(self, name: str, stamp: Stamp) -> None:
        """Take away the history's name of a content that was overwritten in place, under its link."""
        before = self.state.on_disk(name)
        if before is not None and before.sha256:
            with contextlib.suppress(FileNotFoundError):
                place = self.object(before.sha256)
                if place.stat().st_ino == stamp.inode and _hash(place) != before.sha256:
                    place.unlink()

    # Applying.

    def apply(self, steps: Sequence[Step]) -> Applied:
        """Do what a plan says. A file that somebody has changed meanwhile is left alone."""
        self.check()
        done = Applied()
        for start in range(0, len(steps), BATCH):
            self._apply(steps[start : start + BATCH], done)
            self.progress("written", start + len(steps[start : start + BATCH]), len(steps))
        self.state.clean()
        return done

    def _apply(self, steps: Sequence[Step], done: Applied) -> None:
        tokens = {step.name: f"apply-{_token()}" for step in steps}
        shown: list[tuple[Step, Stamp]] = []
        with contextlib.ExitStack() as stack:
            ready: list[tuple[Step, int]] = []
            for step in steps:
                try:
                    ready.append((step, self._prepare(step, tokens[step.name], stack)))
                except (OSError, SyncError) as error:
                    done.failed[step.name] = _reason(error)
            for _step, file in ready:
                if file >= 0:
                    os.fsync(file)
            self.state.hold((tokens[step.name], step.name, step.before, step.after) for step, _file in ready)
            directories: dict[str, None] = {}
            for step, _file in ready:
                try:
                    shown.append((step, self._show(step, tokens[step.name], directories)))
                except (OSError, SyncError) as error:
                    done.failed[step.name] = _reason(error)
            for step, file in ready:  # once more under its name: only that is durable on GlusterFS
                if file >= 0 and step.name not in done.failed:
                    os.fsync(file)
            for path in directories:
                with (
                    contextlib.suppress(FileNotFoundError, NotADirectoryError),
                    self._directory(f"{path}x") as (directory, _last),
                ):
                    os.fsync(directory)
        with self.state.transaction():
            for step, stamp in shown:
                self.state.set_disk(step.after, stamp)
        done.written += [step.name for step, _stamp in shown if step.kind == "write"]
        done.removed += [step.name for step, _stamp in shown if step.kind == "remove"]
        done.rescued += self.recover()

    def _prepare(self, step: Step, token: str, stack: contextlib.ExitStack) -> int:
        """Make the new file beside the history; return its descriptor, or -1 where none is needed."""
        if step.kind != "write":
            return -1
        new, kept = self.history / "incoming" / token, self.object(step.after.sha256)
        times = (step.after.modified, step.after.modified)
        # What another name shows already is copied: whoever writes into one of two links changes both.
        if self.linked and kept.stat().st_nlink == 1:
            os.link(kept, new)
            file = _opened(stack, os.open(new, _FILE))
            sha256 = _copy(file, None)
        else:
            source = _opened(stack, os.open(kept, _FILE))
            file = _opened(stack, os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
            sha256 = _copy(file, None) if _clone(source, file) else _copy(source, file)
        if sha256 != step.after.sha256:
            new.unlink()
            kept.unlink()  # no content of anybody's: the next run fetches it
            raise SyncError(f"the history's copy of it was damaged: {kept}")
        os.fchmod(file, self._mode_of(step))
        os.utime(file, ns=times)
        return file

    def _mode_of(self, step: Step) -> int:
        if step.before is not None and not step.before.deleted:
            with contextlib.suppress(OSError), self._directory(step.name) as (directory, last):
                return stat.S_IMODE(os.stat(last, dir_fd=directory, follow_symlinks=False).st_mode) & 0o777
        return 0o644 if self.mode is None else self.mode

    def _show(self, step: Step, token: str, directories: dict[str, None]) -> Stamp:
        """Let the name show what the step says; what lay there has the token then. Return the new stamp."""
        if step.kind == "note":
            return self.state.stamp(step.name) or NOTHING
        incoming = self.history / "incoming" / token
        with self._directory(step.name, make=step.kind == "write") as (directory, last):
            expected = self.state.stamp(step.name)
            try:
                status = os.stat(last, dir_fd=directory, follow_symlinks=False)
            except FileNotFoundError:
                status = None
            directories[step.name.rpartition("/")[0] + "/" if "/" in step.name else ""] = None
            if step.kind == "remove":
                if status is None or Stamp.of(status) != expected:
                    raise Moved("somebody has changed it meanwhile")
                os.rename(last, incoming, src_dir_fd=directory)
                return NOTHING
            if status is not None and stat.S_ISDIR(status.st_mode):
                _remove_empty(directory, last)
                status = None
            if (Stamp.of(status) if status else None) != expected:
                raise Moved("somebody has changed it meanwhile")
            if status is None:
                os.link(incoming, last, dst_dir_fd=directory)
                incoming.unlink()
            else:
                _exchange(incoming, directory, last)
            return Stamp.of(os.stat(last, dir_fd=directory, follow_symlinks=False))

    @contextlib.contextmanager
    def _directory(self, name: str, *, make: bool = False) -> Iterator[tuple[int, str]]:
        """Open the directory in which a name lies, through no link; yield it and the rest of the name."""
        *parts, last = name.split("/")
        with contextlib.ExitStack() as stack:
            at = _opened(stack, os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
            for part in parts:
                try:
                    below = os.open(part, _AT, dir_fd=at)
                except FileNotFoundError:
                    if not make:
                        raise
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(part, 0o755, dir_fd=at)
                    os.fsync(at)
                    below = os.open(part, _AT, dir_fd=at)
                at = _opened(stack, below)
            yield at, last

    # What a killed process, or a step just done, has left in our hands.

    def recover(self) -> list[str]:
        """Look after files that were replaced: let go what the history has, and keep what it has not.

        The latter was written by somebody between our last look and the replacement. It becomes a
        change of its own. Returns the names of such.
        """
        rescued: list[str] = []
        directories: set[Path] = set()
        held = self.state.held()
        for token, name, before, after in held:
            path = self.history / "incoming" / token
            try:
                status = os.lstat(path)
            except FileNotFoundError:
                continue
            if not stat.S_ISREG(status.st_mode):
                raise SyncError(f"{path} is not a regular file; it lay under {name}. Look at it, then move it away")
            sha256 = _hash(path)
            if path.with_name(f"{token}.new").exists():
                self._put_back(path, name)
            usual = {after.sha256, *([before.sha256] if before else [])}
            if sha256 in usual and self._keeps(sha256):
                continue
            _sync(path)
            os.link(path, self._place(sha256, directories))
            for directory in directories:
                _sync(directory)
            if sha256 not in usual:
                with self.state.transaction():
                    # The disk has moved on without it, so no later change follows it: it counts for itself.
                    theirs = self._change(name, before, sha256, Stamp.of(status))
                    vector = (before.vector if before else VersionVector()).with_count(new_actor(theirs.node), 1)
                    self.state.add([replace(theirs, vector=vector)])
                    self.state.let_go([token])
                rescued.append(name)
        with self.state.transaction():
            self.state.let_go(token for token, *_ in held)
        with os.scandir(self.history / "incoming") as entries:
            for entry in entries:  # what is not held is a copy of something
                os.unlink(entry.path)
        return rescued

    def _put_back(self, path: Path, name: str) -> None:
        """Give a file its name again if nothing has it: a killed process had moved the file away to replace it."""
        with contextlib.suppress(FileExistsError, FileNotFoundError, NotADirectoryError):
            with self._directory(name) as (directory, last):
                os.link(path, last, dst_dir_fd=directory)
                os.fsync(directory)

    def _place(self, sha256: str, directories: set[Path]) -> Path:
        place = self.object(sha256)
        place.parent.mkdir(mode=0o700, exist_ok=True)
        place.unlink(missing_ok=True)
        directories |= {place.parent, place.parent.parent}
        return place


def _reason(error: Exception) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)


def _opened(stack: contextlib.ExitStack, descriptor: int) -> int:
    stack.callback(os.close, descriptor)
    return descriptor


def _boot() -> str:
    """Return the kernel's name of this boot; nothing where it has none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _token() -> str:
    return base64.b32encode(secrets.token_bytes(13))[:20].decode().lower()


def _copy(source: int, target: int | None) -> str:
    """Copy a file to *target*, if there is one; return its SHA-256."""
    hasher = hashlib.sha256()
    while chunk := os.read(source, CHUNK):
        hasher.update(chunk)
        view = memoryview(chunk)
        while target is not None and view:
            view = view[os.write(target, view) :]
    return hasher.hexdigest()


def _hash(path: Path) -> str:
    descriptor = os.open(path, _FILE)
    try:
        return _copy(descriptor, None)
    finally:
        os.close(descriptor)


def _clone(source: int, target: int) -> bool:
    """Let *target* share the bytes of *source*; False where the file system cannot."""
    try:
        fcntl.ioctl(target, _FICLONE, source)
    except OSError as error:
        if error.errno in {errno.EOPNOTSUPP, errno.EINVAL, errno.ENOTTY, errno.EXDEV, errno.ENOSYS, errno.EPERM}:
            return False
        raise
    return True


def _write(path: Path, data: bytes) -> None:
    new = path.with_name(f".{path.name}.new")
    with new.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    new.rename(path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_empty(directory: int, name: str) -> None:
    """Remove a directory that holds nothing but empty directories; fail if it holds a file."""
    below = os.open(name, _AT, dir_fd=directory)
    try:
        with os.scandir(below) as entries:
            listed = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
        for entry in listed:
            _remove_empty(below, entry)
    finally:
        os.close(below)
    os.rmdir(name, dir_fd=directory)


_libc: Any = ctypes.CDLL(None, use_errno=True)


def _exchange(path: Path, directory: int, name: str) -> None:
    """Exchange a file with the one under *name*.

    Where the file system cannot, the old one is moved away first: for a moment nothing has the name.
    """
    here = os.open(path.parent, _AT)
    try:
        done = _libc.renameat2(here, os.fsencode(path.name), directory, os.fsencode(name), _EXCHANGE)
        if done == 0:
            return
        code = ctypes.get_errno()
        if code not in _NO_EXCHANGE:
            raise OSError(code, os.strerror(code), name)
        new = f"{path.name}.new"
        os.rename(path.name, new, src_dir_fd=here, dst_dir_fd=here)
        os.rename(name, path.name, src_dir_fd=directory, dst_dir_fd=here)
        os.link(new, name, src_dir_fd=here, dst_dir_fd=directory)
        os.unlink(new, dir_fd=here)
    finally:
        os.close(here)

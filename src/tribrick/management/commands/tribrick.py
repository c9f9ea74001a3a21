"""``manage.py tribrick COMMAND``: audit and repair, versions, ledger, replication."""

from __future__ import annotations

import argparse
import json
import logging
import signal
import sqlite3
import sys
import syslog
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from django.contrib.auth import get_user_model
from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db import DatabaseError, close_old_connections, connections
from django.utils import timezone

from tribrick import audit, catalog, ledger, restore
from tribrick.conf import setting
from tribrick.copies import QUARANTINE, AuditError, Copy, copies
from tribrick.errors import StorageError
from tribrick.models import MediaFile
from tribrick.sync.state import SyncError

log = logging.getLogger("tribrick.commands")
EXIT = """\
Exit codes: 0 all in order, 1 something differs or could not be done, 2 it could not be found out
(a copy or the database is away)."""
_SHOWN = 20
_EVERY = 10.0
_UNSEEN = timedelta(hours=1)
"""How long the replication may have been away without a deleted name going unseen that came back."""


class Command(BaseCommand):
    """See the module's text."""

    help = "Compare, mend and look after stored media files. COMMAND --help tells more."
    requires_system_checks: list[str] = []

    def add_arguments(self, parser: CommandParser) -> None:
        """Declare the commands."""
        commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

        def command(name: str, work: Callable[[dict[str, Any]], None], text: str, more: str = "") -> CommandParser:
            made: CommandParser = commands.add_parser(
                name, help=text, description=f"{text}.", epilog=f"{more}\n\n{EXIT}".lstrip(),
                formatter_class=argparse.RawDescriptionHelpFormatter,
            )  # fmt: skip
            made.set_defaults(work=work)
            made.add_argument("--json", action="store_true", help="answer with one JSON document")
            return made

        def storage(made: CommandParser) -> None:
            made.add_argument("--storage", default="default", metavar="KEY", help="the key in STORAGES (default)")

        def apply(made: CommandParser) -> None:
            made.add_argument("--apply", action="store_true", help="do it; without this it is only said")

        def source(made: CommandParser) -> None:
            storage(made)
            made.add_argument("--copy", action="append", metavar="NAME", help="only this copy; may be repeated")
            made.add_argument("--ledger", action="store_true", help="go by the ledger; the database may be away")

        one = command(
            "audit", self._audit, "Compare the catalog with the storage and every copy of it, byte by byte",
            "Found are: missing, torn (shorter, or ending in zeros), different, unreadable, dead (deleted, but\n"
            "there) and extra (not in the catalog). Files younger than an hour are not called extra.",
        )  # fmt: skip
        source(one)
        one.add_argument("--sample", type=_positive, metavar="N", help="only N files at random, and nothing extra")
        one.add_argument("--resume", metavar="FILE", help="keep there how far it is, and go on from there")

        one = command(
            "reconcile", self._reconcile, "Mend what an audit finds, from a copy with the catalog's hash",
            "What is replaced goes to the storage's quarantine. Media hosts are mended through the outbox.\n"
            "Extra files are left alone.",
        )  # fmt: skip
        source(one)
        one.add_argument("--host", metavar="NAME", help="mend only this copy or host")
        apply(one)

        one = command(
            "adopt", self._adopt, "Take files into the catalog that lie in the storage and are not in it",
            "Nothing is moved. Names of deleted files are refused.",
        )  # fmt: skip
        storage(one)
        one.add_argument("--under", default="", metavar="DIRECTORY", help="only files below this directory")
        one.add_argument("--owner", metavar="USERNAME", help="the owner to note")
        apply(one)

        one = command(
            "sweep", self._sweep, "Move files that our code made and that never got a row to a quarantine",
            "They must be 24 hours older than the oldest open transaction. The quarantine is emptied after 30\n"
            "days. Bytes of deleted files are removed again. Foreign files are reported, never touched.",
        )  # fmt: skip
        storage(one)
        one.add_argument(
            "--accept", type=_positive, default=0, metavar="N", help="take up to N even if that is more than 1 %%"
        )
        apply(one)

        one = command(
            "restore", self._restore, "Bring files back from a mirror or a snapshot of it",
            "What the storage has already, with the right hash, is left alone. Files that the database does not\n"
            "know are adopted, deleted ones are skipped, rows whose bytes are nowhere are listed.",
        )  # fmt: skip
        storage(one)
        one.add_argument("tree", help="the directory of a snapshot, or the mirror's directory current")
        one.add_argument(
            "--under", action="append", default=[], metavar="PATH", help="only this file or directory; may be repeated"
        )
        one.add_argument(
            "--include-deleted", action="store_true", help="store deleted files once more, under new names"
        )
        apply(one)

        one = command("versions", self._versions, "List the versions of a file, go back to one, or expire old ones")
        one.add_argument("name", nargs="?", help="the stored name of any version")
        one.add_argument("--restore", action="store_true", help="make this version the current one")
        one.add_argument("--expire", action="store_true", help="of all files, delete versions that are not current")
        one.add_argument("--keep", type=_natural, default=0, metavar="N", help="but keep the N newest of them")
        one.add_argument("--older-than", type=_natural, default=0, metavar="DAYS", help="and younger ones")
        apply(one)

        one = command("ledger", self._ledger, "Copy the changes of the catalog to a local file, check it, use it")
        one.add_argument("what", choices=["follow", "verify", "rebuild"], help="rebuild writes a lost catalog again")
        one.add_argument("--path", metavar="FILE", help='the ledger; TRIBRICK["LEDGER"] if not given')
        one.add_argument("--once", action="store_true", help="follow: copy what is new and end")
        one.add_argument("--interval", type=float, default=ledger.INTERVAL, metavar="S", help="follow: seconds")
        one.add_argument("--no-database", action="store_true", help="verify: check the file alone")
        apply(one)

        one = command(
            "replicate", self._replicate, "Deliver the outbox to media hosts, and finish interrupted deletes",
        )  # fmt: skip
        one.add_argument("--once", action="store_true", help="do what is due and end")
        one.add_argument("--again", action="store_true", help="first remove the bytes of all deleted files once more")
        one.add_argument(
            "--again-unless", metavar="FILE", help="the same, unless FILE is there; it is made when that is done"
        )

        one = command(
            "drain", self._drain, "Bring what is in the spools to the volume",
            "A file leaves the spools when it was read back from the volume with the right hash. It may be killed\n"
            "at any point, and run on several nodes at once. Copies without a row a day later go to a quarantine.",
        )  # fmt: skip
        how = one.add_mutually_exclusive_group()
        how.add_argument("--once", action="store_true", help="one pass, and end (default)")
        how.add_argument("--watch", action="store_true", help="go on, with a pass every few seconds")
        one.add_argument("--interval", type=_positive, default=5, metavar="S", help="watch: seconds")

        one = command(
            "fallback", self._fallback,
            "Work without GlusterFS for a time: fill a directory outside it, and merge it back",
            "complete writes into --tree what the catalog says is stored and is not right there, from --from (in\n"
            "the order given), the spool here, --volume and the other nodes, and removes what was deleted. merge\n"
            "writes to --volume what is not right there, from --tree and the other nodes, and reads it back. Both\n"
            "tell the number of the newest change that they saw; with --after only later changes are looked at.",
        )  # fmt: skip
        one.add_argument(
            "what", choices=["status", "complete", "merge"], help="what there is to do; the way in; the way back"
        )
        storage(one)
        one.add_argument("--tree", required=True, metavar="DIRECTORY", help="the directory outside GlusterFS")
        one.add_argument("--volume", metavar="DIRECTORY", help="where the volume is mounted")
        one.add_argument(
            "--from", action="append", default=[], dest="sources", metavar="NAME=DIRECTORY",
            help="complete: a directory with copies, such as mirror=/srv/media-mirror/current; may be repeated",
        )  # fmt: skip
        one.add_argument(
            "--foreign", metavar="NAME", help="complete: take files that the catalog does not know from this source"
        )
        one.add_argument("--after", type=_natural, default=0, metavar="N", help="only changes after this one")
        one.add_argument(
            "--reserve", type=_natural, default=1024, metavar="MIB", help="complete: what stays free on the disk (1024)"
        )
        apply(one)

        one = command("backfill", self._backfill, "Put every file into the outbox for a new media host")
        storage(one)
        one.add_argument("host", help="as it stands in MEDIA_HOSTS")

        from tribrick.sync import command as sync

        text = "Reconcile directories that were changed directly, each on its own side"
        one = command("sync", self._sync, text, sync.MORE)
        sync.add_arguments(one)

    def handle(self, *_args: Any, **options: Any) -> None:
        """Run the command; errors of the outside world are one sentence."""
        try:
            options["work"](options)
        except (AuditError, ledger.LedgerError, SyncError) as error:
            raise CommandError(str(error), returncode=1) from error
        except (StorageError, DatabaseError, sqlite3.Error, OSError) as error:
            raise CommandError(" ".join(str(error).split()), returncode=2) from error

    # Talking.

    def _say(self, text: str) -> None:
        # A name on the disk may be no text; what was found must be told all the same.
        self.stdout.write(text.encode(errors="backslashreplace").decode())

    def _answer(self, options: dict[str, Any], document: dict[str, Any], text: list[str]) -> None:
        self._say(json.dumps(document, indent=2, default=str) if options["json"] else "\n".join(text))

    def _progress(self) -> audit.Progress:
        """Return a progress line on a terminal, nothing elsewhere."""
        if not sys.stderr.isatty():
            return lambda _what, _done, _total: None
        shown = [0.0]

        def show(what: str, done: int, total: int) -> None:
            if done < total and time.monotonic() - shown[0] < 0.2:
                return
            shown[0] = time.monotonic()
            part = f"{100 * done // total:3d} %" if total else ""
            bar = "#" * (30 * done // total if total else 0)
            end = "\n" if done >= total and what == "files" else ""
            sys.stderr.write(f"\r\033[K{what} [{bar:30}] {part} {done} of {total}{end}")
            sys.stderr.flush()

        return show

    # Audit and repair.

    def _set_up(self, options: dict[str, Any]) -> tuple[audit.Source, list[Copy], list[Copy]]:
        """Return the source, the copies asked for, and all of them."""
        alias = options["storage"]
        every = copies(alias)
        wanted = options["copy"] or [copy.name for copy in every]
        if unknown := set(wanted) - {copy.name for copy in every}:
            raise CommandError(
                f"no copy is called {', '.join(sorted(unknown))}; there are {', '.join(copy.name for copy in every)}"
            )
        source: audit.Source = audit.CatalogSource(alias)
        if options["ledger"]:
            source = audit.LedgerSource(alias, ledger.Ledger(self._path(options.get("path"))))
        return source, [copy for copy in every if copy.name in wanted], every

    def _audit(self, options: dict[str, Any]) -> None:
        source, over, _every = self._set_up(options)
        job = audit.Audit(source, over, resume=options["resume"], progress=self._progress())
        report = job.run(sample=options["sample"])
        self._report(options, report)

    def _report(self, options: dict[str, Any], report: audit.Report) -> None:
        text = [
            f"{one.kind}: {one.name} in {one.copy}{f' ({one.note})' if one.note else ''}" for one in report.findings
        ]
        text += [f"away: {name}: {why}" for name, why in report.away.items()]
        text.append(f"{report.checked} files, {len(report.copies)} copies, {len(report.findings)} differences")
        self._answer(options, report.as_dict(), text)
        if report.away:
            raise CommandError(f"away: {', '.join(report.away)}", returncode=2)
        if report.findings:
            raise CommandError(f"{len(report.findings)} differences", returncode=1)

    def _reconcile(self, options: dict[str, Any]) -> None:
        if options["host"]:
            options["copy"] = [options["host"]]
        source, over, every = self._set_up(options)
        report = audit.Audit(source, over, progress=self._progress()).run()
        repairs = list(audit.reconcile(report.findings, source, every, apply=options["apply"]))
        text = [f"{one.finding.kind}: {one.finding.name} in {one.finding.copy}: {one.what}" for one in repairs]
        text += [f"away: {name}: {why}" for name, why in report.away.items()]
        failed = sum(not one.ok for one in repairs if one.finding.kind != "extra")
        mended = sum(one.ok for one in repairs)
        text.append(
            f"{report.checked} files; {mended} {'mended' if options['apply'] else 'to mend'}, {failed} cannot be"
        )
        if not options["apply"] and mended:
            text.append("Nothing was done; --apply does it.")
        document = {
            "applied": options["apply"],
            "away": report.away,
            "repairs": [{**vars(one.finding), "ok": one.ok, "what": one.what} for one in repairs],
        }
        self._answer(options, document, text)
        if report.away:
            raise CommandError(f"away: {', '.join(report.away)}", returncode=2)
        if failed:
            raise CommandError(f"{failed} could not be mended", returncode=1)

    def _adopt(self, options: dict[str, Any]) -> None:
        owner = None
        if options["owner"]:
            owner = (
                get_user_model()
                ._default_manager.filter(**{str(get_user_model().USERNAME_FIELD): options["owner"]})
                .first()
            )
            if owner is None:
                raise CommandError(f"there is no account {options['owner']}")
        alias = options["storage"]
        found = audit.strays(alias, self._progress())
        adopted = list(
            audit.adopt(found, alias, under=options["under"], apply=options["apply"], owner=owner)
        )  # fmt: skip
        taken = [one.name for one in adopted if not one.refused]
        refused = {one.name: one.refused for one in adopted if one.refused}
        text = [*taken, *(f"refused: {name!r}: {why}" for name, why in refused.items())]
        text.append(f"{len(taken)} {'adopted' if options['apply'] else 'to adopt'}, {len(refused)} refused")
        self._answer(options, {"applied": options["apply"], "adopted": taken, "refused": refused}, text)
        if refused:
            raise CommandError(f"{len(refused)} refused", returncode=1)

    def _sweep(self, options: dict[str, Any]) -> None:
        alias = options["storage"]
        found = audit.strays(alias, self._progress())
        doomed = [one.name for one in [*found.own, *found.rests]]
        document: dict[str, Any] = {
            "applied": options["apply"], "seen": found.seen, "own": doomed, "young": found.young,
            "dead": [known.name for known in found.dead], "foreign": [one.name for one in found.foreign],
        }  # fmt: skip
        text = [f"without a row: {name}" for name in doomed]
        text += [f"deleted, but there: {known.name}" for known in found.dead]
        text += [f"foreign, left alone: {one.name}" for one in found.foreign[:_SHOWN]]
        if len(found.foreign) > _SHOWN:
            text.append(f"... and {len(found.foreign) - _SHOWN} more foreign files; --json names all; adopt takes them")
        text.append(f"{found.seen} files, {len(doomed)} without a row, {found.young} too young to tell")
        if options["apply"]:
            swept = audit.sweep(found, alias, accept=options["accept"])
            document |= vars(swept)
            text.append(
                f"{len(swept.quarantined)} moved to {QUARANTINE}, {len(swept.removed)} removed again, "
                f"{swept.expired} removed from the quarantine"
            )
        self._answer(options, document, text)

    def _restore(self, options: dict[str, Any]) -> None:
        done = restore.Restore(
            options["tree"], alias=options["storage"], under=options["under"], apply=options["apply"],
            include_deleted=options["include_deleted"], progress=self._progress(),
        ).run()  # fmt: skip
        text = [f"restored: {name}" for name in done.restored]
        text += [f"newer than the database, adopted: {name}" for name in done.adopted]
        text += [f"deleted, skipped: {name}" for name in done.dead]
        text += [f"deleted, stored again: {old} as {new or 'a new name'}" for old, new in done.again.items()]
        text += [f"deleted, was stored again before: {old} as {new}" for old, new in done.before.items()]
        text += [f"lacking: {name}: {why}" for name, why in done.lacking.items()]
        text += [f"refused: {name!r}: {why}" for name, why in done.refused.items()]
        text.append(
            f"{done.right} were right, {len(done.restored)} restored, {len(done.adopted)} adopted, {len(done.dead)} "
            f"skipped, {len(done.again)} stored again, {len(done.lacking)} lacking, {len(done.refused)} refused"
        )
        if not options["apply"]:
            text.append("Nothing was done; --apply does it.")
        self._answer(options, {"applied": options["apply"], **vars(done)}, text)
        if not done.complete:
            raise CommandError(f"{len(done.lacking)} lacking, {len(done.refused)} refused", returncode=1)

    # Versions.

    def _versions(self, options: dict[str, Any]) -> None:
        if options["expire"]:
            if options["name"] or options["restore"]:
                raise CommandError("--expire is for all files; give neither a name nor --restore")
            rules: dict[str, Any] = {"keep": options["keep"], "older_than": timedelta(days=options["older_than"])}
            gone = catalog.expire(**rules) if options["apply"] else [file.name for file in catalog.expirable(**rules)]
            text = [*gone, f"{len(gone)} {'deleted' if options['apply'] else 'to delete'}"]
            self._answer(options, {"applied": options["apply"], "expired": gone}, text)
            return
        file = MediaFile.objects.filter(name=options["name"] or "").first()
        if file is None:
            raise CommandError(
                f"the catalog has no {options['name']}" if options["name"] else "give a name, or --expire"
            )
        if options["restore"]:
            try:
                catalog.restore(file)
            except catalog.FileIsDeleted as error:
                raise CommandError(str(error)) from error
        shown = catalog.current(file)
        rows = [
            {
                "version": one.version, "name": one.name, "state": one.state, "size": one.size, "sha256": one.sha256,
                "created": one.created.isoformat(), "current": one == shown,
            }
            for one in catalog.versions(file)
        ]  # fmt: skip
        text = [
            f"{'*' if row['current'] else ' '} {row['version']:3d} {row['state']:8} {row['size']:>12} {row['name']}"
            for row in rows
        ]
        self._answer(options, {"versions": rows}, text)

    # Ledger.

    @staticmethod
    def _path(given: str | None) -> str:
        path = given or setting("LEDGER")
        if not path:
            raise CommandError('give --path, or set TRIBRICK["LEDGER"]')
        return str(path)

    def _ledger(self, options: dict[str, Any]) -> None:
        path = self._path(options["path"])
        if options["what"] == "follow":
            node = str(setting("NODE"))
            if options["once"]:
                copied = ledger.follow_once(path, node=node)
                self._answer(options, {"copied": copied}, [f"{copied} changes copied"])
                return
            ledger.follow(
                path, node=node, interval=options["interval"], stop=_stop_on_signals(), said=self.stderr.write
            )
        elif options["what"] == "verify":
            number, chain, behind = ledger.verify(path, database=not options["no_database"])
            document = {"number": number, "chain": chain, "behind": behind}
            self._answer(options, document, [f"in order up to change {number}, {behind} behind; chain {chain}"])
        else:
            done = ledger.rebuild(path, apply=options["apply"])
            what = "written" if options["apply"] else "missing; --apply writes them"
            text = [f"{done.changes} changes, {done.files} files, {done.updated} newer states {what}"]
            self._answer(options, {"applied": options["apply"], **vars(done)}, text)

    # Reconciliation.

    def _sync(self, options: dict[str, Any]) -> None:
        from tribrick.sync import command as sync

        if options["what"] == "watch":
            sync.watch(options, _stop_on_signals(), self.stderr.write)
            return
        answer = sync.work(options, self._progress())
        self._answer(options, answer.document, answer.text)
        if answer.trouble:
            raise CommandError(answer.trouble, returncode=answer.code)

    # Replication.

    def _replicate(self, options: dict[str, Any]) -> None:
        from tribrick.outbox import Worker, remove_done

        marker = Path(options["again_unless"]) if options["again_unless"] else None
        again = options["again"] or (marker is not None and not marker.exists())
        worker = Worker()
        if options["once"]:
            removed_again, failed_again = _delete_again(marker) if again else (0, 0)
            delivered = worker.work()
            remove_done()
            removed, failed = catalog.finish_deletes()
            expired = catalog.expire_tombstones()
            failed += failed_again
            document = {
                "delivered": delivered, "again": removed_again, "removed": removed, "failed": failed,
                "expired": expired,
            }  # fmt: skip
            text = f"{delivered} delivered, {removed} deletes finished, {failed} failed, {expired} tombstones expired"
            if again:
                text = f"{removed_again} removed once more, {text}"
            self._answer(options, document, [text])
            if failed:
                raise CommandError(f"{failed} deletes could not be finished", returncode=1)
            return
        stop = _stop_on_signals()
        thread = threading.Thread(target=worker.run, args=(stop,), name="tribrick-outbox", daemon=True)
        thread.start()
        looked = timezone.now() - _UNSEEN
        while not stop.wait(5.0):
            if not thread.is_alive():
                raise CommandError("the outbox worker ended", returncode=2)
            try:
                close_old_connections()
                if again:
                    self._say("{} removed once more, {} failed".format(*_delete_again(marker)))
                    again = False  # unless a storage or the database is away, which is an exception
                catalog.finish_deletes()
                now = timezone.now()
                if now - looked >= catalog.LOOKS[0]:
                    catalog.remove_returned(looked, now)
                    looked = now
                catalog.expire_tombstones()
            except (StorageError, DatabaseError) as error:
                log.warning("deletes cannot be finished now: %s", " ".join(str(error).split()))
                connections[catalog.database()].close()
        thread.join(60)

    # The spool.

    def _drain(self, options: dict[str, Any]) -> None:
        from tribrick.drain import Drain, Report, spooled

        if not setting("SPOOL"):
            raise CommandError('TRIBRICK["SPOOL"] is not set: there is no spool')
        if not options["watch"]:
            report = Drain(progress=self._progress()).run()
            left = spooled()
            self._answer(options, {**report.as_dict(), "left": left}, [*_told(report), f"{left} are left"])
            if report.away:
                raise CommandError(f"away: {', '.join(report.away)}", returncode=2)
            if left or report.waiting:
                raise CommandError(f"{left or len(report.waiting)} files could not be drained", returncode=1)
            return
        stop = _stop_on_signals()
        before = Report()
        while not stop.is_set():
            try:
                close_old_connections()
                report = Drain(stop=stop.is_set).run()
            except (StorageError, DatabaseError) as error:
                log.warning("the spools cannot be drained now: %s", " ".join(str(error).split()))
                connections[catalog.database()].close()
            else:
                if report.drained or report.removed or report.quarantined or report.as_dict() != before.as_dict():
                    self._say(json.dumps(report.as_dict()) if options["json"] else "\n".join(_told(report)))
                before = report
            stop.wait(options["interval"])

    # Without GlusterFS.

    def _fallback(self, options: dict[str, Any]) -> None:
        from tribrick import fallback

        tree, alias = options["tree"], options["storage"]
        if not tree.startswith("/"):
            raise CommandError(f"--tree {tree}: give an absolute path")
        given: dict[str, Any] = {
            "alias": alias, "after": options["after"], "apply": options["apply"], "progress": self._told_now_and_then(),
        }  # fmt: skip
        if options["what"] == "complete":
            directories = dict(_named(one) for one in options["sources"])
            where = fallback.sources(alias, directories=directories, volume=options["volume"])
            if options["foreign"] and options["foreign"] not in directories:
                raise CommandError(f"--foreign {options['foreign']}: there is no --from of this name")
            foreign = next((one for one in where if one.name == options["foreign"]), None)
            reserve = options["reserve"] << 20
            completed = fallback.Complete(tree, where, foreign=foreign, reserve=reserve, **given).run()
            self._answer(options, {"applied": options["apply"], **vars(completed)}, _told_complete(completed))
            if completed.missing:
                raise CommandError(f"{len(completed.missing)} files could not be had", returncode=1)
            return
        if not options["volume"]:
            raise CommandError(f"{options['what']} needs --volume")
        if options["what"] == "status":
            found = fallback.status(tree, options["volume"], alias)
            self._answer(options, vars(found), [f"{key}: {value}" for key, value in vars(found).items()])
            return
        merged = fallback.Merge(tree, options["volume"], **given).run()
        self._answer(options, {"applied": options["apply"], **vars(merged)}, _told_merge(merged))
        if merged.failed:
            raise CommandError(f"{len(merged.failed)} files are not on the volume", returncode=1)

    def _told_now_and_then(self) -> audit.Progress:
        """Return a progress line on a terminal; elsewhere a line in the journal every ten seconds."""
        if sys.stderr.isatty():
            return self._progress()
        told = [time.monotonic()]

        def show(what: str, done: int, total: int) -> None:
            if time.monotonic() - told[0] >= _EVERY:
                told[0] = time.monotonic()
                syslog.syslog(syslog.LOG_INFO, f"{done} of {total} {what}")

        syslog.openlog("tribrick-fallback")
        return show

    def _backfill(self, options: dict[str, Any]) -> None:
        count = audit.backfill(options["host"], options["storage"], self._progress())
        self._answer(options, {"queued": count}, [f"{count} files put into the outbox for {options['host']}"])


def _delete_again(marker: Path | None) -> tuple[int, int]:
    """Remove the bytes of all deleted files once more. What fails for another reason waits for the next start."""
    removed, failed = catalog.finish_deletes(again=True)
    if failed == 0 and marker is not None:
        marker.touch()
    return removed, failed


def _told(report: Any) -> list[str]:
    """Return a pass of the drain as lines."""
    text = [f"corrupt: {name}: {where}" for name, where in report.corrupt.items()]
    text += [f"away: {name}: {why}" for name, why in report.away.items()]
    text += [f"waits: {name}: {why}" for name, why in report.waiting.items()]
    text += [f"without a row, moved to {QUARANTINE}: {name}" for name in report.quarantined]
    text.append(f"{len(report.drained)} drained, {len(report.removed)} removed, {report.young} too young to tell")
    return text


def _named(text: str) -> tuple[str, str]:
    """Return the two halves of ``NAME=DIRECTORY``."""
    name, equals, path = text.partition("=")
    if not (name and equals and path.startswith("/")):
        raise CommandError(f"--from {text}: give NAME=DIRECTORY, the directory as an absolute path")
    return name, path


def _told_complete(done: Any) -> list[str]:
    text = [f"missing: {name}: {why}" for name, why in done.missing.items()]
    text += [f"away: {name}: {why}" for name, why in done.away.items()]
    came = ", ".join(f"{count} from {name}" for name, count in done.copied.items()) or "none came"
    text.append(
        f"{done.right} were right, {came}, {done.foreign} unknown to the catalog, {len(done.removed)} deleted ones "
        f"removed, {len(done.missing)} missing; up to change {done.number}"
    )
    return text


def _told_merge(done: Any) -> list[str]:
    text = [f"failed: {name}: {why}" for name, why in done.failed.items()]
    text += [f"unknown to the catalog, left in the tree: {name}" for name in done.foreign]
    text.append(
        f"{done.right} were right, {done.count} written, {done.removed} deleted ones removed once more, "
        f"{len(done.failed)} failed; up to change {done.number}"
    )
    return text


def _stop_on_signals() -> threading.Event:
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: stop.set())
    return stop


def _natural(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError("must not be negative")
    return number


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number

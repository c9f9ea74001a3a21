"""Builds the lab's images from a Debian mirror: none is pulled from a registry.

debootstrap -> tribrick-lab/debootstrap -> tribrick-lab/base ("bare") -> tribrick-lab/ready.
Each tag carries a hash of everything that goes in, so a second run builds nothing.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from kit.engine import apt_install, os_release
from kit.run import Console, KitError, capture, stream

CONTEXTS = Path(__file__).resolve().parents[3] / "lab"
CODENAMES = {"12": "bookworm", "13": "trixie"}
KINDS = ("bare", "ready")
REPOSITORY = {"bare": "tribrick-lab/base", "ready": "tribrick-lab/ready"}
# Raise this when the way of building changes and the files under lab/ do not show it.
BUILD_VERSION = "1"
BUILD_WAIT = 1200.0
CA_BUNDLE = Path("/etc/ssl/certs/ca-certificates.crt")
DEBIAN_KEYRING = "debian-archive-keyring"


@dataclass(frozen=True)
class Source:
    """One Debian archive for the lab's hosts."""

    uri: str
    suites: tuple[str, ...]
    components: tuple[str, ...] = ("main",)
    trusted: bool = False
    keyring: Path | None = None  # a key ring other than Debian's own

    def deb822(self) -> str:
        """Return the entry for /etc/apt/sources.list.d inside a container."""
        lines = [
            "Types: deb",
            f"URIs: {self.uri}",
            f"Suites: {' '.join(self.suites)}",
            f"Components: {' '.join(self.components)}",
        ]
        if self.trusted:
            lines.append("Trusted: yes")
        if self.keyring is not None:
            lines.append(f"Signed-By: /etc/apt/keyrings/{self.keyring.name}")
        return "\n".join(lines) + "\n"


def parse_deb822(text: str) -> list[dict[str, str]]:
    """Return the stanzas of a .sources file with lower-case field names."""
    stanzas: list[dict[str, str]] = []
    for block in re.split(r"\n[ \t]*\n", text):
        fields: dict[str, str] = {}
        key = ""
        for line in block.splitlines():
            if line.startswith("#"):
                continue
            if line[:1] in {" ", "\t"} and key:
                fields[key] += "\n" + line.strip()
            elif ":" in line:
                key, _, value = line.partition(":")
                key = key.strip().lower()
                fields[key] = value.strip()
        if fields:
            stanzas.append(fields)
    return stanzas


def parse_one_line(text: str) -> list[dict[str, str]]:
    """Return the entries of a sources.list in the form of parse_deb822."""
    entries = []
    for line in text.splitlines():
        match = re.fullmatch(r"\s*(deb)\s+(?:\[([^\]]*)\]\s+)?(\S+)\s+(\S+)((?:\s+\S+)*)\s*", line.partition("#")[0])
        if match:
            options: dict[str, str] = {}
            for item in (match[2] or "").split():
                key, _, value = item.partition("=")
                options[key.lower()] = value
            entries.append(
                {
                    **options,
                    "types": match[1],
                    "uris": match[3],
                    "suites": match[4],
                    "components": match[5].strip(),
                }
            )
    return entries


def _for_release(suite: str, host: str, target: str) -> str | None:
    """Translate a suite of this machine's release; None for what is not Debian's main archive."""
    for name in (host, "stable"):
        if suite == name:
            return target
        for suffix in ("-updates", "-security"):
            if suite == name + suffix:
                return target + suffix
    return None


def sources_of(entries: Iterable[Mapping[str, str]], host: str, target: str) -> list[Source]:
    """Choose the Debian archives among apt entries, moved from one release to another."""
    found: list[Source] = []
    for entry in entries:
        if "deb" not in entry.get("types", "").split():
            continue
        if entry.get("enabled", "yes").lower() in {"no", "false", "0"}:
            continue
        suites = tuple(
            moved
            for suite in entry.get("suites", "").split()
            if (moved := _for_release(suite.rstrip("/"), host, target)) is not None
        )
        if not suites or "main" not in entry.get("components", "").split():
            continue
        signed = entry.get("signed-by", "")
        keyring = Path(signed) if signed.startswith("/") and DEBIAN_KEYRING not in signed else None
        if keyring is not None and not keyring.is_file():
            keyring = None
        for uri in entry.get("uris", "").split():
            if uri.startswith(("http://", "https://")):
                source = Source(
                    uri.rstrip("/"),
                    suites,
                    trusted=entry.get("trusted", "no").lower() in {"yes", "true", "1"},
                    keyring=keyring,
                )
                if source not in found:
                    found.append(source)
    return found


def machine_sources(release: str, apt: Path = Path("/etc/apt")) -> list[Source]:
    """Return where the lab's hosts get Debian from: this machine's own mirrors where it has some."""
    target = CODENAMES[release]
    mirror = os.environ.get("TRIBRICK_DEBIAN_MIRROR", "").rstrip("/")
    security = os.environ.get("TRIBRICK_DEBIAN_SECURITY_MIRROR", "").rstrip("/")
    if not mirror:
        here = os_release()
        if here.get("ID") == "debian" and here.get("VERSION_CODENAME"):
            entries = []
            for file in [apt / "sources.list", *sorted((apt / "sources.list.d").glob("*"))]:
                if file.is_file() and file.suffix in {".list", ".sources"}:
                    text = file.read_text(encoding="utf-8", errors="replace")
                    parse = parse_deb822 if file.suffix == ".sources" else parse_one_line
                    entries += parse(text)
            found = sources_of(entries, here["VERSION_CODENAME"], target)
            if any(target in source.suites for source in found):
                return found
        raise KitError(
            "this machine's apt names no Debian mirror; set TRIBRICK_DEBIAN_MIRROR (and "
            "TRIBRICK_DEBIAN_SECURITY_MIRROR) to the addresses of one and run again"
        )
    chosen = [Source(mirror, (target, f"{target}-updates"))]
    if security:
        chosen.append(Source(security, (f"{target}-security",)))
    return chosen


def machine_apt_settings() -> str:
    """Return this machine's apt settings that matter inside a container: proxy and leniency."""
    if shutil.which("apt-config") is None:
        return ""
    dump = capture(["apt-config", "dump"], deadline=30).stdout
    kept = []
    for line in dump.splitlines():
        match = re.fullmatch(r'(Acquire::(?:https?::[\w:.-]+|Check-Valid-Until|Check-Date)) "(.*)";', line)
        if match and match[2] and "Proxy-Auto-Detect" not in match[1]:
            kept.append(line)
    return "".join(line + "\n" for line in kept)


def _proxy_environment(settings: str) -> dict[str, str]:
    """Return the environment that makes debootstrap use apt's proxy."""
    found = dict(re.findall(r'Acquire::(https?)::Proxy "([^"]+)";', settings))
    return {f"{scheme}_proxy": url for scheme, url in found.items() if url != "DIRECT"}


def _reachable_in_container(settings: str) -> str:
    """Drop a proxy on this machine's loopback: a container would look for it in itself."""
    local = {"localhost", "127.0.0.1", "::1"}
    return "".join(
        line + "\n"
        for line in settings.splitlines()
        if not ((m := re.search(r'Proxy "([^"]+)"', line)) and urlsplit(m[1]).hostname in local)
    )


def _tree(directory: Path) -> list[tuple[str, bytes]]:
    return [
        (f"{file.relative_to(directory)}:{file.stat().st_mode & 0o111:o}", file.read_bytes())
        for file in sorted(directory.rglob("*"))
        if file.is_file()
    ]


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Plan:
    """The three images of one Debian release, as this machine would build them now."""

    release: str
    sources: tuple[Source, ...]
    settings: str

    @classmethod
    def of(cls, release: str) -> Plan:
        """Plan for Debian 12 or 13 from this machine's apt configuration."""
        return cls(release, tuple(machine_sources(release)), machine_apt_settings())

    @property
    def packages(self) -> list[str]:
        """The packages of the ready image."""
        return (CONTEXTS / "ready" / "packages").read_text(encoding="utf-8").split()

    @property
    def root_tag(self) -> str:
        """The image that debootstrap makes."""
        key = _digest(BUILD_VERSION, CODENAMES[self.release], _architecture())
        return f"tribrick-lab/debootstrap:{self.release}-{key}"

    def tag(self, kind: str) -> str:
        """The full tag of the bare or the ready image."""
        base = _digest(self.root_tag, self.sources, self.settings, _tree(CONTEXTS / "base"))
        key = base if kind == "bare" else _digest(base, _tree(CONTEXTS / "ready"))
        return f"{REPOSITORY[kind]}:{self.release}-{key}"

    def alias(self, kind: str) -> str:
        """The tag that playbooks/lab_create.yml takes when it is given none."""
        return f"{REPOSITORY[kind]}:{self.release}"


def _architecture() -> str:
    return {"x86_64": "amd64", "aarch64": "arm64"}.get(os.uname().machine, os.uname().machine)


def exists(tag: str) -> bool:
    """Tell whether an image is there."""
    return capture(["docker", "image", "inspect", tag], deadline=60, check=False).returncode == 0


def ensure(console: Console, release: str, kind: str) -> str:
    """Build what is missing and return the tag of the image."""
    plan = Plan.of(release)
    tag = plan.tag(kind)
    if not exists(tag):
        if kind == "ready":
            ensure(console, release, "bare")
            _build_ready(console, plan)
        else:
            if not exists(plan.root_tag):
                _debootstrap(console, plan)
            _build_base(console, plan)
    capture(["docker", "tag", tag, plan.alias(kind)], deadline=60)
    return tag


def _debootstrap(console: Console, plan: Plan) -> None:
    codename = CODENAMES[plan.release]
    if os.geteuid() != 0:
        raise KitError("Making the lab's images needs root (debootstrap): run this as root.")
    if shutil.which("debootstrap") is None:
        apt_install(console, ["debootstrap", DEBIAN_KEYRING], "debootstrap makes the lab's images")
    source = next(source for source in plan.sources if codename in source.suites)
    options = ["--variant=minbase", f"--arch={_architecture()}"]
    keyring = source.keyring or Path(f"/usr/share/keyrings/{DEBIAN_KEYRING}.gpg")
    if source.trusted:
        options.append("--no-check-gpg")
    elif keyring.exists():
        options.append(f"--keyring={keyring}")
    script = Path("/usr/share/debootstrap/scripts") / codename
    arguments = [] if script.exists() else [str(script.with_name("sid"))]

    def show(line: str) -> str | None:
        steps = (
            "I: Retrieving InRelease",
            "I: Extracting packages",
            "I: Unpacking the base system",
            "I: Configuring the base system",
            "I: Base system installed",
            "E: ",
            "W: ",
        )
        return f"debootstrap: {line[3:]}" if line.startswith(steps) else None

    console.say(f"making a Debian {plan.release} root with debootstrap")
    with tempfile.TemporaryDirectory(prefix="tribrick-root-", dir=_roomy()) as name:
        root = Path(name) / "root"
        stream(
            console,
            ["debootstrap", *options, codename, str(root), source.uri, *arguments],
            what=f"debootstrap {codename}",
            deadline=BUILD_WAIT,
            show=show,
            env={"LC_ALL": "C.UTF-8", **_proxy_environment(plan.settings)},
        )
        for archive in (root / "var/cache/apt/archives").glob("*.deb"):
            archive.unlink()
        console.say("importing it as an image")
        with subprocess.Popen(
            ["tar", "--numeric-owner", "--xattrs", "--one-file-system", "-C", str(root), "-c", "."],
            stdout=subprocess.PIPE,
        ) as pack:
            stream(
                console,
                ["docker", "import", "-", plan.root_tag],
                what="docker import",
                deadline=300,
                show=_hide,
                stdin=pack.stdout,
            )
        if pack.returncode != 0:
            capture(["docker", "image", "rm", plan.root_tag], deadline=60, check=False)
            raise KitError(f"tar could not pack the Debian root (exit code {pack.returncode}).")


def _roomy() -> str:
    """A directory on a disk: /tmp may be memory, or mounted without devices."""
    return "/var/tmp"  # noqa: S108 - TemporaryDirectory makes its own safe name inside


def _hide(_line: str) -> None:
    return None


def _build_base(console: Console, plan: Plan) -> None:
    with tempfile.TemporaryDirectory(prefix="tribrick-image-") as name:
        context = Path(name)
        shutil.copytree(CONTEXTS / "base", context, dirs_exist_ok=True)
        apt = context / "apt"
        (apt / "sources.list.d").mkdir(parents=True)
        (apt / "keyrings").mkdir()
        (apt / "apt.conf.d").mkdir()
        sources = "\n".join(source.deb822() for source in plan.sources)
        (apt / "sources.list.d" / "debian.sources").write_text(sources, encoding="utf-8")
        for source in plan.sources:
            if source.keyring is not None:
                shutil.copy(source.keyring, apt / "keyrings" / source.keyring.name)
        settings = _reachable_in_container(plan.settings)
        if any(source.uri.startswith("https:") for source in plan.sources) and CA_BUNDLE.exists():
            # The fresh root has no CA certificates yet, and the mirror's may be a house CA.
            shutil.copy(CA_BUNDLE, apt / "keyrings" / "lab-ca.crt")
            settings += 'Acquire::https::CAInfo "/etc/apt/keyrings/lab-ca.crt";\n'
        (apt / "apt.conf.d" / "80lab").write_text(settings, encoding="utf-8")
        _docker_build(console, plan, "bare", context, plan.root_tag, {})


def _build_ready(console: Console, plan: Plan) -> None:
    arguments = {"PACKAGES": " ".join(plan.packages)}
    _docker_build(console, plan, "ready", CONTEXTS / "ready", plan.tag("bare"), arguments)


def _docker_build(
    console: Console,
    plan: Plan,
    kind: str,
    context: Path,
    parent: str,
    arguments: Mapping[str, str],
) -> None:
    tag = plan.tag(kind)
    console.say(f"building the image {tag}")

    def show(line: str) -> str | None:
        if re.match(r"(Step \d|#\d+ \[)", line):
            return f"image {kind}: {line[:100]}"
        return line if line.startswith(("E: ", "Err:", "ERROR")) else None

    values = {"FROM": parent, **arguments}
    options = [word for key, value in values.items() for word in ("--build-arg", f"{key}={value}")]
    stream(
        console,
        ["docker", "build", "--network=host", "--label=tribrick.image=lab", *options, f"--tag={tag}", str(context)],
        what=f"building {tag}",
        deadline=BUILD_WAIT,
        show=show,
    )

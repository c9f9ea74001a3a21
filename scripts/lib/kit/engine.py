"""The machine under the lab: Debian packages and a running Docker engine."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from kit.run import Console, KitError, capture, stream, wait_for

ENGINE_WAIT = 90.0


def os_release(path: Path = Path("/etc/os-release")) -> dict[str, str]:
    """Return /etc/os-release as a mapping; empty where there is none."""
    if not path.exists():
        return {}
    pairs = (line.partition("=") for line in path.read_text(encoding="utf-8").splitlines())
    return {key.strip(): value.strip().strip("\"'") for key, mark, value in pairs if mark}


def is_debian_family() -> bool:
    """Tell whether apt-get can install Debian's or Ubuntu's packages here."""
    release = os_release()
    names = {release.get("ID", ""), *release.get("ID_LIKE", "").split()}
    return bool(names & {"debian", "ubuntu"}) and shutil.which("apt-get") is not None


def apt_install(console: Console, packages: list[str], why: str, where_known: tuple[str, ...] = ()) -> None:
    """Install missing Debian packages, or say in one sentence why that cannot be.

    `where_known` names packages that only some releases have.
    """
    if not is_debian_family():
        raise KitError(
            f"{why}: install {' and '.join(packages)}; this machine is neither Debian nor Ubuntu, "
            "so it is not done for you."
        )
    if os.geteuid() != 0:
        raise KitError(f"{why}: run this as root, or first apt-get install {' '.join(packages)}.")
    console.say(f"installing {' '.join(packages)} ({why})")
    env = {"DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C.UTF-8"}

    def hide(_line: str) -> None:
        return None

    stream(console, ["apt-get", "-q", "update"], what="apt-get update", deadline=300, show=hide, env=env)
    packages = packages + [package for package in where_known if _known(package)]
    stream(
        console,
        ["apt-get", "-q", "install", "-y", "--no-install-recommends", *packages],
        what=f"apt-get install {' '.join(packages)}",
        deadline=600,
        show=hide,
        env=env,
    )


def _known(package: str) -> bool:
    """Tell whether this release has a package of that name, once the lists are there."""
    done = capture(["apt-cache", "show", "--no-all-versions", package], deadline=60, check=False)
    return done.returncode == 0 and bool(done.stdout.strip())


def _answer() -> str | None:
    """Ask the engine; None when it answers, else what stands in the way."""
    if shutil.which("docker") is None:
        return "the program docker is missing"
    done = capture(["docker", "info", "--format", "{{.ServerVersion}}"], deadline=30, check=False)
    if done.returncode == 0 and done.stdout.strip():
        return None
    said = done.stderr.strip().splitlines()
    return said[-1] if said else "docker info printed nothing"


def ensure_engine(console: Console, state: Path) -> None:
    """Make sure that a Docker engine answers; install and start the distribution's if need be."""
    seen = _answer()
    if seen is None:
        _check_fuse()
        return
    if os.environ.get("DOCKER_HOST"):
        raise KitError(f"DOCKER_HOST is set, but no Docker engine answers there: {seen}")
    if not is_debian_family() or os.geteuid() != 0:
        raise KitError(
            f"No Docker engine answers ({seen}); start one, or run this as root on Debian or "
            "Ubuntu, where it is installed and started for you."
        )
    if shutil.which("dockerd") is None or shutil.which("docker") is None:
        # Debian 13 has the client in a package of its own. Without iptables there are no bridges.
        apt_install(console, ["docker.io", "iptables"], "a Docker engine is needed", where_known=("docker-cli",))
    if _answer() is not None:
        _start(console, state)
    wait_for(console, "the Docker engine to answer", _answer, deadline=ENGINE_WAIT)
    console.say("Docker engine started")
    _check_fuse()


def ensure_ssh(console: Console) -> None:
    """Make sure that there is an SSH client: Ansible and this kit reach every host by it."""
    if shutil.which("ssh") is None:
        apt_install(console, ["openssh-client"], "hosts are reached by SSH")


def _start(console: Console, state: Path) -> None:
    if Path("/run/systemd/system").is_dir():
        console.say("starting docker.service")
        capture(["systemctl", "start", "docker.service"], deadline=ENGINE_WAIT)
        return
    log = state / "dockerd.log"
    console.say(f"starting dockerd in the background (log: {log})")
    state.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        subprocess.Popen(
            ["dockerd"],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            cwd="/",
        )


def _check_fuse() -> None:
    if not Path("/dev/fuse").exists() and not os.environ.get("DOCKER_HOST"):
        done = capture(["modprobe", "fuse"], deadline=30, check=False)
        if done.returncode != 0 or not Path("/dev/fuse").exists():
            raise KitError("This kernel offers no /dev/fuse, which a GlusterFS mount needs: modprobe fuse.")

#!/usr/bin/env python3
"""Carry out docker/Dockerfile.cpu without a Docker engine: its base from debootstrap, its lines in a chroot.

    apt-get install debootstrap
    sudo docker/rehearse.py [--keep] [--folder DIR] [-- ARGUMENTS OF POSTTRAIN]

Reads the Dockerfile itself, so that what is checked is what `docker build` would do: COPY, RUN, ENV, USER, WORKDIR,
ENTRYPOINT and CMD. Then runs the image's entry point as its user, with a few commands or the given ones. Where apt and
pip of this machine are set up to use other registries or folders than the public ones, the root uses them too.

Not covered: that the base image of the same name is what debootstrap makes, layers and their cache, .dockerignore
beyond caches of Python, volumes and networks.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import IO

REPOSITORY = Path(__file__).resolve().parents[1]
DOCKERFILE = REPOSITORY / "docker" / "Dockerfile.cpu"
COMMANDS = (["--version"], ["recipes"], ["check", "dph_rl/countdown3"])
"""What a finished root is asked for, unless the command line says something else."""

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_NO_EFFECT = ("LABEL", "VOLUME", "STOPSIGNAL")


@dataclass
class Image:
    """What the lines of a Dockerfile have made so far."""

    root: Path
    environment: dict[str, str] = field(
        default_factory=lambda: {"PATH": "/usr/local/bin:/usr/bin:/usr/sbin:/bin:/sbin"}
    )
    user: str = "root"
    workdir: str = "/"
    entrypoint: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)

    def run(
        self, arguments: Sequence[str], extra: dict[str, str] | None = None, output: IO[bytes] | None = None
    ) -> None:
        """Run a command inside, as the user and in the folder that were set.

        Raises:
            subprocess.CalledProcessError: it failed.
        """
        script = f"cd {shlex.quote(self.workdir)} && exec {shlex.join(arguments)}"
        environment = {**(extra or {}), **self.environment}
        # `env -i`: a container knows nothing of the environment of this machine.
        settings = [f"{name}={value}" for name, value in environment.items()]
        chroot = ["chroot", *([] if self.user == "root" else [f"--userspec={self.user}"]), str(self.root)]
        subprocess.run(  # noqa: S603
            [*chroot, "/usr/bin/env", "-i", *settings, "/bin/sh", "-c", script],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=None if output is None else subprocess.STDOUT,
            check=True,
        )


def instructions(text: str) -> Iterator[tuple[str, str]]:
    """(instruction, arguments) for every line of a Dockerfile, continuation lines joined, comments dropped."""
    plain = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    for line in re.sub(r"\\\n\s*", "", plain).splitlines():
        if line.strip():
            name, _, rest = line.strip().partition(" ")
            yield name.upper(), rest.strip()


def carry_out(image: Image, name: str, rest: str, registry: dict[str, str], output: IO[bytes]) -> None:
    """Do what one instruction says.

    Raises:
        SystemExit: it is one that is not known here.
    """
    if name == "RUN":
        image.run(["/bin/sh", "-c", rest], registry, output)
    elif name == "COPY":
        *sources, target = shlex.split(rest)
        for source in sources:
            _copy(REPOSITORY / source, image.root / target.lstrip("/"), into=target.endswith("/"))
    elif name == "ENV":
        for assignment in shlex.split(rest):
            key, _, value = assignment.partition("=")
            image.environment[key] = value
    elif name == "USER":
        image.user = rest
    elif name == "WORKDIR":
        image.workdir = rest
        (image.root / rest.lstrip("/")).mkdir(parents=True, exist_ok=True)
    elif name == "ENTRYPOINT":
        image.entrypoint = json.loads(rest)
    elif name == "CMD":
        image.command = json.loads(rest)
    elif name not in _NO_EFFECT:
        sys.exit(f"rehearse: the instruction {name} is not known here: teach docker/rehearse.py what it does.")


def _copy(source: Path, target: Path, *, into: bool) -> None:
    if source.is_dir():
        ignored = shutil.ignore_patterns("__pycache__", "*.pyc", "*.egg-info")  # as .dockerignore says
        shutil.copytree(source, target, symlinks=True, dirs_exist_ok=True, ignore=ignored)
    else:
        (target if into else target.parent).mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target)


def make_base(root: Path, base: str, output: IO[bytes]) -> None:
    """A minimal Debian of the release that FROM names.

    Raises:
        SystemExit: FROM names something else.
    """
    found = re.fullmatch(r"debian:(\w+)-slim", base)
    if found is None:
        sys.exit(f"rehearse: the base {base} is none that debootstrap can make: only debian:RELEASE-slim is.")
    listed = subprocess.run(  # noqa: S603
        ["apt-get", "indextargets", "--format", "$(REPO_URI)", f"Codename: {found[1]}"],  # noqa: S607
        capture_output=True,
        text=True,
        check=False,
    ).stdout.split()
    mirror = listed[:1]  # debootstrap's default where this machine's apt knows none
    subprocess.run(  # noqa: S603
        ["debootstrap", "--variant=minbase", found[1], str(root), *mirror],  # noqa: S607
        stdout=output,
        stderr=subprocess.STDOUT,
        check=True,
    )


def registry_settings(root: Path) -> tuple[dict[str, str], list[Path]]:
    """pip's settings on this machine as variables, and the folders that they name, to be seen inside too.

    Files (certificates) are copied: a package inside may replace the file of the same name.
    """
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=False
    ).stdout
    settings, folders = {}, set()
    for key, value in re.findall(r"^[\w:]+\.([\w-]+)='(.*)'$", listed, re.MULTILINE):
        words = value.replace("\\n", " ").split()
        for index, word in enumerate(words):
            path = Path(word.removeprefix("file://"))
            if path.is_absolute() and path.is_dir():
                folders.add(path.parent if path.name == "simple" else path)  # an index, with its files beside it
            elif path.is_absolute() and path.is_file():
                words[index] = f"/run/rehearse/{path.name}"
                (root / "run/rehearse").mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, root / words[index].lstrip("/"))
        settings["PIP_" + key.upper().replace("-", "_")] = " ".join(words)
    return settings, sorted(folders)


def mount(root: Path, folders: Sequence[Path]) -> Iterator[Path]:
    """Bind what a container would have, and `folders` read-only; yields every target as soon as it is mounted."""
    for source in (Path("/proc"), Path("/dev"), Path("/dev/shm"), Path("/dev/pts"), *folders):  # noqa: S108
        target = root / str(source).lstrip("/")
        target.mkdir(parents=True, exist_ok=True)
        subprocess.run(["mount", "--bind", str(source), str(target)], check=True)  # noqa: S603, S607
        yield target
        if source in folders:
            subprocess.run(["mount", "-o", "remount,ro,bind", str(target)], check=True)  # noqa: S603, S607


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--keep", action="store_true", help="leave the root behind")
    parser.add_argument("--folder", type=Path, help="where the root and the log are made (default: a temporary one)")
    parser.add_argument("arguments", nargs="*", help="of posttrain, in place of the usual commands")
    options = parser.parse_args()
    if os.geteuid() != 0 or shutil.which("debootstrap") is None:
        sys.exit("rehearse: this needs root (for chroot) and debootstrap: apt-get install debootstrap.")

    folder = Path(tempfile.mkdtemp(prefix="posttrain-rehearse-", dir=options.folder))
    image, log, mounted = Image(folder / "root"), folder / "log", list[Path]()
    registry: dict[str, str] = {}
    started, failed = monotonic(), False

    def say(text: str) -> None:
        print(f"rehearse: {monotonic() - started:4.0f} s  {text[:110]}", flush=True)

    try:
        with log.open("wb") as output:
            for name, rest in instructions(DOCKERFILE.read_text(encoding="utf-8")):
                say(f"{name} {rest}")
                if name == "FROM":
                    make_base(image.root, rest, output)
                    for path in ("/etc/resolv.conf", "/etc/hosts"):
                        shutil.copyfile(path, image.root / path[1:])
                    registry, folders = registry_settings(image.root)
                    for target in mount(image.root, folders):
                        mounted.append(target)
                else:
                    carry_out(image, name, rest, registry, output)
        for arguments in [options.arguments] if options.arguments else [image.command, *COMMANDS]:
            say(shlex.join([*image.entrypoint, *arguments]))
            image.run([*image.entrypoint, *arguments])
        say("done")
    except subprocess.CalledProcessError as error:
        failed = True
        tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-30:]
        sys.exit("\n".join([*tail, f"rehearse: the last line failed with exit code {error.returncode}; log: {log}"]))
    finally:
        for target in reversed(mounted):
            subprocess.run(["umount", "--lazy", str(target)], check=False)  # noqa: S603, S607
        if options.keep:
            print(f"rehearse: the root is {image.root}")
        elif not any(os.path.ismount(target) for target in mounted):  # never delete through a mount
            shutil.rmtree(image.root if failed else folder, ignore_errors=True)


if __name__ == "__main__":
    main()

"""The steps of a Dockerfile, in chroots: each stage is a tree of files."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from cluster.image.rehearsal.container import Container, Image
from cluster.image.rehearsal.dockerfile import (
    Dockerfile,
    Instruction,
    Stage,
    expand,
    ignored,
    pairs,
    words,
)

__all__ = ["Builder", "Failed"]

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class Failed(Exception):
    """A step ended with an error."""


@dataclass
class Builder:
    """Builds the last stage of a Dockerfile under ``work``.

    Args:
        context: the folder that COPY takes from.
        work: a folder for the trees, some GB.
        mirror: of Debian, for the tree of the base image.
        arguments: build arguments.
        environment: more variables of RUN, as the proxy and pip settings of this machine.
        binds: paths of this machine that RUN sees.
    """

    dockerfile: Dockerfile
    context: Path
    ignore: list[str]
    work: Path
    mirror: str
    arguments: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    binds: Sequence[str] = ()
    _built: dict[str, Image] = field(default_factory=dict)

    def build(self) -> Image:
        """Run every stage that is needed, and give the last one."""
        known = self.dockerfile.globals(self.arguments)
        stages = self.dockerfile.needed(self.arguments)
        for stage in stages:
            self._built[stage.name] = self._stage(stage, known)
        return self._built[stages[-1].name]

    def _stage(self, stage: Stage, known: Mapping[str, str]) -> Image:
        base = expand(stage.base, known)
        tree = self.work / f"stage-{stage.name}"
        if tree.exists():
            shutil.rmtree(tree)
        print(f"FROM {base} AS {stage.name}", flush=True)
        if base in self._built:
            image = replace(self._built[base])
            # What a stage sets of these is not meant for those that build on it.
            image.environment = dict(image.environment)
        else:
            image = Image(self._debian(base), {"PATH": _PATH})
        subprocess.run(["cp", "-a", "--reflink=auto", str(image.tree), str(tree)], check=True)
        image.tree = tree
        arguments: dict[str, str] = {}
        for instruction in stage.instructions:
            began = time.monotonic()
            if instruction.keyword == "ARG":
                name, _, default = instruction.text.partition("=")
                arguments[name] = self.arguments.get(name, known.get(name, default))
            else:
                self._step(image, instruction, arguments)
            if (took := time.monotonic() - began) > 1:
                print(
                    f"  line {instruction.line}: {instruction.keyword} took {took:.0f} s",
                    flush=True,
                )
        return image

    def _step(self, image: Image, instruction: Instruction, arguments: Mapping[str, str]) -> None:
        variables = {**arguments, **image.environment}
        text = expand(instruction.text, variables)
        match instruction.keyword:
            case "RUN":
                self._run(image, instruction, arguments)
            case "COPY":
                self._copy(image, instruction, text)
            case "ENV":
                image.environment |= pairs(text)
            case "LABEL":
                image.labels = image.labels | pairs(text)
            case "USER":
                image.user = text
            case "WORKDIR":
                image.folder = os.path.normpath(os.path.join(image.folder, text))
                (image.tree / image.folder.lstrip("/")).mkdir(parents=True, exist_ok=True)
            case "ENTRYPOINT":
                image.entrypoint = instruction.command()
            case "CMD":
                image.command = instruction.command()
            case "HEALTHCHECK":
                after = instruction.text.removeprefix("CMD ").strip()
                image.health = replace(instruction, text=after).command()
            case other:
                raise Failed(f"line {instruction.line}: {other} is not rehearsed")

    def _run(self, image: Image, instruction: Instruction, arguments: Mapping[str, str]) -> None:
        variables = {**arguments, **self.environment}
        container = Container(image, hardened=False, environment=variables, binds=self.binds)
        status = container.start(instruction.command(), stdin=subprocess.DEVNULL).wait()
        if status:
            raise Failed(f"line {instruction.line}: exit status {status} of RUN {instruction.text}")

    def _copy(self, image: Image, instruction: Instruction, text: str) -> None:
        *sources, target = words(text)
        origin = instruction.flags.get("from")
        root = self._built[origin].tree if origin else self.context
        inside = os.path.join(image.folder, target)
        place = image.tree / inside.lstrip("/")
        into = target.endswith("/") or len(sources) > 1
        for source in sources:
            found = root / source.lstrip("/")
            if not found.exists():
                raise Failed(f"line {instruction.line}: COPY of {source}, which is not there")
            if found.is_dir():
                copied = self._copy_folder(found, place, filtered=not origin)
            else:
                end = place / found.name if into or place.is_dir() else place
                end.parent.mkdir(parents=True, exist_ok=True)
                copied = not (not origin and ignored(Path(source), self.ignore))
                if copied:
                    _copy_file(found, end)
            if not copied:
                raise Failed(f"line {instruction.line}: .dockerignore leaves nothing of {source}")

    def _copy_folder(self, source: Path, place: Path, filtered: bool) -> bool:
        """Copy what is in a folder into another; whether there was anything."""
        copied = False
        for folder, folders, names in os.walk(source):
            here = Path(folder)
            for link in [name for name in folders if (here / name).is_symlink()]:
                folders.remove(link)
                names.append(link)
            end = place / here.relative_to(source)
            for name in names:
                if filtered and ignored((here / name).relative_to(self.context), self.ignore):
                    continue
                end.mkdir(parents=True, exist_ok=True)
                _copy_file(here / name, end / name)
                copied = True
        return copied

    def _debian(self, image: str) -> Path:
        """A tree as that of the image ``debian:<release>-...``, made once."""
        name, _, tag = image.partition("@")[0].partition(":")
        release = tag.partition("-")[0]
        if not name.endswith("debian") or not release.isalpha():
            raise Failed(f"the base {image!r} must be debian:RELEASE-..., to be rehearsed")
        tree = self.work / f"debian-{release}"
        if not (tree / "etc/debian_version").exists():
            command = ["debootstrap", "--variant=minbase", release, str(tree), self.mirror]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return tree


def _copy_file(source: Path, place: Path) -> None:
    if place.is_symlink() or place.is_file():
        place.unlink()
    shutil.copy2(source, place, follow_symlinks=False)
    os.chown(place, 0, 0, follow_symlinks=False)

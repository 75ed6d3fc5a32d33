"""The files that a job needs, as one zip file under a name made of their content.

Left out is what Ray's own packaging leaves out (by ``.gitignore`` and ``.rayignore``), and hidden
files, caches, logs and the store of results. A line ``!name`` in ``.rayignore`` takes one all the
same.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import os
import stat
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pathspec

from sbi_dist.errors import InputError

__all__ = ["MAX_BYTES", "Package", "collect"]

# What a dashboard takes in one request is 100 MiB.
MAX_BYTES, MAX_FILES = 100_000_000, 20_000
# Compressed they may be less, but so many are not meant.
_MAX_UNPACKED = 10 * MAX_BYTES
_NEVER = [
    *(".*", "__pycache__/", "*.py[cod]", "*.egg-info/", "node_modules/", "venv/", "/runs/"),
    *("*.log", "nohup.out"),  # what submissions themselves write would make each a new one
]


@dataclasses.dataclass(frozen=True)
class Package:
    """Files by their paths in the job's working directory.

    Attributes:
        root: the folder that they are from.
        files: path in the working directory -> path here; in order.
    """

    root: Path
    files: dict[str, Path]

    def digest(self) -> str:
        """16 hex digits of the files' paths, contents and executable bits."""
        found = hashlib.sha256()
        for name, path in self.files.items():
            data = path.read_bytes()
            found.update(f"{name}\0{_mode(path):o}\0{len(data)}\0".encode() + data)
        return found.hexdigest()[:16]

    def zipped(self) -> bytes:
        """As a zip file; the same bytes for the same files.

        Raises:
            InputError: it is larger than a dashboard takes.
        """
        sink = io.BytesIO()
        with zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, path in self.files.items():
                about = zipfile.ZipInfo(name)  # of 1980
                about.compress_type = zipfile.ZIP_DEFLATED
                about.external_attr = (stat.S_IFREG | _mode(path)) << 16
                archive.writestr(about, path.read_bytes())
        if sink.tell() > MAX_BYTES:
            raise InputError(_too_large(self.root, self.files, sink.tell()))
        return sink.getvalue()

    def describe(self) -> str:
        size = sum(path.stat().st_size for path in self.files.values())
        many = f"{len(self.files):,} files" if len(self.files) > 1 else "1 file"
        return f"{many} ({size / 1e6:,.1f} MB) of {self.root}"


def collect(
    root: Path, needed: Sequence[str], exclude: Sequence[str], added: dict[str, Path]
) -> Package:
    """The files of a folder.

    Args:
        root: the folder.
        needed: paths in it that are taken whatever the patterns say.
        exclude: patterns as in a ``.gitignore`` of what to leave out, beside its own.
        added: files from elsewhere, by their paths in the job's working directory.

    Raises:
        InputError: they are too many or too large, or can't be read; names the largest.
    """
    patterns = [*_NEVER]
    for name in (".gitignore", ".rayignore"):
        if (root / name).is_file():
            patterns += (root / name).read_text(encoding="utf-8", errors="replace").splitlines()
    spec = pathspec.GitIgnoreSpec.from_lines([*patterns, *exclude])
    files: dict[str, Path] = {}
    total, written = 0, _written()
    for name in _walk(root, spec):
        about = (root / name).stat()
        if (about.st_dev, about.st_ino) in written:
            continue
        files[name] = root / name
        total += _size(root / name)
        if len(files) > MAX_FILES or total > _MAX_UNPACKED:
            raise InputError(_too_large(root, files, total))
    files.update({name: root / name for name in needed})
    files.update(added)
    return Package(root, dict(sorted(files.items())))


def _written() -> set[tuple[int, int]]:
    """The files that this process's own output goes to."""
    found = set()
    for stream in (1, 2):
        with contextlib.suppress(OSError):
            about = os.fstat(stream)
            found.add((about.st_dev, about.st_ino))
    return found


def _walk(root: Path, spec: pathspec.GitIgnoreSpec) -> Iterator[str]:
    for place, folders, names in os.walk(root):
        within = Path(place).relative_to(root)
        folders[:] = sorted(
            name for name in folders if not spec.match_file(f"{(within / name).as_posix()}/")
        )
        for name in sorted(names):
            path = (within / name).as_posix()
            # A link to a file is taken as that file; sockets and the like are left out.
            if not spec.match_file(path) and (root / path).is_file():
                yield path


def _size(path: Path) -> int:
    if not os.access(path, os.R_OK):
        raise InputError(
            f"{path} can't be read, so it can't be uploaded with the experiment; leave it out with "
            "--exclude PATTERN"
        )
    return path.stat().st_size


def _mode(path: Path) -> int:
    return 0o755 if path.stat().st_mode & stat.S_IXUSR else 0o644


def _too_large(root: Path, files: dict[str, Path], size: int) -> str:
    largest = sorted(files, key=lambda name: files[name].stat().st_size, reverse=True)[:3]
    named = ", ".join(f"{name} ({files[name].stat().st_size / 1e6:,.1f} MB)" for name in largest)
    return (
        f"the folder {root} of the experiment has {len(files):,} or more files of "
        f"{size / 1e6:,.0f} MB, and a cluster takes {MAX_FILES:,} and {MAX_BYTES / 1e6:.0f} MB; "
        f"the largest are {named}; leave out what the simulator does not read with --exclude "
        "PATTERN (as in a .gitignore), keep the experiment in a folder of its own, or put the data "
        "where the cluster reads them and give --no-upload"
    )

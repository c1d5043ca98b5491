"""A real chest CT to try things on: two scans with nodule labels out of pyradiomics 3.0.1's source distribution.

The package index is the one place that nearly every machine reaches, and pip knows its mirrors and proxies. Everything
is pinned by SHA-256, and no code of that distribution ever runs.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import subprocess
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from .files import UserError, atomic_path, check_writable, child_options, move_file, user_path
from .model import user_data_folder

SDIST = "pyradiomics-3.0.1"
SDIST_SHA256 = "47c57f441d6cb7973fa3b2ea48d3948df78e3348e1c69e1e2ff19001601fc2f5"
FILES = {
    "lung1": ("lung1_image.nrrd", "379fa48bf34cfa961e6f5ec19c0c38757a30b9aa884212ef28dc29b5061c64ed"),
    "lung1_label": ("lung1_label.nrrd", "e9d9a88054d7bc1d3034193ff907ce6b8c6ba28a7bc3a16f23728982d1b6b50a"),
    "lung2": ("lung2_image.nrrd", "aa2b94eec79127ed786798ac8dc3c013010e1692d5787bebfae1a1e9685a4651"),
    "lung2_label": ("lung2_label.nrrd", "cef52738dc51aab69a48fe30639da956d2b911b1c2920439c091fab84727657a"),
}

# pip asks a source distribution for its metadata by running its setup.py, which needs numpy and fails on Python 3.12
# and later. This stands in for setuptools in the process that pip asks, and answers instead.
_BACKEND = """
from pathlib import Path

class Backend:
    def get_requires_for_build_wheel(self, config_settings=None):
        return []

    def prepare_metadata_for_build_wheel(self, metadata_directory, config_settings=None):
        folder = Path(metadata_directory, "pyradiomics-3.0.1.dist-info")
        folder.mkdir()
        (folder / "METADATA").write_text("Metadata-Version: 2.1\\nName: pyradiomics\\nVersion: 3.0.1\\n")
        return folder.name

__legacy__ = Backend()
"""

# What pip starts has the stand-in first on its path. That is set in here, since PythonSlicer's launcher puts Slicer's own
# packages, and the true setuptools with them, before a PYTHONPATH that comes from outside.
_PIP = """
import os, runpy, sys
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (os.path.abspath("backend"), os.environ.get("PYTHONPATH"))))
runpy.run_module("pip", run_name="__main__", alter_sys=True)
"""


def sample_folder() -> Path:
    """Where the sample lies; $UNETSEG_SAMPLE overrides the user's data folder."""
    named = os.environ.get("UNETSEG_SAMPLE")
    return user_path(named) if named else user_data_folder() / "sample"


def fetch_sample(folder: str | Path | None = None, progress: Callable[[float, str], object] | None = None) -> dict[str, Path]:
    """The paths of "lung1", "lung1_label", "lung2" and "lung2_label" (.nrrd; int16 CT in HU and their nodule labels).

    Files with the right hash are used as they are, without network. Otherwise they come from the source distribution
    that $UNETSEG_SAMPLE_SDIST names, or that pip downloads (34 MB), and one that was changed keeps its content under another
    name. progress gets the fraction done and a sentence at each step. Raises UserError when that fails; never leaves half a
    file, also when two processes fetch at once.
    """
    say = progress or (lambda fraction, text: None)
    place = user_path(folder) if folder is not None else sample_folder()
    paths = {key: place / name for key, (name, _) in FILES.items()}
    missing = [key for key, path in paths.items() if _sha256(path) != FILES[key][1]]
    if not missing:
        return paths
    check_writable(paths[missing[0]])
    changed = any(paths[key].exists() for key in missing)
    named = os.environ.get("UNETSEG_SAMPLE_SDIST")
    # On Windows a virus scanner may hold what was downloaded beyond the end.
    with tempfile.TemporaryDirectory(prefix="unetseg-sample-", ignore_cleanup_errors=True) as temporary:
        if named:
            sdist = user_path(named)
            if _sha256(sdist) != SDIST_SHA256:
                raise UserError(f"UNETSEG_SAMPLE_SDIST names {sdist}, which is not the published {SDIST}.tar.gz; get it again.")
        else:
            say(0.0, "Downloading the sample scans (34 MB) ...")
            sdist = _download(Path(temporary), place)
        say(0.8, "Unpacking the sample scans ...")
        _unpack(sdist, {key: paths[key] for key in missing})
    say(1.0, f"The sample scans are in {place}{'; the changed ones are kept there as *-changed.nrrd' if changed else ''}.")
    return paths


def _sha256(path: Path) -> str:
    """The hash of a file; "" where it cannot be read."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return ""


def _download(temporary: Path, place: Path) -> Path:
    """The verified source distribution in `temporary`, fetched by pip."""
    setuptools = temporary / "backend" / "setuptools"
    setuptools.mkdir(parents=True)
    (setuptools / "__init__.py").touch()
    (setuptools / "build_meta.py").write_text(_BACKEND, "utf-8")
    (temporary / "requirements.txt").write_text(f"{SDIST.replace('-', '==')} --hash=sha256:{SDIST_SHA256}\n", "utf-8")
    # In that folder, and without its name, which PythonSlicer's launcher passes on in ASCII only (see files.py).
    command = [sys.executable, "-c", _PIP, "download", "-d", ".", "-r", "requirements.txt", "--require-hashes", "--no-deps"]
    command += ["--no-binary", ":all:"]
    command += ["--no-build-isolation", "--no-input", "--disable-pip-version-check", "--retries", "2", "--timeout", "20", "-q"]
    # PIP_USE_PEP517 and not the option: pip before 23 needs it, and a pip that has dropped it ignores a variable.
    try:
        done = subprocess.run(
            command,
            cwd=temporary,
            env={**os.environ, "PIP_USE_PEP517": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            **child_options(),
        )
        said = done.stdout
    except OSError as e:
        said = f"ERROR: {e}"
    sdist = temporary / f"{SDIST}.tar.gz"
    if _sha256(sdist) != SDIST_SHA256:
        raise UserError(
            f"The sample scans could not be downloaded ({_reason(said)}); get {SDIST}.tar.gz from the Python package index on "
            f"another machine and set UNETSEG_SAMPLE_SDIST to it, or put its data/lung*.nrrd files into {place}."
        )
    return sdist


def _reason(said: str) -> str:
    """Why pip failed, out of what it printed."""
    if "connection broken" in said:
        return "the package index cannot be reached"
    lines = [line.strip() for line in said.splitlines()]
    line = next((line for line in lines if line.lower().startswith("error") or "No module named" in line), "pip gave no reason")
    return line.removeprefix("ERROR: ").removeprefix("error: ").rstrip(".")[:200]


def _put_aside(path: Path, sha256: str) -> None:
    """Give a file that another fetch has not renewed meanwhile a free name: it may hold a person's corrections."""
    if path.exists() and _sha256(path) != sha256:
        names = (path.with_stem(f"{path.stem}-changed{n or ''}") for n in itertools.count())
        with suppress(FileNotFoundError):  # the other one has moved it
            move_file(path, next(p for p in names if not p.exists()))


def _unpack(sdist: Path, wanted: dict[str, Path]) -> None:
    """The wanted files out of the archive (regular files only), each verified before it takes its name."""
    try:
        with tarfile.open(sdist, "r:gz") as archive:
            for key, path in wanted.items():
                name, sha256 = FILES[key]
                member = archive.getmember(f"{SDIST}/data/{name}")
                source = archive.extractfile(member) if member.isreg() else None
                content = source.read() if source else b""
                if hashlib.sha256(content).hexdigest() != sha256:
                    raise UserError(f"{name} in {sdist} is not the published file; download it again.")
                with atomic_path(path) as temporary:
                    temporary.write_bytes(content)
                    _put_aside(Path(os.path.realpath(path)), sha256)
    except (tarfile.TarError, KeyError, EOFError, OSError, zlib.error) as e:
        raise UserError(f"{sdist} cannot be unpacked ({e}); download it again.") from e

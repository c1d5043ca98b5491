"""What is installed for the worker and the training, what an installation would fetch, and PyTorch's own environment.

Looking (check, plan_folder, own_environment) imports none of the packages looked for. What takes long is a generator of
Steps: processes that the panel runs over QProcess. This file needs the standard library alone, so that any Python 3.10 runs it:
python -m UNetSegmentationLib.environment plan | pip | verify | remove.
"""

from __future__ import annotations

import ast
import csv
import http.client
import json
import os
import platform
import re
import shutil
import ssl
import subprocess
import sys
import sysconfig
import tempfile
import urllib.parse
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from .files import (
    UserError,
    child_options,
    escape_arguments,
    is_this_computer,
    move_file,
    process_mark,
    this_computer,
    unescape_arguments,
    user_path,
)

# Slicer's own, of which 5.10 has builds that no index has: never installed into Slicer's Python, never removed from it.
PROVIDED = frozenset({"numpy", "simpleitk"})
# Other builds of the same package: onnxruntime over onnxruntime-gpu would take the GPU away.
ALTERNATIVES = {"onnxruntime": tuple(f"onnxruntime-{name}" for name in ("gpu", "directml", "openvino", "qnn", "rocm", "migraphx"))}
# The version that the tests are known to pass with. Unpinned, pip may fetch gigabytes of another build.
TORCH = "2.13.0"
TORCH_INDEX = "https://download.pytorch.org/whl/"
# What the worker and the training need in an environment of their own, beside PyTorch; pyproject.toml gives the reasons.
OWN_REQUIREMENTS = ("numpy>=1.26", "SimpleITK>=2.3", "onnxruntime>=1.17", "onnx>=1.16", "safetensors>=0.4.3")
# What training needs beside those. The command line's typer and rich, and TensorBoard, are for those who install with pip.
TRAINING_REQUIREMENTS = ("lightning>=2.4", "monai>=1.4", "scipy>=1.11", "pydantic>=2.6", "pyyaml>=6.0", "matplotlib>=3.8", "jinja2>=3.1")
# Older ones run what a checkpoint hides (CVE-2025-32434, CVE-2026-24747), and who trains on a shared folder may find another's there.
TRAINING_TORCH = "torch>=2.10"
# Of disk while it is made: the wheels and what is unpacked from them. 2.13.0+cpu on Linux: 0.2 and 0.8 GB.
TORCH_DISK = {"cpu": 3e9, "cu126": 12e9, "cu130": 12e9, "macos": 2e9}
PACKAGES = "UNETSEG_PACKAGES"  # the variable that names the environment's packages to the worker

_MARKER = "unetsegmentation-environment.json"
_SITE = ("site-packages", "dist-packages")
_BINARIES = (".so", ".pyd", ".dll", ".dylib")
_LONGEST = 171  # characters of the longest path in PyTorch's wheel: a licence in torch-2.13.0+cpu.dist-info
_WINDOWS_PATH = 259
_TIMEOUT_S = 8.0
_WAVES = 6  # of packages that need others


def activate() -> None:
    """Put the environment's packages before all others. To be called before anything but the standard library is imported.

    Not by PYTHONPATH, before which PythonSlicer's launcher puts Slicer's own packages.
    """
    folder = os.environ.get(PACKAGES)
    if folder and folder not in sys.path:
        sys.path.insert(0, folder)


# ------------------------------------------------------------------------------------------------ versions, markers, wheels


@dataclass(frozen=True)
class Requirement:
    """ "onnxruntime>=1.17; sys_platform != 'x'", read."""

    name: str  # normalised: lower case, "-"
    text: str  # without the marker
    bounds: tuple[tuple[str, str], ...]
    marker: str = ""
    extras: tuple[str, ...] = ()  # normalised

    @classmethod
    def read(cls, text: str) -> Requirement:
        """ValueError where it is none, or one by address."""
        text, _, marker = text.partition(";")
        match = re.fullmatch(r"\s*([A-Za-z0-9][\w.-]*)\s*(\[[^\]]*\])?\s*\(?\s*([^()@]*?)\s*\)?\s*", text)
        if match is None:
            raise ValueError(f"not a requirement: {text!r}")
        bounds = []
        for bound in filter(None, (b.strip() for b in match[3].split(","))):
            parts = re.fullmatch(r"(~=|===?|!=|<=|>=|<|>)\s*([\w.*+!-]+)", bound)
            if parts is None:
                raise ValueError(f"not a requirement: {text!r}")
            bounds.append((parts[1], parts[2]))
        extras = tuple(sorted(_normal(e.strip()) for e in (match[2] or "").strip("[]").split(",") if e.strip()))
        return cls(_normal(match[1]), text.strip(), tuple(bounds), marker.strip(), extras)

    def allows(self, version: str) -> bool:
        return all(_meets(version, operator, bound) for operator, bound in self.bounds)

    def applies(self, extras: Sequence[str] = ()) -> bool:
        """Whether the marker is true in this Python. extras: that are asked for of the package that needs this."""
        return not self.marker or any(_marker(ast.parse(self.marker, mode="eval").body, e) for e in extras or ("",))


def _read_all(texts: Iterable[str]) -> list[Requirement]:
    return [requirement for requirement in map(Requirement.read, texts) if requirement.applies()]


def read_requirements(path: str | Path) -> list[str]:
    """The requirements of a requirements.txt, without comments and options."""
    lines = (line.strip() for line in Path(path).read_text("utf-8").splitlines())
    return [line for line in lines if line and not line.startswith(("#", "-"))]


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _key(version: str) -> tuple[Any, ...]:
    """Sorts versions: pre-releases before the release, post-releases and builds (+cpu) after it."""
    match = re.match(r"v?(?:\d+!)?(\d+(?:\.\d+)*)([^+]*)(?:\+(.*))?", version.lower())
    if match is None:
        return ((), -1, 0, "")
    release = tuple(int(v) for v in match[1].split("."))
    while release and release[-1] == 0:
        release = release[:-1]
    post = re.fullmatch(r"[-_.]?(?:post|rev|r)?[-_.]?(\d+)", match[2])
    stage = 0 if not match[2] or post else -1
    return (release, stage, int(post[1]) if post else 0, match[3] or "")


def _meets(version: str, operator: str, bound: str) -> bool:
    if bound.endswith(".*"):
        prefix = bound[:-2].split(".")
        same = version.split("+")[0].split(".")[: len(prefix)] == prefix
        return same if operator == "==" else not same
    if operator == "~=":
        return _meets(version, ">=", bound) and _meets(version, "==", bound.rpartition(".")[0] + ".*")
    have, want = _key(version if "+" in bound else version.split("+")[0]), _key(bound)
    return {
        "==": have == want,
        "===": have == want,
        "!=": have != want,
        ">=": have >= want,
        "<=": have <= want,
        ">": have > want,
        "<": have < want,
    }[operator]


def _marker(node: ast.expr, extra: str) -> Any:
    """The value of a marker, whose grammar is a part of Python's. ValueError for what is not."""
    names = {
        "python_version": f"{sys.version_info[0]}.{sys.version_info[1]}",
        "python_full_version": platform.python_version(),
        "sys_platform": sys.platform,
        "os_name": os.name,
        "platform_system": platform.system(),
        "platform_machine": platform.machine(),
        "platform_python_implementation": platform.python_implementation(),
        "implementation_name": sys.implementation.name,
        "platform_release": platform.release(),
        "platform_version": platform.version(),
        "implementation_version": platform.python_version(),
        "extra": extra,
    }
    if isinstance(node, ast.BoolOp):
        values = [_marker(v, extra) for v in node.values]
        return all(values) if isinstance(node.op, ast.And) else any(values)
    if isinstance(node, ast.Name) and node.id in names:
        return names[node.id]
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        left, right, operator = _marker(node.left, extra), _marker(node.comparators[0], extra), node.ops[0]
        if isinstance(node.left, ast.Name) and node.left.id == "extra":
            right = _normal(right)
        if isinstance(operator, ast.In):
            return left in right
        if isinstance(operator, ast.NotIn):
            return left not in right
        symbol = {ast.Eq: "==", ast.NotEq: "!=", ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">="}.get(type(operator))
        if symbol is not None and re.match(r"\d", left) and re.match(r"\d", right):
            return _meets(left, symbol, right)
        if symbol in ("==", "!="):
            return (left == right) == (symbol == "==")
    raise ValueError(f"not a marker: {ast.unparse(node)}")


@dataclass(frozen=True)
class Target:
    """A Python that wheels must fit. system: "win", "macosx" or "manylinux", with its version (macOS's or glibc's)."""

    python: tuple[int, int]
    system: str
    machine: str
    version: tuple[int, int] = (0, 0)

    @classmethod
    def here(cls) -> Target:
        python = sys.version_info[:2]
        if sys.platform == "win32":
            return cls(python, "win", sysconfig.get_platform().removeprefix("win-"))
        if sys.platform == "darwin":
            parts = [int(v) for v in (platform.mac_ver()[0] or "10.13").split(".")[:2]] + [0]
            # 10.16 is what old builds of Python call every macOS since 11.
            return cls(python, "macosx", platform.machine(), (99, 0) if parts[:2] == [10, 16] else (parts[0], parts[1]))
        glibc = re.match(r"(\d+)\.(\d+)", platform.libc_ver()[1])
        return cls(python, "manylinux", platform.machine(), (int(glibc[1]), int(glibc[2])) if glibc else (2, 17))

    def __str__(self) -> str:
        system = {"win": "Windows", "macosx": "macOS", "manylinux": "Linux"}[self.system]
        return f"Python {self.python[0]}.{self.python[1]} on {system} ({self.machine})"

    def fits(self, wheel: str) -> bool:
        """Whether a wheel of this file name can be installed here."""
        parts = wheel.removesuffix(".whl").split("-")
        if not wheel.endswith(".whl") or len(parts) not in (5, 6):
            return False
        pythons, abis, platforms = (p.split(".") for p in parts[-3:])
        good = any(self._python(p, abi) for p in pythons for abi in abis)
        return good and any(self._platform(p) for p in platforms)

    def _python(self, python: str, abi: str) -> bool:
        match = re.fullmatch(r"(py|cp)(\d)(\d*)", python)
        if match is None or int(match[2]) != self.python[0]:
            return False
        minor = int(match[3] or 0)
        if match[1] == "py":
            return abi == "none" and minor <= self.python[1]
        if abi == "abi3":
            return 2 <= minor <= self.python[1]
        return minor == self.python[1] and abi in ("none", python)

    def _platform(self, tag: str) -> bool:
        if tag == "any":
            return True
        if self.system == "win":
            return tag == f"win_{self.machine}".replace("-", "_")
        old = {"manylinux1": "2_5", "manylinux2010": "2_12", "manylinux2014": "2_17"}
        tag = re.sub(r"^manylinux(1|2010|2014)_", lambda m: f"manylinux_{old[m[0][:-1]]}_", tag)
        match = re.fullmatch(rf"{self.system}_(\d+)_(\d+)_(\w+)", tag)
        machines = {self.machine}
        if self.system == "macosx":
            machines |= {"universal2", "universal", "intel", "fat64"} if self.machine == "x86_64" else {"universal2"}
        if match is None:
            return self.system == "manylinux" and tag == f"linux_{self.machine}"
        return match[3] in machines and (int(match[1]), int(match[2])) <= self.version


def _dependencies(metadata: str, extras: Sequence[str]) -> list[Requirement]:
    """What a wheel's METADATA asks for here, with these extras; what cannot be understood is left to pip."""
    out = []
    for line in metadata.partition("\n\n")[0].splitlines():
        if line.lower().startswith("requires-dist:"):
            try:
                requirement = Requirement.read(line.partition(":")[2])
                if requirement.applies(extras):
                    out.append(requirement)
            except (ValueError, SyntaxError):
                pass
    return out


# ------------------------------------------------------------------------------------------------------ what is installed


@dataclass(frozen=True)
class State:
    """Of a requirement or of something that it needs. status: "installed", "missing" or "broken", with the reason.

    remnants: what is to be removed before it is installed again.
    """

    name: str
    requirement: str
    status: str
    version: str = ""
    reason: str = ""
    remnants: tuple[Path, ...] = ()


@dataclass(frozen=True)
class _Distribution:
    name: str
    version: str
    info: Path


class _Site:
    """The distributions in the folders of a Python path, by listing them."""

    def __init__(self, paths: Sequence[str | Path] | None) -> None:
        self.distributions: dict[str, list[_Distribution]] = {}
        self.names: list[tuple[Path, str]] = []  # of all entries
        for folder in dict.fromkeys(Path(p) for p in (sys.path if paths is None else paths) if p):
            try:
                entries = sorted(os.listdir(folder))
            except OSError:
                continue
            for entry in entries:
                self.names.append((folder, entry))
                match = re.fullmatch(r"([^~-][^-]*)-(.+?)(?:-py\d[\d.]*)?\.(?:dist|egg)-info", entry)
                if match is not None:
                    found = _Distribution(_normal(match[1]), match[2], folder / entry)
                    self.distributions.setdefault(found.name, []).append(found)

    def find(self, name: str) -> list[_Distribution]:
        """The distribution as Python finds it: all of that name in the first folder that has one."""
        found = self.distributions.get(name, [])
        return [d for d in found if d.info.parent == found[0].info.parent]

    def having(self, requirement: Requirement) -> _Distribution | None:
        return next((d for d in self.find(requirement.name) if requirement.allows(d.version)), None)

    def remnants(self, name: str) -> list[Path]:
        """Everything of a package's name in site-packages, also what pip had renamed before it was cut off (~nnxruntime)."""
        module = name.replace("-", "_")
        out = []
        for folder, entry in self.names:
            if folder.name not in _SITE:
                continue
            stem = _normal(re.sub(r"-[^-]+?(-py\d[\d.]*)?\.(dist|egg)-info$", "", entry)).replace("-", "_")
            # pip puts "~" and a run of "-~.=%0123456789" in the place of the first characters.
            cut = re.sub(r"-[^-]+\.(dist|egg)-info$", "", entry)
            tail = cut.lstrip("-~.=%0123456789") if cut.startswith("~") else ""
            renamed = len(tail) > len(cut) - 4 and len(cut) == len(module) and module.endswith(_normal(tail).replace("-", "_"))
            if stem == module or entry == f"{module}.libs" or renamed:
                out.append(folder / entry)
        return out


def check(requirements: Iterable[str], paths: Sequence[str | Path] | None = None, extras: bool = True) -> list[State]:
    """The state of each requirement, and of what these need where that is not in order. Imports nothing, takes milliseconds.

    paths: where to look (default: this Python's path). extras: also those that they need of other packages, without which
    they may well run: lightning asks for fsspec[http], and trains without the aiohttp that this needs.
    """
    site = _Site(paths)
    out: dict[str, State] = {}
    seen = set()
    waiting = [(requirement, True) for requirement in _read_all(requirements)]
    while waiting:
        requirement, asked = waiting.pop(0)
        if (requirement.name, requirement.extras) in seen:
            continue
        seen.add((requirement.name, requirement.extras))
        state, needs = _look(requirement, site, asked)
        # Asked for with and without extras it is reported once, with them.
        if (asked or state.status != "installed") and (requirement.extras or requirement.name not in out):
            out[requirement.name] = state
        waiting += [(need if extras else replace(need, extras=()), False) for need in needs]
    return list(out.values())


def _look(requirement: Requirement, site: _Site, asked: bool) -> tuple[State, list[Requirement]]:
    found: list[_Distribution] = []
    for name in (requirement.name, *ALTERNATIVES.get(requirement.name, ())):
        found = found or site.find(name)
    version = found[-1].version if found else ""

    def state(status: str, reason: str = "", remnants: Iterable[Path] = ()) -> State:
        return State(requirement.name, requirement.text, status, version, reason, tuple(remnants))

    if requirement.name in PROVIDED:  # Slicer's own builds keep no books
        return state("installed" if found else "missing"), []
    remnants = site.remnants(requirement.name)
    if not found:
        # Without books Python still imports the folder, as an empty namespace.
        return (state("broken", "its installation or removal was cut off", remnants) if remnants else state("missing")), []
    reason = "parts of two versions of it are there" if len(found) > 1 else _damage(found[0].info)
    if reason:
        return state("broken", reason, remnants), []
    # Other versions of what it needs are for pip to judge: an upgrade could break what else needs them.
    if asked and not requirement.allows(version):
        return state("broken", f"{version} is there, {requirement.text} is needed"), []
    return state("installed"), _needs(found[0], requirement.extras)


def _needs(there: _Distribution, extras: Sequence[str]) -> list[Requirement]:
    try:
        return _dependencies((there.info / "METADATA").read_text("utf-8", errors="replace"), extras)
    except OSError:
        return []


def _damage(info: Path) -> str:
    """Why a distribution is not whole, by its own books; "" where it is."""
    if info.suffix == ".egg-info":
        return ""
    try:
        rows = list(csv.reader((info / "RECORD").read_text("utf-8").splitlines()))
    except (OSError, ValueError, csv.Error):
        rows = []
    if not rows:
        # pip writes RECORD last. Debian's own packages have none.
        return "" if info.parent.name == "dist-packages" else "its installation was cut off"
    for row in rows:
        name = row[0] if row else ""
        # Scripts and bytecode may go missing without harm.
        if not name or name.startswith("..") or os.path.isabs(name) or name.endswith(".pyc"):
            continue
        try:
            size = os.stat(info.parent / name).st_size
        except OSError:
            return f"its file {name} is missing"
        if name.endswith(_BINARIES) and row[-1].isdigit() and int(row[-1]) != size:
            return f"its file {name} is not complete"
    return ""


def to_install(states: Iterable[State]) -> list[str]:
    """What pip is to be asked for, after remove_remnants()."""
    return [s.requirement for s in states if s.status != "installed"]


def remove_remnants(states: Iterable[State]) -> None:
    """Remove what is left of broken packages, which pip itself cannot ("no RECORD file"). UserError where that fails.

    Only in site-packages, and never what Slicer has.
    """
    for state in states:
        for path in state.remnants if state.name not in PROVIDED else ():
            if path.parent.name not in _SITE:
                continue
            try:
                if path.is_dir() and not path.is_symlink():
                    _rmtree(path)
                else:
                    path.unlink(missing_ok=True)
            except OSError as e:
                text = f"What is left of {state.name} cannot be removed ({e.strerror or e})"
                raise UserError(f"{text}; close other Slicer windows, and try again with write access to {path.parent}.") from e


def pins(states: Iterable[State], paths: Sequence[str | Path] | None = None) -> list[str]:
    """Constraints for pip that keep every package that is there at its version, except those to be installed."""
    free = {s.name for s in states if s.status != "installed"}
    site = _Site(paths)
    valid = re.compile(r"(\d+!)?\d+(\.\d+)*((a|b|rc)\d+)?(\.post\d+)?(\.dev\d+)?(\+[a-z0-9]+([-_.][a-z0-9]+)*)?", re.IGNORECASE)
    found = (site.find(name)[0] for name in sorted(site.distributions) if name not in free)
    return [f"{d.name}=={d.version}" for d in found if valid.fullmatch(d.version)]


def _rmtree(folder: Path) -> None:
    def again(remove: Callable[[str], Any], path: str, _: Any) -> None:
        os.chmod(path, 0o700)  # Windows removes no read-only file
        remove(path)

    # onerror goes in Python 3.14; onexc came in 3.12.
    shutil.rmtree(folder, **({"onexc": again} if sys.version_info >= (3, 12) else {"onerror": again}))  # type: ignore[call-overload]


# ------------------------------------------------------------------------------------------------- what would be installed


@dataclass(frozen=True)
class Package:
    name: str
    version: str  # "": not known
    size: int | None = None  # bytes of the wheel; None: not known


@dataclass(frozen=True)
class Plan:
    """What an installation would fetch. complete: no package is missing from the list, as far as could be found out.

    problem: why not all of it can be fetched as far as is known (of PyTorch, its index may be blocked alone), "" where it can; a wheel
    folder may have it then.
    """

    packages: tuple[Package, ...] = ()
    complete: bool = True
    problem: str = ""
    variant: str = ""  # of PyTorch

    def __str__(self) -> str:
        """onnxruntime 1.32.0, flatbuffers 25.12.19 and numpy 2.4.6 (45 MB)"""
        names = [f"{p.name} {p.version}".strip() for p in self.packages]
        if not self.complete:
            names.append("what comes with it")
        text = ", ".join(names[:-1]) + (" and " if names[:-1] else "") + "".join(names[-1:])
        known = sum(p.size or 0 for p in self.packages)
        unknown = not self.complete or any(p.size is None for p in self.packages)
        if not known:
            return f"{text} (size unknown)"
        return f"{text} ({'at least ' if unknown else ''}{megabytes(known)})"


def megabytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{max(size / 1e6, 0.1):.{0 if size >= 1e7 else 1}f} MB"


def plan_folder(requirements: Iterable[str], folder: str | Path, paths: Sequence[str | Path] | None = None) -> Plan:
    """What would be installed from a folder of wheels, whose content is all there is (pip's --no-index --find-links).

    paths: where what is there already is looked for ([]: nothing is). UserError naming every wheel that is missing, and every
    one that is there for another Python or platform.
    """
    target = Target.here()
    try:
        wheels = sorted(n for n in os.listdir(folder) if n.lower().endswith(".whl"))
    except OSError as e:
        raise UserError(f"The wheel folder {folder} cannot be read ({e.strerror or e}); choose another.") from e
    site = _Site(paths)
    missing: list[str] = []
    unfit: list[str] = []
    packages: dict[str, Package] = {}
    waiting = _read_all(requirements)
    asked = {r.name for r in waiting}
    seen: set[tuple[str, tuple[str, ...]]] = set()
    while waiting:
        requirement = waiting.pop(0)
        if (requirement.name, requirement.extras) in seen:
            continue
        seen.add((requirement.name, requirement.extras))
        if requirement.name not in asked and (there := site.having(requirement)):
            waiting += _needs(there, requirement.extras)
            continue
        named = [n for n in wheels if _normal(n.split("-")[0]) == requirement.name and requirement.allows(n.split("-")[1])]
        good = sorted((n for n in named if target.fits(n)), key=lambda n: _key(n.split("-")[1]))
        if not good:
            if named:
                unfit.append(named[-1])
            else:
                missing.append(requirement.text)
            continue
        path = Path(folder, good[-1])
        if requirement.name not in packages or not requirement.allows(packages[requirement.name].version):  # asked for with other extras
            packages[requirement.name] = Package(requirement.name, good[-1].split("-")[1], path.stat().st_size)
        try:
            waiting += _dependencies(_wheel_metadata(path), requirement.extras)
        except (OSError, zipfile.BadZipFile, zlib.error, KeyError, StopIteration, RuntimeError) as e:  # NotImplementedError too
            raise UserError(f"The wheel {path} is damaged; copy it into the folder again.") from e
    if missing or unfit:
        clauses = [f"has no wheel of {', '.join(missing)}"] if missing else []
        clauses += [f"has {', '.join(unfit)} for another Python or system"] if unfit else []
        text = f"The wheel folder {folder} {' and '.join(clauses)}"
        raise UserError(f"{text}; put wheels for {target} there.")
    return Plan(tuple(packages.values()))


def _wheel_metadata(path: Path) -> str:
    with zipfile.ZipFile(path) as z:
        name = next(n for n in z.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", n))
        return z.read(name).decode("utf-8", "replace")


def plan_step(
    python: str,
    requirements: Iterable[str],
    options: Sequence[str] = (),
    folder: str | Path = "",
    fresh: bool = False,
    paths: Sequence[str | Path] | None = None,
) -> Step:
    """Asks the index, or a wheel folder, what an installation would fetch; read_plan() reads the answer.

    options: pip's, for the index. fresh: nothing counts as there already; paths: only what is there does.
    Not by "pip install --dry-run", which before pip 25.3 downloads all of it, ahead of the question whether to.
    """
    there = [] if fresh else None if paths is None else [str(p) for p in paths]
    task = {"requirements": list(requirements), "options": list(options), "folder": str(folder), "paths": there}
    return Step("looking up what is needed", _child(python, "plan", json.dumps(task)))


def read_plan(done: Done, variant: str = "") -> Plan:
    answer = answer_of(done)
    if answer is None:
        return Plan(complete=False, problem=pip_failure(done), variant=variant)
    packages = tuple(Package(*entry) for entry in answer["packages"])
    return Plan(packages, answer["complete"], answer["problem"], variant)


def _plan(task: dict[str, Any]) -> dict[str, Any]:
    """In the child: find the closure of the requirements in the index, in waves."""
    if task["folder"]:
        try:
            plan = plan_folder(task["requirements"], task["folder"], task["paths"])
        except Exception as e:
            return {"packages": [], "complete": False, "problem": str(e)}
        return {"packages": [(p.name, p.version, p.size) for p in plan.packages], "complete": True, "problem": ""}
    site = _Site(task["paths"])
    packages: dict[str, tuple[str, str, int | None]] = {}
    complete, problem = True, ""
    wave = _read_all(task["requirements"])
    asked, seen = {r.name for r in wave}, set()
    with ThreadPoolExecutor(8) as pool:
        while wave:
            new = {(r.name, r.extras): r for r in wave if (r.name, r.extras) not in seen}
            seen |= set(new)
            there = {key: site.having(r) for key, r in new.items() if r.name not in asked}
            wave = [r for key, r in new.items() if not there.get(key)]
            needs = [need for key, d in there.items() if d for need in _needs(d, new[key].extras)]
            found = list(pool.map(lambda r: _look_up(r, task["options"]), wave))
            for requirement, (version, size, metadata, failure) in zip(wave, found):
                if not version:
                    complete = False
                    if requirement.name in asked:
                        packages[requirement.name] = (requirement.name, "", None)
                        problem = problem or failure
                    continue
                if requirement.name not in packages or not requirement.allows(packages[requirement.name][1]):
                    packages[requirement.name] = (requirement.name, version, size)
                if metadata is None:
                    complete = False
                else:
                    needs += _dependencies(metadata, requirement.extras)
            wave = needs
    return {"packages": list(packages.values()), "complete": complete, "problem": problem}


def _look_up(requirement: Requirement, options: Sequence[str]) -> tuple[str, int | None, str | None, str]:
    """(version, size, METADATA, "") of the wheel that pip would take, ("", None, None, why) where there is none."""
    command = [sys.executable, "-m", "pip", "index", "versions", requirement.name, "-vv", "--only-binary", ":all:"]
    command += ["--no-input", "--retries", "1", "--timeout", f"{_TIMEOUT_S:.0f}", "--disable-pip-version-check", *options]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, encoding="utf-8", errors="replace", **child_options()
    )
    best = read_index(done.stdout + done.stderr, requirement)
    if best is None:  # pip is content where there are other versions
        said = done.stderr if done.returncode else f"No matching distribution found for {requirement.text}\n{done.stderr}"
        return "", None, None, pip_failure(Done(done.returncode, done.stdout, said))
    version, url = best
    if url.startswith("file:"):
        path = Path(urllib.request.url2pathname(urllib.parse.urlsplit(url).path))
        try:
            return version, path.stat().st_size, _wheel_metadata(path), ""
        except (OSError, zipfile.BadZipFile, zlib.error, StopIteration, RuntimeError):
            return version, None, None, ""
    length, _ = _open(url, "HEAD")
    _, metadata = _open(url + ".metadata", "GET")
    return version, int(length) if length.isdigit() else None, metadata, ""


def read_index(output: str, requirement: Requirement) -> tuple[str, str] | None:
    """The newest release that fits, and its address, from what "pip index versions -vv" writes (pip 21.2 to 25.3)."""
    links = re.findall(r"Found link (\S+?)(?:#\S*)? \(from .*version: (\S+)\s*$", output, re.MULTILINE)
    good = [(version, url) for url, version in links if requirement.allows(version) and _key(version)[1] == 0 and url.endswith(".whl")]
    return max(good, key=lambda link: _key(link[0])) if good else None


@cache
def _certificates() -> ssl.SSLContext:
    context = ssl.create_default_context()  # Windows' own too, which know a hospital's proxy; pip asks them as well
    if named := os.environ.get("PIP_CERT") or os.environ.get("SSL_CERT_FILE"):  # Slicer sets the second, to its own file
        context.load_verify_locations(named)
    if not context.cert_store_stats()["x509_ca"]:  # Slicer's OpenSSL knows no folder of certificates
        import importlib

        with suppress(ImportError, OSError):
            context.load_verify_locations(importlib.import_module("certifi").where())
    return context


def _open(url: str, method: str) -> tuple[str, str | None]:
    """(Content-Length, text); ("", None) where it does not come, or not to its end."""
    try:
        request = urllib.request.Request(url, method=method)
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S, context=_certificates()) as answer:
            return answer.headers.get("Content-Length", ""), answer.read(1 << 20).decode("utf-8", "replace")
    except (OSError, ValueError, http.client.HTTPException):
        return "", None


# ---------------------------------------------------------------------------------------------------------------- processes


@dataclass(frozen=True)
class Step:
    """A process to run, in folder working_folder() of the worker's client and with the variables that it gives a child."""

    text: str
    command: tuple[str, ...]
    variables: Mapping[str, str | None] = field(default_factory=dict)  # beside; None: without that variable


@dataclass(frozen=True)
class Done:
    """How a Step ended. code: None where it could not be started."""

    code: int | None
    output: str
    log: str = ""


def _child(python: str, *arguments: str) -> tuple[str, ...]:
    return (python, "-m", "UNetSegmentationLib.environment", *escape_arguments(arguments))


def child_pid(line: str) -> int | None:
    """The process id that this file's children write first: that of a launcher such as PythonSlicer is not theirs."""
    match = re.fullmatch(r'\{"pid": (\d+)\}\s*', line)
    return int(match[1]) if match else None


def answer_of(done: Done) -> dict[str, Any] | None:
    """The last line of a child's output, where that is its answer."""
    lines = done.output.strip().splitlines()
    try:
        answer = json.loads(lines[-1]) if done.code == 0 and lines else None
    except ValueError:
        answer = None
    return answer if isinstance(answer, dict) and "pid" not in answer else None


def pip_progress(line: str) -> tuple[float | None, str]:
    """(fraction of the running download, "") or (None, what pip does) from a line of its output; (None, "") otherwise."""
    if match := re.match(r"Progress (\d+) of (\d+)", line):
        return (int(match[1]) / int(match[2]) if int(match[2]) else None), ""
    if match := re.match(r"\s*Downloading (?:\S*/)?([^-\s]+)-([^-\s]+)\S*(?: (\(.*\)))?", line):
        return None, " ".join(filter(None, ("downloading", match[1], urllib.parse.unquote(match[2]), match[3])))
    if match := re.match(r"(?:Processing|Using cached) (?:\S*/)?([^-\s]+)-([^-\s]+)", line.strip()):
        return None, f"reading {match[1]} {match[2]}"
    return None, "installing" if line.startswith("Installing collected packages") else ""


_FAILURES = (
    (r"No space left|not enough space|Errno 28|WinError 112", "The disk is full; free some space and try again."),
    (r"No module named pip\b", "This Python has no pip; install it (python3-pip) or choose another Python."),
    (r"[Pp]ermission denied|Access is denied|WinError 5\b", "The folder cannot be written; close other Slicer windows and try again."),
    (r"ResolutionImpossible", "Packages that are installed are in conflict with what is needed; nothing was changed."),
    (r"PACKAGES DO NOT MATCH THE HASHES", "What came was damaged or altered; try again, and if it happens again ask your administrator."),
    (r"ProxyError|407 Proxy|: 407 Client Error", "The proxy refused the connection; set it up for pip, or choose a folder of wheels."),
    (r"SSLError|CERTIFICATE_VERIFY", "The connection's certificate is not trusted; set PIP_CERT, or choose a folder of wheels."),
    (
        r"NewConnectionError|NameResolution|ConnectTimeout|Max retries|ReadTimeout|getaddrinfo|Connection (refused|reset|broken)",
        "The package index cannot be reached; check the connection, or choose a folder of wheels.",
    ),
)


def pip_failure(done: Done) -> str:
    """One sentence for a pip that failed."""
    text = done.output + "\n" + done.log
    if done.code is None:
        return f"The Python cannot be started ({done.log.strip() or 'not found'}); choose another Python."
    for pattern, sentence in _FAILURES:
        if re.search(pattern, text):
            return sentence
    if match := re.search(r"No matching distribution found for (\S+)", text):
        # As -vv tells. PyTorch's index answers 403 for all that it lacks, so that this counts only where no other has a link;
        # a build (+cu126) it alone has, and then only links of that one count.
        build = match[1].partition("+")[2]
        index = "PyTorch's" if build else "The package"
        link = (rf"(\+|%2B){re.escape(build)}\S*" if build else "") + r"\.(whl|gz|zip)\S* \(from "
        if "Fetching project page" in text and not re.search(link, text):
            refused = re.search(r"Could not fetch URL \S+: 40[13]\b", text)
            what = "or a firewall refused the connection" if refused else f"offers no {match[1]}, or a firewall blocks it"
            return f"{index} index {what}; ask your administrator, or choose a folder of wheels."
        return f"There is no wheel of {match[1]} for this Python and system; choose another Python, or a folder of wheels."
    last = [line.strip() for line in text.splitlines() if re.match(r"\s*(ERROR|error|\w*Error):", line)]
    reason = last[-1] if last else f"exit code {done.code}"
    return f"pip failed ({reason[:200]}); try again."


Steps = Generator[Step, Done, Any]


def variables_of(step: Step, environment: Mapping[str, str]) -> dict[str, str]:
    """The variables of a step's process, given those of any child."""
    out = {**environment, **step.variables}
    return {name: value for name, value in out.items() if value is not None}


# ------------------------------------------------------------------------------------------ PyTorch's own environment

# A folder that pip fills with --target, and that activate() puts first on the worker's path, instead of a venv: Slicer's
# Python makes none. Its standard library lies in lib/Python and its interpreter in bin as python-real, so that a venv's
# interpreter, which gets neither PYTHONHOME nor LD_LIBRARY_PATH, finds no standard library on Linux and macOS, and on
# Windows Python's venv looks for a venvlauncher.exe that Slicer does not ship. Run as Slicer runs it, it needs none of that,
# and any other Python with pip does the same (Debian's has no ensurepip). The folder holds everything the worker needs,
# so that nothing is ever installed into Slicer.


@dataclass(frozen=True)
class OwnEnvironment:
    """status: "none", "ready", "broken" (half made, or its Python is gone: to be made again), "busy" (another program is making it) or
    "foreign" (not ours)."""

    folder: Path
    status: str
    reason: str = ""
    python: str = ""
    torch: str = ""
    device: str = ""  # "NVIDIA ...", "Apple GPU" or "CPU"
    size: int = 0  # bytes

    @property
    def variables(self) -> dict[str, str]:
        """For the worker, beside its others."""
        return {PACKAGES: str(_packages(self.folder)), "PYTHONNOUSERSITE": "1"}


def environment_folder() -> Path:
    """Where PyTorch's own environment lies; $UNETSEG_ENVIRONMENT overrides the user's data folder."""
    from .model import user_data_folder

    # Absolute, since the processes that fill and remove it have another current folder.
    return user_path(os.environ.get("UNETSEG_ENVIRONMENT") or user_data_folder() / "torch").absolute()


def own_environment(folder: Path | None = None) -> OwnEnvironment:
    """The state of the environment, by its marker: no process is started, but on macOS ps where it is being made."""
    folder = environment_folder() if folder is None else Path(folder)
    try:
        if not os.listdir(folder):
            return OwnEnvironment(folder, "none")
    except FileNotFoundError:
        return OwnEnvironment(folder, "none")
    except OSError as e:
        return OwnEnvironment(folder, "foreign", e.strerror or str(e))
    marker = _read_marker(folder)
    if marker is None:
        return OwnEnvironment(folder, "foreign", "it was not made by UNetSegmentation")
    if marker.get("state") == "making" and _is_made_by_another(marker):
        return OwnEnvironment(folder, "busy", "PyTorch is being installed by another Slicer; wait for its end.")
    python = str(marker.get("python", ""))
    reason = ""
    if marker.get("state") != "ready" or not (_packages(folder) / "torch" / "__init__.py").is_file():
        reason = "it was not finished"
    elif not os.path.isfile(python):
        reason = f"its Python {python} is gone"
    elif os.path.normcase(python) == os.path.normcase(sys.executable) and marker.get("version") != list(sys.version_info[:2]):
        reason = "it was made for another version of Python"
    status, size = "broken" if reason else "ready", marker.get("size", 0)
    torch, device = (str(marker.get(key, "")) for key in ("torch", "device"))
    return OwnEnvironment(folder, status, reason, python, torch, device, size if isinstance(size, int) else 0)


def create_steps(python: str, variant: str = "auto", wheel_folder: str | Path | None = None, training: bool = False) -> Steps:
    """Make the environment, anew where there is a broken one; the result is an OwnEnvironment.

    python: the Python (>= 3.10, with pip) that fills and runs it. variant: "auto", "cpu", "cu126" or "cu130". wheel_folder:
    install from it alone. training: with what training needs. UserError before anything is changed where this Python, folder
    or disk will not do; after a failure, or when closed midway, the folder is marked as not finished.
    """
    folder = environment_folder()
    before = _free_environment(folder)
    if before.status == "foreign":
        raise UserError(f"The folder {folder} cannot be used ({before.reason}); move it away, or set UNETSEG_ENVIRONMENT to another.")
    probe, variant = yield from _prepare(python, variant)
    temporary = _temporary(folder, sys.platform)
    if wheel_folder is not None:
        yield from _plan_torch(python, variant, wheel_folder, training)
    if before.status == "broken":
        yield from remove_steps(python)
    _check_disk(folder, variant, before.size if before.status == "ready" else 0)
    if before.status == "ready":
        yield from remove_steps(python)
    marker: dict[str, Any] = {"made_by": "UNetSegmentation", "python": python, "version": probe["version"][:2]}
    _write_marker(folder, {**marker, "state": "making", "makers": [_this_process()]})
    try:
        wanted = own_requirements(variant, wheel_folder is not None, training)
        yield from _pip_steps(python, folder, wanted, _index(variant), wheel_folder, probe["pip"], temporary, "PyTorch")
        answer = yield from _tried(python, folder, training)
        _write_marker(folder, {**marker, "state": "ready", "variant": variant, **answer})
    except Exception as e:
        with suppress(Exception):  # nobody makes it any more, which another Slicer is to know
            _write_marker(folder, {**marker, "state": "failed"})
        if isinstance(e, OSError):
            text = f"The folder {folder} cannot be written ({e.strerror or e}); free some space or set UNETSEG_ENVIRONMENT."
            raise UserError(text) from e
        raise
    return own_environment(folder)


def _tried(python: str, folder: Path, training: bool) -> Generator[Step, Done, dict[str, Any]]:
    """That what was installed runs; what _verify() says of it."""
    command = _child(python, "verify", str(folder), *(["training"] if training else []))
    done = yield Step("trying it", command, OwnEnvironment(folder, "ready").variables)
    answer = answer_of(done)
    if answer is None:
        last = (done.log.strip().splitlines() or [f"exit code {done.code}"])[-1]
        raise UserError(f"PyTorch was installed but does not run with {python} ({last[:200]}); choose another Python.")
    return answer


def plan_torch_steps(
    python: str, variant: str = "auto", wheel_folder: str | Path | None = None, training: bool = False
) -> Generator[Step, Done, Plan]:
    """Find out what create_steps() would fetch; the result is a Plan, with the variant to give it."""
    _free_environment(environment_folder())
    _, variant = yield from _prepare(python, variant)
    return (yield from _plan_torch(python, variant, wheel_folder, training))


def _plan_torch(python: str, variant: str, wheel_folder: str | Path | None, training: bool) -> Generator[Step, Done, Plan]:
    wanted = own_requirements(variant, wheel_folder is not None, training)
    plan = read_plan((yield plan_step(python, wanted, _index(variant), wheel_folder or "", fresh=True)), variant)
    if wheel_folder is not None and plan.problem:
        raise UserError(plan.problem)
    return plan


def remove_steps(python: str) -> Steps:
    """Remove the environment, in a process of `python`. UserError, and nothing removed, where the folder is not ours."""
    folder = environment_folder()
    if _free_environment(folder).status == "none":
        return
    _must_be_ours(folder)
    done = yield Step("removing the environment", _child(python, "remove", str(folder)))
    if done.code != 0:
        last = (done.log.strip().splitlines() or ["it is in use"])[-1]
        raise UserError(f"The environment was not removed completely ({last[:200]}); close other Slicer windows and try again.")


def remove(folder: Path | None = None) -> None:
    """Remove the environment. UserError, and nothing removed, where the folder is not ours; OSError where it is in use."""
    folder = environment_folder() if folder is None else Path(folder)
    if own_environment(folder).status == "none":
        return
    _must_be_ours(folder)
    _write_marker(folder, {**(_read_marker(folder) or {}), "state": "removing"})
    for entry in os.scandir(folder):
        if entry.name == _MARKER:
            continue
        if entry.is_dir(follow_symlinks=False):
            _rmtree(Path(entry.path))
        else:
            os.unlink(entry.path)
    (folder / _MARKER).unlink()  # last, so that what is left of a removal that is cut off is still known as ours
    folder.rmdir()


# What training needs comes into the environment of PyTorch, later too: there pip --target sees nothing of what is there
# already and would fetch PyTorch again. So the packages that are missing are found out first, and pip gets those alone.


def training_lacks(own: OwnEnvironment | None = None, extras: bool = True) -> list[str]:
    """The requirements of training that PyTorch's own environment lacks, or, where that is not ready, this Python. extras: as of
    check()."""
    own = own_environment() if own is None else own
    if own.status == "ready":
        return to_install(check((TRAINING_TORCH, *TRAINING_REQUIREMENTS), paths=[_packages(own.folder)], extras=extras))
    torch = (TRAINING_TORCH, "onnx>=1.16", "onnxruntime>=1.17", "safetensors>=0.4.3")
    return to_install(check((*torch, *TRAINING_REQUIREMENTS), extras=extras))


def training_python() -> tuple[str, dict[str, str]]:
    """(Python that can train, its variables beside the others). UserError where something has to be installed first."""
    from .worker.client import find_python

    own = own_environment()
    if lacks := training_lacks(own, extras=False):
        names = list(dict.fromkeys(Requirement.read(text).name for text in lacks))
        raise UserError(
            f"Training needs {', '.join(names)}, which {'is' if len(names) == 1 else 'are'} not installed or too old; "
            f"install it in the panel, or run: pip install --upgrade {' '.join(names)}"
        )
    return (own.python, own.variables) if own.status == "ready" else (find_python(), {})


def plan_training_steps(own: OwnEnvironment, wheel_folder: str | Path | None = None) -> Generator[Step, Done, Plan]:
    """Find out what add_training_steps() would fetch into an environment that is ready; the result is a Plan."""
    step = plan_step(own.python, training_lacks(own), (), wheel_folder or "", paths=[_packages(own.folder)])
    plan = read_plan((yield step))
    if wheel_folder is not None and plan.problem:
        raise UserError(plan.problem)
    if any(p.name == "torch" for p in plan.packages):
        raise UserError(f"The PyTorch {own.torch} that is installed does not suit the training; remove it and install it again.")
    return plan


def add_training_steps(own: OwnEnvironment, wheel_folder: str | Path | None = None) -> Steps:
    """Add what training needs to an environment that is ready; the result is an OwnEnvironment. UserError in one sentence; what
    was cut off is made whole by the next call, and PyTorch goes on working meanwhile."""
    probe, _ = yield from _prepare(own.python, "cpu")
    for _ in range(_WAVES):
        if not training_lacks(own):
            break
        # An index that does not say what a wheel needs (PEP 658) leaves that to be read from the wheel once it is installed.
        plan = yield from plan_training_steps(own, wheel_folder)
        if plan.problem or not plan.packages or any(not p.version for p in plan.packages):
            raise UserError(plan.problem or "It was not found out what training needs; try again, or choose a folder of wheels.")
        temporary = _temporary(own.folder, sys.platform)
        wanted = ["--upgrade", "--no-deps", *(f"{p.name}=={p.version}" for p in plan.packages)]
        yield from _pip_steps(own.python, own.folder, wanted, (), wheel_folder, probe["pip"], temporary, "what training needs")
    answer = yield from _tried(own.python, own.folder, True)
    _write_marker(own.folder, {**(_read_marker(own.folder) or {}), **answer})
    return own_environment(own.folder)


def own_requirements(variant: str, folder: bool = False, training: bool = False) -> list[str]:
    """What pip is asked for. folder: from a wheel folder, whose build of PyTorch is the person's choice."""
    # The build is named: then no other index can have it, and no other build is taken.
    local = "" if folder or variant == "macos" else f"+{variant}"
    return [*OWN_REQUIREMENTS, f"torch=={TORCH}{local}", *(TRAINING_REQUIREMENTS if training else ())]


def choose_variant(system: str, gpus: str) -> str:
    """Which build of PyTorch suits. gpus: lines of name, driver and compute capability from nvidia-smi; "" without it.

    2.13 is built for CUDA 12.6 (compute capability 5.0 to 9.0) and 13.0 (7.5 and up), which run with drivers since 525 and 580.
    """
    if system == "darwin":
        return "macos"
    builds = set()
    for line in gpus.splitlines():
        fields = [f.strip() for f in line.split(",")]
        if len(fields) == 3 and re.match(r"\d+\.", fields[1]) and re.fullmatch(r"\d+\.\d+", fields[2]):
            driver, capability = int(fields[1].split(".")[0]), float(fields[2])
            if driver >= 580 and capability >= 7.5:
                builds.add("cu130")
            elif driver >= 525 and 5.0 <= capability < 10.0:
                builds.add("cu126")
    return min(builds, default="cpu")  # of two GPUs the older decides


def _prepare(python: str, variant: str) -> Generator[Step, Done, tuple[dict[str, Any], str]]:
    """What kind of Python it is, and the variant. UserError where PyTorch cannot run with it."""
    done = yield Step("looking at the Python", (python, "-c", _PROBE))
    probe = answer_of(done)
    if probe is None:
        raise UserError(f"{python} is not a Python that can be used ({(done.log.strip() or 'no answer')[-200:]}); choose another Python.")
    version = ".".join(map(str, probe["version"]))
    if tuple(probe["version"]) < (3, 10) or probe["bits"] != 64:
        raise UserError(f"The Python at {python} is {version} with {probe['bits']} bits; choose a 64-bit Python 3.10 or newer.")
    if probe["pip"] is None:
        raise UserError(f"The Python at {python} has no pip; install it (python3-pip) or choose another Python.")
    if probe["system"] == "darwin" and probe["machine"] != "arm64":
        text = "PyTorch has no build for Intel Pythons on macOS, as Slicer's is, so training from the panel is not possible"
        raise UserError(f"{text}; use the command line with an Apple-silicon Python, or stay with ONNX Runtime to segment and click.")
    if variant == "auto":
        gpus = ""
        if probe["system"] != "darwin":
            query = "--query-gpu=name,driver_version,compute_cap"
            done = yield Step("looking for a GPU", ("nvidia-smi", query, "--format=csv,noheader"))
            gpus = done.output if done.code == 0 else ""
        variant = choose_variant(probe["system"], gpus)
    if variant not in TORCH_DISK:
        raise UserError(f"There is no build {variant!r} of PyTorch; choose one of auto, {', '.join(TORCH_DISK)}.")
    return probe, variant


# For any Python, old ones too.
_PROBE = """
import json, platform, struct, sys
try:
    import pip
    version = pip.__version__
except Exception:
    version = None
print(json.dumps({"version": list(sys.version_info[:3]), "bits": 8 * struct.calcsize("P"), "system": sys.platform,
    "machine": platform.machine(), "pip": version}))
"""


def _index(variant: str) -> list[str]:
    return [] if variant == "macos" else ["--extra-index-url", TORCH_INDEX + variant]


def _pip_steps(
    python: str,
    folder: Path,
    wanted: Sequence[str],
    index: Sequence[str],
    wheels: str | Path | None,
    pip: str,
    temporary: Path | None,
    what: str,
) -> Generator[Step, Done, None]:
    bar = "raw" if _key(pip) >= _key("24.1") else "off"
    # No cache: what is fetched would stay on the disk a second time, where no removal finds it.
    options = ["--target", str(_packages(folder)), "--only-binary", ":all:", "--no-cache-dir", "--no-input", "--progress-bar", bar]
    options += ["--no-warn-script-location", "--disable-pip-version-check", "--no-compile"]
    options += ["--no-index", "--find-links", str(wheels)] if wheels is not None else list(index)
    variables: dict[str, str | None] = {"PIP_USER": "0", "PIP_TARGET": None, "PIP_PREFIX": None, "PYTHONUNBUFFERED": "1"}
    if wheels is not None:
        variables |= {"PIP_FIND_LINKS": None, "PIP_EXTRA_INDEX_URL": None}
    if temporary is not None:
        temporary.mkdir(exist_ok=True)
        variables |= dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(temporary))
    done = yield Step(f"installing {what}", _child(python, "pip", "install", *options, *wanted), variables)
    if done.code != 0:
        raise UserError(f"{what[0].upper()}{what[1:]} was not installed: {pip_failure(done)}")
    if temporary is not None:
        shutil.rmtree(temporary, ignore_errors=True)  # empty but after a failure


def _packages(folder: Path) -> Path:
    return folder / "packages"


def _temporary(folder: Path, system: str) -> Path | None:
    """A folder for pip's own, inside, so that it goes with the environment and what pip unpacks there need not be copied;
    None where Windows' paths would be too long for that. UserError where they are too long anyhow."""
    unpacked = len("/pip-target-12345678/lib/python/") + _LONGEST
    inside = folder / "t"
    if system != "win32":
        return inside
    # python-real.exe is not marked as fit for long paths, whatever Windows is set to.
    if max(len(str(inside)) + unpacked, len(str(_packages(folder))) + 1 + _LONGEST) <= _WINDOWS_PATH:
        return inside
    for path, more in ((_packages(folder), 1 + _LONGEST), (Path(tempfile.gettempdir()), unpacked)):
        if len(str(path)) + more > _WINDOWS_PATH:
            text = f"The path {path} is too long for PyTorch's files, of which Windows takes {_WINDOWS_PATH} characters"
            raise UserError(f"{text}; set {'TEMP' if more == unpacked else 'UNETSEG_ENVIRONMENT'} to a short folder such as C:\\unetseg.")
    return None


def _check_disk(folder: Path, variant: str, freed: int) -> None:
    place = next((p for p in (folder, *folder.parents) if p.is_dir()), Path.cwd())
    free, need = shutil.disk_usage(place).free + freed, TORCH_DISK[variant]
    if free < need:
        text = f"PyTorch ({variant}) needs {megabytes(need)} while it is installed and {place} has {megabytes(free)} free"
        raise UserError(f"{text}; free some space or set UNETSEG_ENVIRONMENT to another disk.")


def _read_marker(folder: Path) -> dict[str, Any] | None:
    path = folder / _MARKER
    try:
        marker = json.loads(path.read_text("utf-8")) if not path.is_symlink() else None
    except (OSError, ValueError):
        return None
    return marker if isinstance(marker, dict) and marker.get("made_by") == "UNetSegmentation" else None


def _write_marker(folder: Path, marker: Mapping[str, Any]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / (_MARKER + ".new")
        temporary.write_text(json.dumps(marker, indent=1), "utf-8")
        move_file(temporary, folder / _MARKER)
    except OSError as e:
        raise UserError(f"The folder {folder} cannot be written ({e.strerror or e}); set UNETSEG_ENVIRONMENT to another.") from e


@cache
def _this_process() -> list[Any]:
    return [this_computer(), os.getpid(), process_mark(os.getpid())]


def _is_made_by_another(marker: Mapping[str, Any]) -> bool:
    """Whether a Slicer that is not this one fills the environment, or pip, which goes on when its Slicer has crashed."""
    makers = [m for m in marker.get("makers") or () if is_this_computer(m[0])]
    return _this_process() not in makers and any(m[2] and process_mark(m[1]) == m[2] for m in makers)


def _free_environment(folder: Path) -> OwnEnvironment:
    """own_environment(), which nobody else makes just now."""
    own = own_environment(folder)
    if own.status == "busy":
        raise UserError(own.reason)
    return own


def _sign(folder: Path) -> None:
    """In pip's process: who makes the environment, beside the one that has started it."""
    marker = _read_marker(folder) or {}
    if marker.get("state") == "making":
        _write_marker(folder, {**marker, "makers": [*marker.get("makers", ()), _this_process()]})


def _must_be_ours(folder: Path) -> None:
    whole = Path(os.path.abspath(folder))
    inside = [Path.home(), Path(__file__).resolve(), Path(sys.prefix).resolve()]
    reason = own_environment(folder).reason if _read_marker(folder) is None else ""
    if folder.is_symlink():
        reason = "it is a link"
    elif whole.parent == whole or any(whole.resolve() in (p, *p.parents) for p in inside):
        reason = "it holds other things"
    if reason:
        raise UserError(f"The folder {folder} is not removed: {reason}; remove it by hand if you are sure.")


def _verify(folder: Path, training: bool = False) -> dict[str, Any]:
    """In the child: that everything is really taken from the environment and loads."""
    activate()
    import importlib

    more = ("scipy", "pydantic", "yaml", "matplotlib", "jinja2", "lightning", "monai") if training else ()
    for name in ("numpy", "SimpleITK", "onnxruntime", "onnx", "safetensors", "torch", *more):
        module = importlib.import_module(name)
        if _packages(folder).resolve() not in Path(module.__file__ or "").resolve().parents:
            raise ImportError(f"{name} comes from {module.__file__}")
    torch = importlib.import_module("torch")
    if torch.cuda.is_available():
        device = str(torch.cuda.get_device_name(0))
    else:
        device = "Apple GPU" if torch.backends.mps.is_available() else "CPU"
    float(torch.ones(2, 2).matmul(torch.ones(2, 2)).sum())
    files = (os.path.join(top, name) for top, _, names in os.walk(folder) for name in names)
    size = sum(os.stat(f, follow_symlinks=False).st_size for f in files)
    return {"torch": str(torch.__version__), "device": device, "size": size}


def main(arguments: Sequence[str]) -> int:
    """What the Steps run. The first line is the process id, the last the answer."""
    print(json.dumps({"pid": os.getpid()}), flush=True)
    task, *rest = unescape_arguments(arguments)
    if task == "pip":
        import runpy

        _sign(Path(rest[rest.index("--target") + 1]).parent)
        sys.argv = ["pip", *rest]
        runpy.run_module("pip", run_name="__main__", alter_sys=True)
        return 0
    try:
        if task == "plan":
            answer = _plan(json.loads(rest[0]))
        elif task == "verify":
            answer = _verify(Path(rest[0]), "training" in rest[1:])
        elif task == "remove":
            remove(Path(rest[0]))
            answer = {}
        else:
            raise ValueError(f"no task {task!r}")
    except Exception as e:
        print(f"{type(e).__name__}: {e}" if not isinstance(e, ImportError) else e, file=sys.stderr)
        return 1
    print(json.dumps(answer), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

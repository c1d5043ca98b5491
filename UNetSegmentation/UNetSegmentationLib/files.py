"""Sentences for the person, and files that are whole or not there. Without numpy and SimpleITK, which take 0.2 s to import."""

from __future__ import annotations

import glob
import os
import re
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


_UMASK = _umask()  # asked for once: two threads that ask at the same time would leave it at 0


# What ITK, the engines and the system say. Not "allocate" alone: it is looked for in sentences that hold the names of files.
OUT_OF_MEMORY = re.compile(
    r"bad.?alloc|alloc_?failed|failed memory allocation|(failed|unable|could not|cannot|can't|tried) (to )?allocate"
    r"|(out of|not enough) memory|memory is full"
    r"|paging file is too small|WinError 1455|error code: <1455>",  # the first in the system's language
    re.I,
)


class UserError(Exception):
    """Bad input: the message is one clear sentence for the person, saying what is wrong and what to do."""


def counted(n: int, what: str) -> str:
    return f"{n} {what}{'s' * (n != 1)}"


def user_path(name: str | Path) -> Path:
    """A path whose ~ is the person's folder. Where it is nobody's (~backup.nii), it is part of the name: Path.expanduser() raises a
    RuntimeError, and on Windows os.path.expanduser() makes another person's folder of it, whether there is one or not."""
    return Path(name if os.name == "nt" and str(name)[1:2] not in ("", "/", "\\") else os.path.expanduser(name))


def expand_arguments(arguments: Iterable[str]) -> list[str]:
    """A command line's arguments as a shell would give them: Windows leaves *, ~ and variables to the program. Not by typer, to which
    scan[1].nii.gz, as a browser names a second download, is scan1.nii.gz where that lies beside it."""

    def found(argument: str) -> list[str]:
        if os.name != "nt" or argument.startswith("-"):
            return [argument]
        name = os.path.expandvars(str(user_path(argument)) if argument.startswith("~") else argument)
        return (sorted(glob.glob(name.replace("[", "[[]"), recursive=True)) if set(name) & set("*?") else []) or [name]

    return [name for argument in arguments for name in found(argument)]


def is_inner(path: str) -> bool:
    """Whether a path read from a file of others is a relative one that stays in its folder, on any system: an absolute one takes the
    folder's place in pathlib, and of \\\\host\\share Windows logs in to that host."""
    return not any(p.anchor or ".." in p.parts for p in (PurePosixPath(path), PureWindowsPath(path)))


def is_within(path: Path, folder: Path) -> bool:
    """Whether a path below a folder leads there through no link: in a shared folder anybody may make one, to a person's own files. The
    folder itself may be one."""
    return Path(os.path.realpath(path)) == Path(os.path.realpath(folder), path.relative_to(folder))


def child_options(apart: bool = False, breakaway: bool = False) -> dict[str, Any]:
    """For subprocess: a child that opens no window over Slicer, nor do its own children.

    apart: in a session (Windows: process group) of its own. breakaway: on Windows also out of the job that this process may be
    in and that would end it; PermissionError where the job does not allow that.
    """
    if os.name != "nt":
        return {"start_new_session": apart}
    # CREATE_NO_WINDOW, a console that nobody sees and that its children inherit. Under DETACHED_PROCESS, beside which it is
    # ignored, there is none, and each child that is a console program gets a window of its own.
    # CREATE_NEW_PROCESS_GROUP, CREATE_BREAKAWAY_FROM_JOB
    return {"creationflags": 0x08000000 | apart * 0x00000200 | breakaway * 0x01000000}


def stand_back(by: int = 10) -> None:
    """Give this process, and what it starts, a lower priority: what the person does meanwhile comes first. by: of nice."""
    if sys.platform == "win32":
        import ctypes

        ctypes.WinDLL("kernel32").SetPriorityClass(ctypes.c_void_p(-1), 0x4000)  # this process, BELOW_NORMAL_PRIORITY_CLASS
    else:
        os.nice(by)


def process_mark(pid: int) -> str | None:
    """What tells a process of this computer from a later one of the same id: when it began. None: it is not there, "": that
    cannot be found out."""
    if pid <= 0:
        return None
    if sys.platform == "win32":
        return _windows_mark(pid)
    stat = Path(f"/proc/{pid}/stat")
    if Path("/proc/self/stat").exists():
        try:
            # The name, in brackets, may hold anything.
            state, *rest = stat.read_text("utf-8", errors="replace").rpartition(")")[2].split()
            boot = Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
        except (FileNotFoundError, ProcessLookupError):
            return None
        except (OSError, ValueError):
            return ""
        return None if state in "ZX" else f"{boot} {rest[18]}"
    try:
        # It began at the same time for who has another language or, as after a journey, time zone.
        variables = {**os.environ, "LC_ALL": "C", "TZ": "UTC"}
        ps = ["ps", "-o", "stat=,lstart=", "-p", str(pid)]
        done = subprocess.run(ps, capture_output=True, text=True, timeout=5, env=variables, **child_options())
    except (OSError, subprocess.SubprocessError):
        return ""
    state, _, began = done.stdout.strip().partition(" ")
    return None if not state or state.startswith("Z") else began.strip()


def _windows_mark(pid: int) -> str | None:
    import ctypes

    kernel: Any = ctypes.WinDLL("kernel32", use_last_error=True)  # type: ignore[attr-defined]
    kernel.OpenProcess.restype = ctypes.c_void_p
    handle = kernel.OpenProcess(0x1000, False, pid)  # PROCESS_QUERY_LIMITED_INFORMATION
    if not handle:
        return None if ctypes.get_last_error() == 87 else ""  # type: ignore[attr-defined]  # ERROR_INVALID_PARAMETER: no such process
    try:
        code, times = ctypes.c_ulong(), [ctypes.c_ulonglong() for _ in range(4)]
        if kernel.GetExitCodeProcess(ctypes.c_void_p(handle), ctypes.byref(code)) and code.value != 259:  # STILL_ACTIVE
            return None
        if not kernel.GetProcessTimes(ctypes.c_void_p(handle), *map(ctypes.byref, times)):
            return ""
        return str(times[0].value)
    finally:
        kernel.CloseHandle(ctypes.c_void_p(handle))


def this_computer() -> str:
    """What tells this computer from others, and is the same later: macOS' host name follows the network (DHCP, VPN), the id of its
    hardware does not."""
    if sys.platform == "darwin":
        import ctypes

        found, wait = (ctypes.c_ubyte * 16)(), (ctypes.c_long * 2)(1, 0)
        with suppress(OSError, AttributeError):
            if ctypes.CDLL(None).gethostuuid(found, wait) == 0:
                return bytes(found).hex()
    return socket.gethostname()


def is_this_computer(name: Any) -> bool:
    """Of this_computer(), or of an earlier version, which took the host name."""
    return name in (this_computer(), socket.gethostname())


def time_of(folder: Path, token: str = secrets.token_hex(8)) -> float:
    """Seconds since 1970 by the folder's clock, that of a file made there now: the clocks of two computers may be minutes apart. token:
    no other process's; where Windows holds that file, the next look removes it."""
    clock = folder / f".clock-{token}"
    try:
        clock.touch()
        return clock.stat().st_mtime
    finally:
        with suppress(OSError):
            clock.unlink(missing_ok=True)


# A training's states as long as its process is there, and seconds: for that to say its id (a cold disk, a virus scanner), and after which
# one on another computer, whose processes cannot be seen from here, is given up.
RUNNING, START_S, SILENT_S = ("preparing", "training", "checking"), 180.0, 300.0


def is_alive(sign: Path, job: Mapping[str, Any], ended: bool = False) -> bool:
    """Whether a training's process is there. sign: the file that it touches; job: of job.json; ended: a process that we started for it
    is over, which may be a launcher's."""
    pid, launched = job.get("pid"), float(job.get("launched") or 0)  # by the folder's clock
    if pid is None:
        return not ended and now_in(sign.parent) - launched < START_S
    if is_this_computer(job.get("host")):
        mark = process_mark(int(pid))
        if mark is None:
            return False
        if mark and job.get("mark"):
            return mark == job["mark"]
    try:
        last = sign.stat().st_mtime
    except OSError:
        last = launched
    return now_in(sign.parent) - last < SILENT_S


def now_in(folder: Path, *token: str) -> float:
    """time_of(), or this computer's clock."""
    try:
        return time_of(folder, *token)
    except OSError:  # nothing may be written there, so that only this computer's clock is left
        return time.time()


_ESCAPED = "escaped:"


def escape_arguments(arguments: Iterable[str]) -> list[str]:
    """A child's arguments in ASCII, for unescape_arguments() there. Of all else PythonSlicer's launcher makes "?" on Windows, so that
    the folders of a user Jörg were not found, and on Linux and macOS it writes beyond the memory of its copy."""
    return [a if a.isascii() and not a.startswith(_ESCAPED) else _ESCAPED + a.encode("unicode_escape").decode("ascii") for a in arguments]


def unescape_arguments(arguments: Iterable[str]) -> list[str]:
    return [a.removeprefix(_ESCAPED).encode("ascii").decode("unicode_escape") if a.startswith(_ESCAPED) else a for a in arguments]


def _target(path: str | Path) -> Path:
    """What a name stands for: as other programs do, we write to the file that a link leads to and leave the link. But one that another
    made, as in a shared folder, gives way where it leads to what is not his: it may be a file that only we may write to."""
    path = user_path(path)
    if not os.path.islink(path):
        return path
    real = Path(os.path.realpath(path))
    at, maker = real if real.exists() else real.parent, os.lstat(path).st_uid
    mine = os.name == "nt" or maker == os.geteuid() or (at.exists() and maker == at.stat().st_uid)
    return real if mine else path


def _new_beside(target: Path) -> Path:
    """An empty file under a name of its own in the target's folder.

    Not by tempfile, which on Windows takes a folder that may not be written to for one where the name is taken, and up to Python
    3.12 tries two billion others.
    """
    # ITK knows its formats by suffixes in lower case, and would write X.MHA beside the name that it was given. The name's
    # end is enough: a name that just fits (255 bytes, on Windows 259 characters of the path) would not fit any more.
    path = target.absolute().parent / f".unetseg-{os.urandom(4).hex()}-{target.name.lower()[-16:]}"
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    return path


# As Excel holds a table on Windows: nobody else may write to it, nor put another in its place.
_HELD = "cannot be written, as it may be open in another program; close it there, or check your rights"


def check_writable(path: str | Path) -> None:
    """Refuse a name that could not be written to, before the person waits for a result. Leaves no trace."""
    target = _target(path)
    place = target.absolute().parent
    try:
        while not place.exists() and place != place.parent:
            place = place.parent
        bad = target.is_dir() or not place.is_dir() or not os.access(place, os.W_OK) or (target.exists() and not os.access(target, os.W_OK))
        if not bad and place == target.absolute().parent:  # by trying it: Windows' access rights say too little
            probe = _new_beside(target)
            with suppress(OSError):
                probe.unlink()
    except OSError:  # a folder that may not even be looked into, or a name that is too long
        bad = True
    if bad:
        raise UserError(f"{path} cannot be written; choose a file name in a folder that you may write to.")
    try:
        if target.is_file():  # not a pipe or a device
            target.open("r+b").close()  # changes nothing
    except OSError as e:
        raise UserError(f"{path} {_HELD}.") from e


def check_text(path: str | Path) -> None:
    """Refuse a name over which ITK would end the whole process: on Linux one may hold bytes that are no UTF-8."""
    try:
        str(path).encode("utf-8")
    except UnicodeEncodeError:
        shown = str(path).encode("utf-8", "replace").decode("utf-8")
        raise UserError(f"{shown} has a name that is not UTF-8, as those of old archives; rename it.") from None


def move_file(path: Path, to: Path, patience: float = 1.0) -> None:
    """os.replace(), also of a folder, which on Windows fails while another program reads one of the files or looks it over: that is
    waited for, `patience` seconds."""
    _patiently(lambda: path.replace(to), patience)


def remove_file(path: Path, patience: float = 1.0) -> None:
    """A file, where it is there; as move_file() does."""
    _patiently(lambda: path.unlink(missing_ok=True), patience)


def _patiently(act: Callable[[], Any], patience: float) -> None:
    until = time.monotonic() + patience
    while True:
        try:
            act()
            return
        except PermissionError:
            if os.name != "nt" or time.monotonic() > until:
                raise
            time.sleep(0.05)


@contextmanager
def atomic_path(path: str | Path, patience: float = 1.0) -> Iterator[Path]:
    """A temporary name beside `path`, moved to it only when the block ends well, so that no half file is ever left. patience: of
    move_file()."""
    target = _target(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = _new_beside(target)
    except OSError as e:
        raise UserError(f"{path} cannot be written ({e.strerror or e}); choose a folder that you may write to.") from e
    try:
        yield temporary
        with suppress(OSError):  # some network shares know no rights
            temporary.chmod(target.stat().st_mode & 0o777 | 0o200 if target.exists() else 0o666 & ~_UMASK)
        move_file(temporary, target, patience)
    except OSError as e:
        held = isinstance(e, PermissionError) and os.path.isfile(target)
        why = _HELD if held else f"cannot be written ({e.strerror or e}); check the disk's space and your rights"
        raise UserError(f"{path} {why}.") from e
    finally:
        with suppress(OSError):  # a share that is lost, or what Windows holds: what is raised already says it
            remove_file(temporary, patience)


def write_text(path: str | Path, text: str, encoding: str = "utf-8") -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding)

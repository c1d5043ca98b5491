"""The work list: scans segmented in advance and corrected one by one, those where annotation helps most first.

    worklist.json    the list: each scan's files, status, scores, who has it
    worklist/NAME/   what the model found in a scan (.seg.nrrd), until that is segmented again

A list may lie in a dataset's folder or in one of its own, also on the network: it is replaced as a whole under a lock, as the
dataset's index is, and a scan is taken by one annotator at a time, until he is done, gives it back, or his time is over. Time is
the folder's (that of a file made there now), so that the clocks of two computers do not matter. Unlike the dataset a list is not
anonymous: it names the scans' files.

The order: a scan's value is the predictive entropy (and what members of an ensemble or flipped copies disagree on) around the
surface that the model drew. Alone it would bring ten scans of one kind; so each next scan is also far from all that were chosen
before, by greedy k-center on a small description of image and prediction (Sener and Savarese, "Active learning for convolutional
neural networks: a core-set approach", ICLR 2018), here weighted by the value's rank.
"""

from __future__ import annotations

import errno
import getpass
import hashlib
import json
import math
import os
import re
import secrets
import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import numpy as np

from .dataset import CASES, INDEX, SALT, FolderLock, LockLost, Unchanged, commit, flush, process_is_gone, reached, read_shared
from .files import OUT_OF_MEMORY, UserError, atomic_path, check_text, is_inner, is_within, now_in, this_computer, user_path
from .image import NO_SCAN, PICTURE_SUFFIXES, VOLUME_SUFFIXES, Box, Image, SeveralSeries, is_dicom, read_image, reorient
from .inference.predict import Cancelled, Options, Prediction, Progress, predict
from .model import Label, ModelPackage, check_together
from .output import write_segmentation
from .postprocess import components
from .training import FOLDER as RETRAININGS

T = TypeVar("T")

LIST, RESULTS, LIST_LOCK = "worklist.json", "worklist", ".worklist.lock"
FORMAT = "unetseg-worklist"
STATUSES = ("waiting", "segmented", "taken", "done", "skipped", "failed")
# Seconds that a scan stays taken without a sign of life: of a program that renews it, and from the command line.
LEASE, LONG_LEASE = 30 * 60.0, 12 * 3600.0
# What lies beside scans and is none; gt ends a name (ACDC's), as GT_012 may be a patient.
_NO_SCAN = re.compile(r"(^|[-_.])(((d|prob)?seg|segs|segmentations?|labels?(tr|ts|va|map)?|masks?)([-_.]|$)|gt$)", re.I)
# Folders: also what was deleted on Windows' drives ($RECYCLE.BIN) and network storage (@Recycle, #recycle; but #12 may be a patient).
_HIDDEN = re.compile(r"[.$@]|#(recycle|snapshot)$|System Volume Information$", re.I)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # of _free_name()
_CHANNEL = re.compile(r"(.+)_(\d{4})$")
_MODALITY = re.compile(rb"\x08\x00\x60\x00(?:CS..|..\0\0)([A-Z]+)", re.S)  # in a DICOM file, with and without the value's type
_DIRECTORY = b"1.2.840.10008.1.3.10"  # the SOP class of a DICOMDIR
_GONE = (None, errno.ENOENT, errno.ENOTDIR)  # of a file that is gone for everybody

# Files that are one scan's channels: more are a film's pictures, or what a shell makes of ct_*.nii.gz.
CHANNELS = 4

# Two voxels on both sides of the surface count, and wherever else the model is undecided.
_BAND, _UNDECIDED, _FEWEST = 2, 0.5, 27
_MOST = 1 << 22  # voxels looked at; of a larger part every second, third, ... along its longest axes
_PARTS = 3  # of each axis, in the description's coarse pictures


# ---------------------------------------------------------------------------------------------------------------- scans


@dataclass(frozen=True)
class Scan:
    """One scan of a list. listed: an image file or DICOM folder, several for several channels; series: the UID where a folder
    holds several. status: of STATUSES; by: who has it, or did it, where he gave a name; until: seconds from now for which it is
    taken. mask: what `model` found in it, of which its files are the `channels`. error: why it failed, one sentence. case: its name in
    the dataset. known: whether add() would know it in another place."""

    name: str
    listed: tuple[Path, ...]
    series: str | None = None
    status: str = "waiting"
    by: str = ""
    until: float = 0.0
    mask: Path | None = None
    model: str = ""
    scores: dict[str, float] | None = None
    error: str = ""
    case: str = ""
    channels: tuple[str, ...] = ()
    known: bool = False

    @cached_property
    def files(self) -> tuple[Path, ...]:
        """As they are called here. Looked up when they are asked for: a list may hold thousands, on a slow share."""
        return tuple(map(_present, self.listed))

    @property
    def away(self) -> Path | None:
        """A folder of its files that is not there from this computer, the topmost: of a drive or share that is not connected, which may
        leave an empty folder. A file that is gone from a folder with others is no such case."""

        def empty(folder: Path, denied: bool) -> bool:
            try:
                return not os.listdir(folder)
            except PermissionError:
                return denied
            except OSError:
                return True

        folder = next((f.parent for f in self.files if not os.path.exists(f) and empty(f.parent, True)), None)
        while folder is not None and folder != folder.parent and empty(folder.parent, False):  # of a denied one others may be there
            folder = folder.parent
        return folder


@dataclass(frozen=True)
class Annotator:
    """Who takes scans. who: the same for all of this person's programs on this computer; name: shown to the others, if wished;
    pid: a program on this computer that gives its scans back when it ends (0: the command line, which ends at once)."""

    who: str
    name: str = ""
    host: str = ""
    pid: int = 0
    lease: float = LONG_LEASE

    @classmethod
    def here(cls, name: str = "", pid: int = 0) -> Annotator:
        try:
            user = getpass.getuser()
        except (OSError, KeyError, ImportError):  # no such user in this container
            user = ""
        who = hashlib.sha256(f"{user}@{this_computer()}".encode()).hexdigest()[:12]
        return cls(who, name.strip(), this_computer(), pid, LEASE if pid else LONG_LEASE)

    def owns(self, claim: dict[str, Any]) -> bool:
        """At the command line a name tells apart who share an account; in a program it may be changed meanwhile."""
        if claim.get("who") != self.who or claim.get("pid", 0) != self.pid:
            return False
        return bool(self.pid) or not self.name or claim.get("name") in (None, "", self.name)


def find_scans(
    sources: Iterable[str | Path], apart: Path | None = None, left_out: list[str] | None = None, channels: int = CHANNELS
) -> list[tuple[Path, ...]]:
    """The scans that files, folders and lists name, each as the files of its channels.

    A folder: all images (.nii.gz, .nii, .nrrd, .mha) and DICOM folders below it, sorted by name; files whose name says mask, label
    or seg are none, nor is what a training set keeps or a recycle bin, or a DICOM folder without images. Pictures (.png, .tif, .jpg,
    ...) are scans where there are no others, which they might illustrate. There, and of files that are named themselves, X_0000,
    X_0001, ... are the channels of X. A .txt or .csv: a scan on each line, its channels separated by commas, tabs or, where no file has
    that name, semicolons. apart: a folder to leave out (the list's own).
    left_out: gets a sentence on each scan in a folder whose name no list can hold; None: that is a UserError too, as is what is not
    there, or one such scan that was named itself.
    channels: the most that a scan of named files has; of more each is a scan.
    """
    out: dict[tuple[Path, ...], None] = {}
    named: dict[Path, None] = {}
    for source in sources:
        path = _plain(user_path(source))
        if not path.exists():
            raise UserError(f"{path} does not exist; check the name.")
        if path.is_file() and path.suffix.lower() in (".txt", ".csv"):
            try:
                text = path.read_bytes()
                lines = text.decode("utf-16" if text[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig").splitlines()
            except (OSError, UnicodeDecodeError) as e:
                raise UserError(f"{path} cannot be read as a list of scans; save it as UTF-8 text with one scan on each line.") from e
            for number, line in enumerate(lines, 1):
                if line.strip() and not line.lstrip().startswith("#"):
                    files, excels = (
                        tuple(_plain(path.parent / part.strip().strip('"')) for part in re.split(separator, line) if part.strip())
                        for separator in (r"[,\t]", ";")  # a name may hold the second, which Excel writes where numbers have commas
                    )
                    missing = next((file for file in files if not os.path.exists(file)), None)  # False also of what is too long for a name
                    if missing and not all(map(os.path.exists, excels)):
                        raise UserError(f"{path}, line {number}: {missing} does not exist; correct the line or remove it.")
                    if found := excels if missing else files:  # neither, where Excel left an empty row
                        out[found] = None
        elif path.is_dir():
            leave = apart and _plain(apart)
            for files in list(_below(path, leave, VOLUME_SUFFIXES)) or _below(path, leave, PICTURE_SUFFIXES):
                try:
                    for file in files:
                        check_text(file)
                    out[files] = None
                except UserError as e:  # one of many is no reason to refuse the others
                    if left_out is None:
                        raise
                    left_out.append(str(e))
        else:
            named[path] = None
    out |= dict.fromkeys(_grouped(named, channels))
    for file in (file for files in out for file in files):
        check_text(file)
    return list(out)


def _plain(path: Path) -> Path:
    """Without `..`, by which a scan would be another one."""
    return Path(os.path.normpath(path.absolute()))


def _present(path: Path) -> Path:
    """The path, or one whose names are there in Unicode's other form: a Mac lists those of a share with ü as u and its dots (NFD), others
    as they are stored, mostly as one letter (NFC)."""
    if str(path).isascii() or path == path.parent or os.path.exists(path):
        return path
    folder = _present(path.parent)
    names = (unicodedata.normalize(form, path.name) for form in ("NFC", "NFD"))
    return next((folder / name for name in names if os.path.exists(folder / name)), folder / path.name)


def _below(folder: Path, apart: Path | None, suffixes: Sequence[str]) -> Iterator[tuple[Path, ...]]:
    with reached(folder):
        for place, folders, files in os.walk(folder):
            folders[:] = sorted(f for f in folders if not _HIDDEN.match(f) and not _NO_SCAN.search(f) and Path(place, f) != apart)
            if INDEX in files and SALT in files:
                folders[:] = [f for f in folders if f not in (CASES, RETRAININGS)]
            images, others = [], []
            for path in (Path(place, name) for name in sorted(files) if not name.startswith(".")):
                bare = _bare(path, suffixes)
                if bare is None:
                    others.append(path)
                elif not _NO_SCAN.search(bare):
                    images.append(path)
            yield from _grouped(images)
            if any(map(is_dicom, others[:8])) and any(is_dicom(path) and _may_show(path) for path in others):
                folders.clear()  # read_image() looks below
                yield (Path(place),)


def _grouped(files: Iterable[Path], most: float = math.inf) -> Iterator[tuple[Path, ...]]:
    """Files as scans, each with its channels, `most` or fewer."""
    groups: dict[tuple[Path, str], dict[Path, str]] = {}
    for file in files:
        bare = _bare(file)
        channel = _CHANNEL.fullmatch(bare or "")
        groups.setdefault((file.parent, channel[1] if channel else bare or file.name), {})[file] = channel[2] if channel else ""
    for group in groups.values():  # ct_0001, ct_0002 are scans
        channels = sorted(group.values()) == [f"{i:04d}" for i in range(len(group))]
        picture = next(iter(group)).name.lower().endswith(PICTURE_SUFFIXES)  # frame_0000, ... are a film's
        channels &= len(group) <= (min(most, CHANNELS) if picture else most)
        yield from [tuple(sorted(group))] if channels else [(file,) for file in group]


def _may_show(path: Path) -> bool:
    """Whether a DICOM file may be an image, or of a DICOMDIR, which tells of all series, lie beside some: ITK tells nothing of contours,
    plans and reports, not even that they are such."""
    with open(path, "rb") as file:
        head = file.read(4096)
    found = _MODALITY.search(head)
    return found is None or found[1].decode() not in NO_SCAN or _DIRECTORY in head


def left_alone(scan: Scan, error: BaseException, was_read: bool = False) -> str:
    """Why a scan could not be read or segmented here, where that is no fault of its own and may go well on another computer or with
    another's rights, so that it has not failed; else "". was_read: it failed after that, for which memory alone is no reason that
    the next scan has too."""
    if scan.away is not None:
        cure = "connect its drive or network folder" + ", or add its scans again from where they are now" * scan.known
        return f"{scan.away} is not there, so {scan.name} was left alone; {cure}."
    own = f"{error} {scan.name} was left alone." if isinstance(error, UserError) else ""
    causes = _causes(error)
    if any(isinstance(e, MemoryError) or OUT_OF_MEMORY.search(str(e)) for e in causes):
        # Of what ITK cannot hold read_image() says that the file may be damaged; an engine knows whose memory is full.
        return (was_read and own) or f"There is not enough memory here for {scan.name}, so it was left alone; close other programs."
    for e in () if was_read else (*causes, *map(_refusal, scan.files)):
        # A reader has EINVAL of a damaged file, in which it looks before the start. Of open() it is this computer's: Windows' C runtime
        # gives it for all that it does not know, as of a file that OneDrive cannot bring.
        if isinstance(e, OSError) and e.errno not in _GONE and not (e.errno == errno.EINVAL and e in causes):
            text = f"{scan.name} cannot be opened here ({e.strerror or e}), so it was left alone; check your rights, the disk's space and "
            return (e in causes and own) or text + "the connection."
    return ""


def _causes(error: BaseException) -> list[BaseException]:
    chain = [error]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    return chain


def _refusal(path: Path) -> OSError | None:
    """What keeps this person from opening a file, or those of a folder: ITK does not say it."""

    def fail(error: OSError) -> None:
        raise error

    try:
        alone: list[tuple[str, list[str], list[str]]] = [(str(path.parent), [], [path.name])]
        for place, _folders, names in os.walk(path, onerror=fail) if path.is_dir() else alone:
            for name in names:
                with open(Path(place, name), "rb") as file:
                    file.read(1)
    except OSError as e:
        return e
    return None


# ------------------------------------------------------------------------------------------------------------ work list


class WorkList:
    """A work list. Every read sees it as it is now; every change is one atomic replacement of it."""

    def __init__(self, folder: Path, data: dict[str, Any]) -> None:
        self.folder = folder
        self._data = data
        self.away: dict[str, str] = {}  # scans that segment() left alone, and why: see left_alone()
        self.left_out: list[str] = []  # scans that add() had to leave out, a sentence each
        self.moved: list[str] = []  # scans that add() found in another place
        self._clock = 0.0, 0.0  # seconds between the folder's clock and this computer's monotonic one, and when it was read

    @classmethod
    def create(cls, folder: str | Path) -> WorkList:
        """A new, empty list; the folder may exist and hold a dataset, but no list."""
        folder = user_path(folder).absolute()
        with reached(folder):
            folder.mkdir(parents=True, exist_ok=True)
            with FolderLock(folder, LIST_LOCK):
                if (folder / LIST).exists():
                    raise UserError(f"{folder} already holds a {LIST}; choose another folder, or open it.")
                _write(folder, {"format": FORMAT, "format_version": 1, "revision": 0, "models": [], "labels": {}, "scans": {}})
        return cls.open(folder)

    @classmethod
    def open(cls, folder: str | Path) -> WorkList:
        folder = user_path(folder).absolute()
        return cls(folder, _read(folder))

    @classmethod
    def there(cls, folder: str | Path) -> bool:
        return (user_path(folder) / LIST).is_file()

    @classmethod
    def gather(cls, folder: str | Path, sources: Sequence[str | Path], channels: int = CHANNELS) -> tuple[WorkList, list[str]]:
        """Add scans to the folder's list, which is made where there is none, but not without a scan; the list and their names. channels:
        of find_scans()."""
        new, made = not cls.there(folder), not user_path(folder).exists()
        work = cls.create(folder) if new else cls.open(folder)
        try:
            added = work.add(sources, channels)
            if new and not added:
                if work.left_out:
                    raise UserError(work.left_out[0])
                raise UserError("No scans were found there; choose image files, or a folder that holds images or DICOM series.")
        except UserError:
            if new:
                work.discard()
                if made:
                    with suppress(OSError):
                        work.folder.rmdir()
            raise
        return work, added

    def discard(self) -> None:
        """Undo create(), as long as nobody has added a scan."""
        with reached(self.folder), FolderLock(self.folder, LIST_LOCK):
            if not _read(self.folder)["scans"]:
                (self.folder / LIST).unlink()

    def refresh(self) -> WorkList:
        """Take in what others have done."""
        self._data = _read(self.folder)
        return self

    @property
    def models(self) -> tuple[str, ...]:
        """<name>-<version> of the models that segment in advance, first the one whose card says what becomes of their average."""
        return tuple(self._data["models"])

    @property
    def unsegmented(self) -> int:
        """Scans that the models are still to segment."""
        return sum(_to_segment(self._data, record) for record in self._data["scans"].values())

    @property
    def scans(self) -> dict[str, Scan]:
        """All scans, in the list's order, as refresh() found them."""
        now = self._now()
        return {name: self._scan(name, record, now) for name, record in self._data["scans"].items()}

    def scan(self, name: str) -> Scan:
        """One scan; UserError where there is none of this name."""
        return self._scan(name, self._record(self._data, name), self._now())

    def labels(self, model: str) -> tuple[Label, ...]:
        """What a model that has segmented scans of this list can find."""
        return tuple(map(Label.from_json, self._data["labels"].get(model, ())))

    def counts(self, scans: Mapping[str, Scan] | None = None) -> dict[str, int]:
        """Scans of each status; scans: those of `scans`, where they are at hand."""
        counts = Counter(scan.status for scan in (scans or self.scans).values())
        return {status: counts[status] for status in STATUSES}

    def ordered(self, limit: int | None = None) -> list[Scan]:
        """The scans to correct, the most useful first; those that are not segmented yet come after them, in the list's order."""
        scans = self.scans
        return [scans[name] for name in self._order(self._data, scans, limit)]

    def _order(self, data: dict[str, Any], scans: dict[str, Scan], limit: int | None = None) -> list[str]:
        """Names of the scans that are free, as ordered(). Skipped ones are neither offered nor covered by an annotation."""
        records = data["scans"]
        left = [n for n, s in scans.items() if s.status in ("waiting", "segmented")]
        known = [n for n, s in scans.items() if s.status in ("waiting", "segmented", "taken", "done") and records[n].get("embedding")]
        size = len(records[known[0]]["embedding"]) if known else 0
        known = [n for n in known if records[n].get("scores") and len(records[n]["embedding"]) == size]
        values = [records[n]["scores"]["value"] for n in known]
        points = np.array([records[n]["embedding"] for n in known], np.float32).reshape(len(known), size)
        gone = [i for i, n in enumerate(known) if scans[n].status in ("taken", "done")]
        ranked = set(known)
        return [*(known[i] for i in order(values, points, gone, limit)), *(n for n in left if n not in ranked)][:limit]

    def _scan(self, name: str, record: dict[str, Any], now: float) -> Scan:
        claim = record.get("claim")
        status, by, until = record["status"], record.get("by", ""), 0.0
        if claim and claim["for"] == "correct" and status not in ("done", "skipped") and _lives(claim, now):
            status, by, until = "taken", claim.get("name", ""), claim["until"] - now
        mask = record.get("mask")
        return Scan(
            name,
            tuple(Path(os.path.normpath(self.folder / file)) for file in record["files"]),
            record.get("series"),
            status,
            by,
            until,
            self.folder / mask if mask else None,
            record.get("model", ""),
            record.get("scores"),
            record.get("error", ""),
            record.get("case", ""),
            tuple(record.get("channels", ())),
            bool(record.get("print")),
        )

    def _now(self) -> float:
        """Seconds since 1970 by the folder's clock, looked at once a minute."""
        here = time.monotonic()
        if not self._clock[1] or here - self._clock[1] > 60:
            self._clock = now_in(self.folder, secrets.token_hex(4)) - here, here
        return here + self._clock[0]

    # ---------------------------------------------------------------------------------------------------------- change

    def add(self, sources: Iterable[str | Path], channels: int = CHANNELS) -> list[str]:
        """Add scans, as find_scans() finds them, that are not there yet or failed, perhaps as they were still being copied; returns their
        names. channels: of find_scans(). left_out: what it could not add; moved: what is there already and has another place now, where
        its status, mask and case stay its own."""
        self.left_out = []
        found = find_scans(sources, self.folder / RESULTS, self.left_out, channels)
        records = self.refresh()._data["scans"]

        def key(files: Iterable[str | Path]) -> tuple[str, ...]:  # see _present(); to Windows A is a
            return tuple(os.path.normcase(unicodedata.normalize("NFC", self._stored(self.folder / f))) for f in files)

        known = {key(r["files"]): "print" in r for r in records.values()}
        prints = {files: _print(files) for files in found if key(files) not in known}
        late = {key(files): _print(files) for files in found if not known.get(key(files), True)}  # of a list from before there were any
        places = Counter(filter(None, prints.values()))
        # Of a print the former places, each with its scans: several where those are a folder's series.
        gone: dict[str, dict[tuple[str, ...], list[str]]] = {}
        for name in [n for n, r in records.items() if places.get(r.get("print")) == 1]:
            scan = self.scan(name)
            if scan.status != "taken" and not any(map(os.path.exists, scan.files)) and not _unconnected(scan.away):
                gone.setdefault(records[name]["print"], {}).setdefault(tuple(records[name]["files"]), []).append(name)

        def enter(data: dict[str, Any]) -> list[str]:
            self.moved = []
            for files, mark in prints.items():
                for former, names in gone[mark].items() if len(gone.get(mark, ())) == 1 else ():
                    self.moved += (still := [n for n in names if data["scans"].get(n, {}).get("files") == list(former)])
                    for name in still:
                        data["scans"][name]["files"] = [*map(self._stored, files)]
            there = {key(r["files"]) for r in data["scans"].values()}
            # Channels that are scans of their own, as a list from before has them, are no other scan, unless they failed as such.
            whole = {key(r["files"]) for r in data["scans"].values() if r["status"] != "failed"}
            wanted = set(map(key, found))
            new = [name for name, r in data["scans"].items() if r["status"] == "failed" and key(r["files"]) in wanted]
            for name in new:
                _try_again(data["scans"][name])
            for record in data["scans"].values():
                if seen := late.get(key(record["files"])):
                    record["print"] = seen
            for files in found:
                if key(files) in there or all((file,) in whole for file in key(files)):
                    continue
                there.add(key(files))
                name = _free_name(_stem(files[0]), data["scans"])
                data["scans"][name] = {"files": [*map(self._stored, files)], "status": "waiting", "print": prints.get(files, "")}
                new.append(name)
            return new

        return self._commit(enter)

    def _stored(self, path: Path) -> str:
        """Relative to the list where the scan lies below or beside it, so that a network folder may have another name elsewhere. Below
        the root lies everything, below a drive or share what is on it."""
        path, folder = _plain(path), _plain(self.folder)
        for base, up in ((folder, ""), (folder.parent, "../")):
            if path.is_relative_to(base) and (base.drive or base != base.parent):
                return up + path.relative_to(base).as_posix()
        return path.as_posix()

    def choose_models(self, models: Sequence[ModelPackage]) -> int:
        """Segment with these from now on: scans that others segmented are done again. Failed ones are tried again too. Returns how
        many scans there are to segment."""
        check_models(models)
        names = [f"{m.card.name}-{m.card.version}" for m in models]

        def choose(data: dict[str, Any]) -> int:
            data["models"] = names
            for record in data["scans"].values():
                if record["status"] == "failed":
                    _try_again(record)
            return sum(_to_segment(data, record) for record in data["scans"].values())

        return self._commit(choose)

    def next(self, me: Annotator, leave: str = "", passed: Sequence[str] = ()) -> Scan | None:
        """Take the most useful scan that nobody has; None where there is none. What was mine when my program was killed comes first.

        leave: my scan, which I give back. passed: scans that I gave back and want last.
        """

        def take(data: dict[str, Any]) -> Scan | None:
            now = self._now()
            if leave in data["scans"] and me.owns(data["scans"][leave].get("claim") or {}):
                del data["scans"][leave]["claim"]
            scans = {n: self._scan(n, r, now) for n, r in data["scans"].items()}
            late = {leave, *passed} - {""}
            left = (n for n in scans if n not in late and scans[n].status not in ("done", "skipped"))
            mine = [n for n in left if self._is_mine(data["scans"][n], me, now)]
            mine.sort(key=lambda n: scans[n].by != me.name)  # without a name also what was taken by one, which it keeps
            wanted = mine or self._order(data, scans, len(late) + 1)
            wanted = [n for n in wanted if n not in late] or [n for n in passed if n in wanted] or wanted
            if not wanted:
                return None
            record = data["scans"][wanted[0]]
            name = me.name or (scans[wanted[0]].by if wanted[0] in mine and not me.pid else "")
            record["claim"] = self._claim(replace(me, name=name), now, "correct")
            return self._scan(wanted[0], record, now)

        return self._commit(take)

    def _is_mine(self, record: dict[str, Any], me: Annotator, now: float) -> bool:
        """Whether a scan was taken by me from the command line, or by a program of mine that is gone."""
        claim = record.get("claim") or {}
        if claim.get("for") != "correct" or claim.get("who") != me.who or claim["until"] < now:
            return False
        return me.owns(claim) or process_is_gone(claim)

    def _claim(self, me: Annotator, now: float, purpose: str) -> dict[str, Any]:
        return {"for": purpose, "who": me.who, "name": me.name, "host": me.host, "pid": me.pid, "until": _until(now, me)}

    def fail(self, name: str, why: str) -> None:
        """A scan that cannot be read, by which whoever comes next is not to be held up."""

        def enter(data: dict[str, Any]) -> None:
            record = self._record(data, name)
            record.pop("claim", None)
            record |= {"status": "failed", "error": why}

        self._commit(enter)

    def renew(self, me: Annotator) -> None:
        """A sign of life for all that I have taken."""

        def later(data: dict[str, Any]) -> None:
            until = _until(self._now(), me)
            mine = [r["claim"] for r in data["scans"].values() if me.owns(r.get("claim") or {})]
            if not mine:
                raise Unchanged
            for claim in mine:
                claim["until"] = until

        self._commit(later)

    def done(self, name: str, me: Annotator, case: str = "") -> str:
        """The scan is corrected; case: its name in the dataset. Returns a sentence where another was at it too, else ""."""
        return self._end(name, me, "done", case)

    def skip(self, name: str, me: Annotator) -> str:
        """Nobody is to correct this scan."""
        return self._end(name, me, "skipped", "")

    def _end(self, name: str, me: Annotator, status: str, case: str) -> str:
        def end(data: dict[str, Any]) -> str:
            record = self._record(data, name)
            claim, note = record.get("claim") or {}, ""
            if claim.get("for") == "correct" and not me.owns(claim) and _lives(claim, self._now()):
                over = ", as your time for it was over" * (claim.get("who") != me.who)
                note = f"{name} was taken by {claim.get('name') or 'another annotator'} too{over}."
            else:
                record.pop("claim", None)
            if record["status"] == "done":
                already = f"{name} was already done" + (f" by {record['by']}" if record.get("by") else "")
                if status != "done":
                    return f"{already}, and stays so."
                note = f"{already}; the dataset keeps both versions." if case and record.get("case") else f"{already}."
            record["status"] = status
            record |= {k: v for k, v in (("case", case), ("by", me.name)) if v}
            return note

        return self._commit(end)

    def back(self, name: str, me: Annotator | None = None) -> None:
        """Give a scan back: one that I have taken (me), or, whoever has, skipped or did it, so that it is offered again."""

        def free(data: dict[str, Any]) -> None:
            record = self._record(data, name)
            if me is not None and not me.owns(record.get("claim") or {}):
                raise Unchanged
            record.pop("claim", None)
            if me is None:
                _try_again(record)

        self._commit(free)

    def split(self, name: str, series: Sequence[str]) -> None:
        """A scan whose folder turned out to hold several series, as it was last seen here, becomes a scan for each; nothing where another
        did that meanwhile."""
        former = self.scan(name).series
        self._commit(lambda data: _split(data, name, former, series))

    def _record(self, data: dict[str, Any], name: str) -> dict[str, Any]:
        if name not in data["scans"]:
            raise UserError(f"The work list {self.folder} has no scan {name}; look at its names with: unetseg worklist list.")
        return data["scans"][name]

    def _commit(self, change: Callable[[dict[str, Any]], T]) -> T:
        with reached(self.folder):
            self._data, out = commit(self.folder, LIST_LOCK, "work list", _read, change, _write)
        return out

    # --------------------------------------------------------------------------------------------------------- segment

    def segment(
        self,
        models: Sequence[ModelPackage],
        me: Annotator,
        options: Options = Options(),
        progress: Progress | None = None,
        cancelled: Callable[[], bool] | None = None,
        engines: Sequence[Any] | None = None,
    ) -> Scan | None:
        """Segment one scan that nobody is at, and keep what was found with its scores; None where there is none left.

        A scan that cannot be segmented is marked as failed, with one sentence, and is what is returned; so is one that is left to
        others, as it was, with the sentence of left_alone(). Raises Cancelled, and what is amiss with more than the scan: UserError
        where the list cannot be written, or the model not be read, or where the list's models are others meanwhile.
        """
        names = [f"{m.card.name}-{m.card.version}" for m in models]

        def take(data: dict[str, Any]) -> str:
            now = self._now()
            todo = [n for n, r in data["scans"].items() if n not in self.away and _to_segment(data, r)]
            todo = [n for n in todo if not (data["scans"][n].get("claim") and _lives(data["scans"][n]["claim"], now))]
            # What a program that is gone had in hand may have ended it, and would end each that takes it first.
            todo.sort(key=lambda n: ("claim" in data["scans"][n], data["scans"][n]["status"] != "waiting"))
            if not todo:
                raise Unchanged
            if data["models"] != names:
                theirs, mine = " and ".join(data["models"]), " and ".join(names)
                cure = f"so {mine} stopped; choose {mine} again if it is to segment the rest."
                were = "were" if len(data["models"]) > 1 else "was"
                raise UserError(f"{theirs} {were} chosen for the work list meanwhile, {cure}")
            data["scans"][todo[0]]["claim"] = self._claim(replace(me, lease=LEASE), now, "segment")
            return todo[0]

        name = self._commit(take)
        if name is None:
            return None
        scan = self._scan(name, self._data["scans"][name], self._now())
        image: Image | None = None
        result: dict[str, Any] = {}
        written: list[dict[str, Any]] | None = None
        series: list[str] = []
        renewed = time.monotonic()

        def over() -> bool:
            nonlocal renewed
            if time.monotonic() - renewed > LEASE / 4:
                renewed = time.monotonic()
                with suppress(UserError):  # the network folder may come back in time
                    self.renew(me)
            return cancelled is not None and cancelled()

        try:
            image = read_image(scan.files, scan.series)
            result, written = self._segmented(scan, image, models, options, progress, over, engines)
        except (Cancelled, _NotWritten):
            self._give_up(name, me)
            raise
        except SeveralSeries as e:
            series = list(e.series)
        except Exception as e:  # one bad scan never stops the rest
            if why := left_alone(scan, e, image is not None):
                self.away[name] = why
                self._give_up(name, me)
                return replace(scan, error=why)
            if image is not None and any(isinstance(c, OSError) for c in _causes(e)):  # a file, and none of the scan's
                self._give_up(name, me)
                raise
            text = f"{name} could not be segmented ({type(e).__name__}: {str(e)[:200]}); skip or report it."
            apart = " If its files are scans of their own, name each on a line of a .txt list." * (len(scan.files) > 1)
            result = {"status": "failed", "error": f"{e}{apart}" if isinstance(e, UserError) else text}

        def enter(data: dict[str, Any]) -> list[str]:
            record = self._record(data, name)
            if record.get("series") != scan.series:  # another has split it meanwhile
                return [result["mask"]] if "mask" in result else []
            if (record.get("claim") or {}).get("for") == "segment":
                del record["claim"]
            if series:
                _split(data, name, scan.series, series)
                return []
            failed = result.get("status") == "failed"
            if "claim" in record and _lives(record["claim"], self._now()) and (record.get("mask") or failed):
                return [result["mask"]] if "mask" in result else []  # somebody corrects the former result
            old = [record.get("mask", "")]
            if record["status"] in ("done", "skipped") and failed:
                return []
            status = record["status"]
            record.update(result)
            if status in ("done", "skipped"):
                record["status"] = status
            if written is not None:
                data["labels"]["+".join(names)] = written
            return [f for f in old if f and f != record.get("mask")]

        try:
            for file in self._commit(enter):
                with suppress(OSError):  # Windows, while another program reads it; clean() removes it later
                    if is_within(self.folder / file, self.folder):
                        (self.folder / file).unlink(missing_ok=True)
        except BaseException:
            if result.get("mask") and not self._is_named(result["mask"]):
                with suppress(OSError):
                    (self.folder / result["mask"]).unlink(missing_ok=True)
            raise
        return self.scan(name) if name in self._data["scans"] else scan

    def _segmented(
        self,
        scan: Scan,
        image: Image,
        models: Sequence[ModelPackage],
        options: Options,
        progress: Progress | None,
        cancelled: Callable[[], bool],
        engines: Sequence[Any] | None,
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        prediction = predict(image, models, replace(options, uncertainty=True, probabilities=False), progress, cancelled, engines)
        scores, embedding = describe(prediction, image)
        if not self.there(self.folder):  # where a network folder was lost its empty mount point would take the result, and hide it later
            raise _NotWritten(f"The work list {self.folder} is no longer there; connect its drive or network folder, and segment again.")
        mask = PurePosixPath(RESULTS, scan.name, f"{secrets.token_hex(4)}.seg.nrrd")
        try:
            write_segmentation(prediction, self.folder / mask)
        except UserError as e:  # the next scan would fare no better, and all would be marked as failed
            text = f"The work list {self.folder} cannot take what was found in {scan.name}; check the disk's space, the connection and "
            raise _NotWritten(text + "your rights, and segment again: what was found in the others is kept.") from e
        labels = [label.to_json() for label in prediction.label_defs]
        numbers = [float(f"{v:.4g}") for v in embedding]
        record = {"status": "segmented", "mask": str(mask), "model": prediction.model_name, "channels": models[0].card.data["channels"]}
        return {**record, "scores": scores, "embedding": numbers}, labels

    def _is_named(self, mask: str) -> bool:
        """Whether the list names a result; so as long as it is there and cannot be read, for clean() removes what is not named."""
        try:
            return any(r.get("mask") == mask for r in _read(self.folder)["scans"].values())
        except UserError:
            return self.there(self.folder)

    def _give_up(self, name: str, me: Annotator) -> None:
        def free(data: dict[str, Any]) -> None:
            record = data["scans"].get(name) or {}
            if (record.get("claim") or {}).get("for") != "segment" or not me.owns(record["claim"]):
                raise Unchanged
            del record["claim"]

        with suppress(UserError):  # the claim's time ends by itself
            self._commit(free)

    def clean(self) -> None:
        """Remove what killed programs left: results that the list does not name and that are older than a day."""
        self.refresh()
        # By the file's own name, which is like no other: where case means nothing, CT and ct share a folder.
        named = {PurePosixPath(mask).name for r in self._data["scans"].values() if (mask := r.get("mask"))}
        with reached(self.folder):
            for path in self.folder.glob(f"{RESULTS}/*/*"):
                if path.name not in named and is_within(path, self.folder) and time.time() - path.lstat().st_mtime > 24 * 3600:
                    path.unlink(missing_ok=True)
            for empty in self.folder.glob(f"{RESULTS}/*"):
                if is_within(empty, self.folder) and empty.is_dir() and not any(empty.iterdir()):
                    empty.rmdir()


class _NotWritten(UserError):
    """The list's disk takes no result, which is no scan's fault."""


def _split(data: dict[str, Any], name: str, former: str | None, series: Sequence[str]) -> None:
    """former: the series that was read, as read_image() takes it: of several folders one may be chosen already."""
    record = data["scans"].get(name)
    if record is None or record.get("series") != former:
        return
    del data["scans"][name]
    for uid in series:
        uids = ",".join(filter(None, (former, uid)))
        kept = {key: record[key] for key in ("files", "print") if key in record}
        data["scans"][_free_name(name, data["scans"])] = {**kept, "series": uids, "status": "waiting"}


def _try_again(record: dict[str, Any]) -> None:
    record["status"] = "segmented" if record.get("mask") else "waiting"
    record.pop("error", None)


def _stem(path: Path) -> str:
    """The name of a scan's first file without what says that it is an image, and a first channel."""
    return (_bare(path) or path.name).removesuffix("_0000")


def _bare(path: Path, suffixes: Sequence[str] = (*VOLUME_SUFFIXES, *PICTURE_SUFFIXES)) -> str | None:
    """A file's name without its suffix; None where it is none of these."""
    return next((path.name[: -len(s)] for s in suffixes if path.name.lower().endswith(s)), None)


def _print(files: Sequence[Path]) -> str:
    """What tells a scan from others of the same name, also from another place: its files' names, sizes and some KB of them, of a DICOM
    folder those of its first file. "" where that cannot be read, or is nothing but a header and background: patients' folders often
    hold files of the same names and sizes."""
    out, telling = hashlib.sha256(), False
    try:
        for path in files:
            names = sorted(n for n in os.listdir(path) if not n.startswith(".")) if path.is_dir() else []
            out.update("\0".join(unicodedata.normalize("NFC", name) for name in (path.name, *names)).encode())
            file = _first_file(path) if path.is_dir() else path
            if file is not None:
                with open(file, "rb") as f:
                    size = f.seek(0, os.SEEK_END)
                    parts = [f.read(4096) for quarter in range(4) if f.seek(quarter * size // 4) >= 0]
                out.update(f"\0{size}\0".encode() + b"".join(parts))
                telling |= file != path or size <= 4 * 4096 or len(set(b"".join(parts[1:]))) > 2
    except (OSError, UnicodeEncodeError):
        return ""
    return out.hexdigest()[:16] if telling else ""


def _first_file(folder: Path) -> Path | None:
    for place, folders, files in os.walk(folder):
        folders.sort()
        if shown := [name for name in files if not name.startswith(".")]:
            return Path(place, min(shown))
    return None


def _unconnected(folder: Path | None) -> bool:
    """Whether what is not there is as a whole drive or network folder, which another computer may have under another name."""
    if folder is None:
        return False
    above = folder.parent, folder.parent.parent
    return os.path.ismount(folder.parent) or any(place.name in ("mnt", "media", "Volumes") for place in above)


def _free_name(stem: str, taken: dict[str, Any]) -> str:
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", stem)[:60].strip("-._") or "scan"
    return name if name not in taken else next(f"{name}-{i}" for i in range(2, 1 << 30) if f"{name}-{i}" not in taken)


def check_models(models: Sequence[ModelPackage]) -> None:
    """UserError for models that cannot segment a scan by themselves, or not together."""
    for model in models:
        if model.card.data["task"] != "automatic":
            raise UserError(f"{model.card.name} works from clicks, so it segments nothing in advance; choose another model, or none.")
        if model.card.data.get("roi_mm"):
            raise UserError(f"{model.card.name} is made for a box around one target, not for whole scans; choose another model, or none.")
    if models:
        check_together([m.card for m in models])


def _until(now: float, me: Annotator) -> float:
    """When what is taken now is free again, to a tenth of a second: rounded down, as nobody keeps a scan longer than his lease."""
    return math.floor((now + me.lease) * 10) / 10


def _lives(claim: dict[str, Any], now: float) -> bool:
    return now < claim["until"] and not (claim.get("pid") and process_is_gone(claim))


def _to_segment(data: dict[str, Any], record: dict[str, Any]) -> bool:
    """Whether the list's models have not segmented a scan that somebody may still correct."""
    if not data["models"] or record["status"] not in ("waiting", "segmented"):
        return False
    return record.get("model") != "+".join(data["models"])


# ----------------------------------------------------------------------------------------------------------------- file


def _write(folder: Path, data: dict[str, Any], lock: FolderLock | None = None) -> None:
    """A scan on each line: readable, and quick to write and read with thousands."""
    head = "".join(f" {json.dumps(k)}: {json.dumps(v, ensure_ascii=False)},\n" for k, v in data.items() if k != "scans")
    lines = (f"  {json.dumps(n, ensure_ascii=False)}: {json.dumps(r, ensure_ascii=False)}" for n, r in data["scans"].items())
    text = "{\n" + head + ' "scans": {\n' + ",\n".join(lines) + "\n }\n}\n"
    content = text.encode()  # as text, Windows would write longer lines
    with atomic_path(folder / LIST) as temporary:
        temporary.write_bytes(content)
        flush(temporary)
        if temporary.stat().st_size != len(content):
            raise OSError("the list was not written whole")
        if lock is not None and not lock.mine():
            raise LockLost


def _read(folder: Path) -> dict[str, Any]:
    return read_shared(folder, LIST, FORMAT, "work list", "make", _check)


def _check(data: dict[str, Any]) -> None:
    """As far as the rest relies on it; a folder may come from anybody."""
    data["revision"] + 1, list(data["models"]), dict(data["labels"])
    for name, record in data["scans"].items():
        if not _NAME.fullmatch(name):
            raise ValueError(f"the scan {name!r}")
        if record["status"] not in STATUSES or not record["files"] or not all(isinstance(f, str) for f in record["files"]):
            raise ValueError(f"the scan {name!r}")
        if mask := record.get("mask"):
            parts = PurePosixPath(mask).parts
            if parts[0] != RESULTS or len(parts) != 3 or not is_inner(mask):
                raise ValueError(f"the file {mask!r}")
        if claim := record.get("claim"):
            claim["until"] + 1.0, claim["for"].strip()
        if record.get("scores"):
            record["scores"]["value"] + 1.0, [v + 1.0 for v in record["embedding"][:1]]


# --------------------------------------------------------------------------------------------------------------- order


def order(entropies: Sequence[float], embeddings: np.ndarray, done: Sequence[int] = (), limit: int | None = None) -> list[int]:
    """Indices of the scans that are not `done` (annotated or being annotated), the most useful first; the same input gives
    the same order.

    entropies: (n,) value of each scan, any scale (describe()'s "value"); NaN is 0. embeddings: (n, d) of describe(). limit: only
    the first so many.

    Greedy: of the scans that are left the one with the largest rank(value) x distance to the nearest chosen one. Every column of
    the embeddings counts the same (it is standardised over all scans).
    """
    values = np.nan_to_num(np.asarray(entropies, np.float64), nan=0.0, posinf=np.finfo(np.float64).max, neginf=0.0)
    n = len(values)
    if not n:
        return []
    points = np.nan_to_num(np.asarray(embeddings, np.float64).reshape(n, -1), posinf=0.0, neginf=0.0)
    spread = points.std(0)
    points = ((points - points.mean(0)) / np.where(spread > 1e-9, spread, np.inf)).astype(np.float32)
    # Ranks, equal values sharing one, so that neither the scale nor one odd scan decides.
    rank = np.searchsorted(np.sort(values), values, "right") / n
    # The most useful first, so that of equals argmax takes it, and of equally useful ones the first in the list.
    by_value = np.lexsort((np.arange(n), -values))
    points, rank = points[by_value], rank[by_value]
    squares = np.einsum("ij,ij->i", points, points)
    place = np.empty(n, np.intp)
    place[by_value] = np.arange(n)
    nearest: np.ndarray | None = None
    left = np.ones(n, bool)
    chosen = [int(place[i]) for i in done]
    out: list[int] = []
    while True:
        for i in chosen:
            left[i] = False
            far = np.sqrt(np.maximum(squares + squares[i] - 2 * (points @ points[i]), 0))
            far[far < 1e-3] = 0  # of rounding
            nearest = far if nearest is None else np.minimum(nearest, far)
        if not left.any() or len(out) == limit:
            return out
        gain = np.where(left, rank if nearest is None else rank * nearest, -1.0)
        chosen = [int(np.argmax(gain))]
        out.append(int(by_value[chosen[0]]))


# --------------------------------------------------------------------------------------------------------- description


def describe(prediction: Prediction, image: Image) -> tuple[dict[str, float], np.ndarray]:
    """(scores, embedding) of an image that was predicted with Options(uncertainty=True).

    Scores, 0 to 1: "entropy", "disagreement" (mutual information, 0 with a single model and copy): means over two voxels on both
    sides of the predicted surface and wherever the entropy is _UNDECIDED or more; "undecided": that share of the voxels around
    the prediction; "value": entropy + disagreement, for order(). Embedding: float32, of the same length for all scans and models:
    acquisition (spacing, size, brightness), intensities in and around the prediction, its size, place and shape, and 3 x 3 x 3
    pictures of both in patient orientation.
    """
    if prediction.uncertainty is None:
        raise ValueError("the prediction has no uncertainty; predict with Options(uncertainty=True)")
    canonical, orientation = reorient(image)
    values = canonical.channels[0]
    labels = orientation.canonical(prediction.labels.array)
    entropy = orientation.canonical(prediction.uncertainty.array)
    mutual = prediction.mutual_information
    disagreement = None if mutual is None else orientation.canonical(mutual.array)
    spacing = np.array(canonical.spacing[::-1])  # (z, y, x)

    found = Box.around(labels) or Box.around(entropy >= _UNDECIDED)
    if found is None:
        peak = np.unravel_index(int(np.argmax(entropy)), entropy.shape)
        found = Box(tuple(int(v) for v in peak), tuple(int(v) + 1 for v in peak))
    box = found.grown([max(2 * _BAND, n // 4) for n in found.shape]) & Box.whole(labels.shape)
    near = tuple(slice(a, b, s) for a, b, s in zip(box.start, box.stop, _steps(box.shape, _MOST)))
    inside = labels[near] > 0
    h = np.nan_to_num(entropy[near])
    grown, shrunk = _widened(inside, _BAND), ~_widened(~inside, _BAND)
    band = grown & ~shrunk
    undecided = h >= _UNDECIDED
    part = band | undecided
    if np.count_nonzero(part) < _FEWEST:
        part = h >= np.partition(h, -min(_FEWEST, h.size), axis=None)[-min(_FEWEST, h.size)]
    scores = {
        "entropy": float(h[part].mean()),
        "disagreement": 0.0 if disagreement is None else float(np.nan_to_num(disagreement[near])[part].mean()),
        "undecided": float(undecided.mean()),
    }
    scores["value"] = scores["entropy"] + scores["disagreement"]

    sampled = values[tuple(slice(0, None, s) for s in _steps(values.shape, 1 << 20))].astype(np.float32)
    low, middle, high = np.percentile(sampled, (5, 50, 95))
    scale = float(high - low) or 1.0
    around = np.clip((values[near].astype(np.float32) - middle) / scale, -3, 3)
    within = around[inside] if inside.any() else around[part]
    strides = np.array([s.step for s in near])
    n = float(inside.sum()) * float(strides.prod())
    counts = np.bincount(labels[near][inside].astype(np.int64)) if inside.any() else np.ones(1)
    shares = counts[counts > 0] / counts.sum()
    center = np.argwhere(inside).mean(0) * strides + box.start if inside.any() else np.array(found.start, float)
    embedding = [
        *np.log(spacing),
        *np.log(spacing * values.shape),
        math.asinh(float(middle)),
        math.log(scale),
        *np.percentile(around, (5, 25, 50, 75, 95)),
        *np.percentile(within, (10, 50, 90)),
        math.log1p(n),
        math.log(float(spacing.prod())) + math.log1p(n),
        *np.log(spacing * found.shape),
        n / math.prod(found.shape),
        math.log1p(len(components(inside)[1]) - 1),
        *(center / values.shape),
        float(np.count_nonzero(band)) / max(1.0, float(np.count_nonzero(grown))),
        float(shares.max()),
        float(-(shares * np.log(shares)).sum()),
        *(scores[k] for k in ("entropy", "disagreement", "undecided")),
        *_coarse(inside.astype(np.float32)),
        *_coarse(around),
    ]
    return {k: round(v, 6) for k, v in scores.items()}, np.nan_to_num(np.asarray(embedding, np.float32))


def _steps(shape: Sequence[int], most: int) -> list[int]:
    """Strides that leave at most about `most` voxels, along the longest axes first."""
    steps = [1] * len(shape)
    while math.prod(math.ceil(n / s) for n, s in zip(shape, steps)) > most:
        steps[int(np.argmax([n / s for n, s in zip(shape, steps)]))] += 1
    return steps


def _widened(mask: np.ndarray, by: int) -> np.ndarray:
    """Grown by so many voxels along every axis (a box)."""
    for axis, n in enumerate(mask.shape):
        wide = mask.copy()
        for d in range(1, min(by, n - 1) + 1):
            ahead, behind = [slice(None)] * mask.ndim, [slice(None)] * mask.ndim
            ahead[axis], behind[axis] = slice(d, None), slice(None, -d)
            wide[tuple(ahead)] |= mask[tuple(behind)]
            wide[tuple(behind)] |= mask[tuple(ahead)]
        mask = wide
    return mask


def _coarse(values: np.ndarray) -> list[float]:
    """The means of 3 x 3 x 3 parts of an array (z, y, x); an axis with fewer voxels repeats them."""
    cuts = [
        [(min(i * n // _PARTS, n - 1), max(min(i * n // _PARTS, n - 1) + 1, (i + 1) * n // _PARTS)) for i in range(_PARTS)]
        for n in values.shape
    ]
    return [float(values[a:b, c:d, e:f].mean()) for a, b in cuts[0] for c, d in cuts[1] for e, f in cuts[2]]

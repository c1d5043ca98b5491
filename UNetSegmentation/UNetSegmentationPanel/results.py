"""What came out: a line on how, the warnings, the measures as text, and the walk through the uncertain places."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import qt
import slicer
from slicer.i18n import tr as _

SAVE_FOLDER = "UNetSegmentation/SaveFolder"  # in the settings
_DECIMAL = re.compile(r"^([+-]?\d+)\.(\d+(?:e[+-]\d+)?)$")
_IN_NO_FILE_NAME = re.compile(r'[<>:"/\\|?*\x00-\x1f]')  # of Windows, and so on a drive that is shared


def record(prediction: Any, measures: Sequence[dict[str, Any]]) -> str:
    """What of a prediction is kept in the scene's settings, so that a loaded scene shows its result again."""
    data = {
        "model": prediction.model_name,
        "engines": list(prediction.engines),
        "seconds": prediction.seconds,
        "warnings": list(prediction.warnings),
        "found": sum(bool(m["voxels"]) for m in measures),
        "places": [{key: p[key] for key in ("point", "prompt", "peak", "volume_ml")} for p in prediction.places or ()],
        "uncertainty": prediction.uncertainty is not None,
    }
    return json.dumps(data)


def readRecord(text: str) -> dict[str, Any]:
    """The dictionary of record(); an empty one for a scene that another program wrote."""
    try:
        data = json.loads(text) if text else {}
        if not isinstance(data, dict):
            return {}
        for place in data.get("places", ()):
            x, y, z = (float(v) for v in place["point"])
            place["point"] = (x, y, z)
        return data
    except (ValueError, TypeError, KeyError):
        return {}


def summary(data: dict[str, Any]) -> str:
    """One line: which model, what it ran on, how long it took, and what it is not for."""
    engines = "; ".join(dict.fromkeys(data.get("engines", ())))
    text = _("{model} on {engines}, {seconds:.1f} s.").format(
        model=data.get("model", "").replace("+", " + "), engines=engines, seconds=float(data.get("seconds", 0))
    )
    nothing = [] if data.get("found") else [_("Nothing was found.")]
    return "\n".join([text, *nothing, _("For research. Not for diagnosis.")])


def tableText(tableNode: Any, separator: str) -> str:
    """A table node as lines with its column titles first, for the clipboard (tabs) or a file (commas)."""
    table = tableNode.GetTable()
    columns = range(table.GetNumberOfColumns())
    cells = [[table.GetValue(row, c).ToString() for c in columns] for row in range(table.GetNumberOfRows())]
    return rowsText([[table.GetColumnName(c) for c in columns], *cells], separator)


def rowsText(rows: Sequence[Sequence[str]], separator: str) -> str:
    """The first row holds the titles. Behind tabs numbers have this computer's decimal comma, where that is one: what is pasted there a
    spreadsheet reads so, and makes dates of 5.7."""
    from UNetSegmentationLib.nodule import cell

    out = io.StringIO()
    writer = csv.writer(out, delimiter=separator, lineterminator="\n")
    writer.writerow(rows[0])
    # PythonQt gives decimalPoint() as a number.
    comma = separator == "\t" and "," in qt.QLocale.system().toString(0.5)
    for row in rows[1:]:
        name, *cells = (cell(text) for text in row)
        writer.writerow([name, *(_DECIMAL.sub(r"\1,\2", text) if comma else text for text in cells)])
    return out.getvalue()


def askFile(title: str, name: str, kinds: str, suffix: str) -> Path | None:
    """Which file to save, with its suffix, which not every system's dialog adds; None for none. `name`, which may be made of a scan's, is
    offered in the folder of the last one that was saved, at first the scene's."""
    settings = qt.QSettings()
    start = Path(str(settings.value(SAVE_FOLDER, "") or slicer.mrmlScene.GetRootDirectory()), _IN_NO_FILE_NAME.sub("_", name))
    chosen = str(qt.QFileDialog.getSaveFileName(slicer.util.mainWindow(), title, str(start), kinds) or "")
    if not chosen:
        return None
    settings.setValue(SAVE_FOLDER, str(Path(chosen).parent))
    if chosen.lower().endswith(suffix):
        return Path(chosen)
    path = Path(f"{chosen}{suffix}")
    # The dialog has asked about the name as it was typed only.
    question = _("{file} is there already. Replace it?").format(file=path.name)
    return path if not path.exists() or slicer.util.confirmYesNoDisplay(question, windowTitle=title, textFormat=qt.Qt.PlainText) else None


def saveText(title: str, name: str, text: str) -> None:
    """Ask for a .csv file and write it, whole or not at all."""
    path = askFile(title, name, _("Comma-separated values (*.csv)"), ".csv")
    if path is not None:
        from UNetSegmentationLib import UserError
        from UNetSegmentationLib.files import atomic_path

        try:
            with atomic_path(path) as temporary:
                # With the mark that tells spreadsheets of UTF-8.
                temporary.write_text(text, encoding="utf-8-sig", newline="")
        except UserError as e:
            slicer.util.errorDisplay(str(e), windowTitle=title, textFormat=qt.Qt.PlainText)


def showMap(mapNode: Any, shown: bool) -> None:
    """The map as the foreground of all slice views, or what was there before it."""
    if mapNode is None:
        return
    scene = mapNode.GetScene()
    for view in _views(scene):
        if shown and view.GetForegroundVolumeID() != mapNode.GetID():
            _FORMER[view.GetID()] = view.GetForegroundVolumeID(), view.GetForegroundOpacity()
            view.SetForegroundVolumeID(mapNode.GetID())
            view.SetForegroundOpacity(0.6)
        elif not shown and view.GetForegroundVolumeID() == mapNode.GetID():
            former, opacity = _FORMER.pop(view.GetID(), (None, 0.0))
            view.SetForegroundVolumeID(former if former and scene.GetNodeByID(former) else None)
            view.SetForegroundOpacity(opacity)


def mapViews(mapNode: Any) -> list[tuple[Any, float, Any]]:
    """The slice views that show the map: their nodes, its opacity in them, and what lay there before it."""
    scene = mapNode.GetScene() if mapNode is not None else None
    shown = [v for v in _views(scene) if v.GetForegroundVolumeID() == mapNode.GetID()] if scene is not None else []  # just being removed
    return [(v, v.GetForegroundOpacity(), _FORMER.get(v.GetID())) for v in shown]


def _views(scene: Any) -> list[Any]:
    kind = "vtkMRMLSliceCompositeNode"
    return [scene.GetNthNodeByClass(i, kind) for i in range(scene.GetNumberOfNodesByClass(kind))]


def showAgain(mapNode: Any, views: Sequence[tuple[Any, float, Any]]) -> None:
    """In the views of mapViews(), as it was."""
    for view, opacity, former in views:
        if former is not None:
            _FORMER[view.GetID()] = former
        view.SetForegroundVolumeID(mapNode.GetID())
        view.SetForegroundOpacity(opacity)


def forgetScene() -> None:
    """The scene is closed; the next one's nodes have the same IDs."""
    _FORMER.clear()


_FORMER: dict[str, tuple[str | None, float]] = {}  # what lay in the foreground of a slice view before a map


def mapIsShown(mapNode: Any) -> bool:
    return any(opacity > 0 for _view, opacity, _former in mapViews(mapNode))


class PlaceWalk:
    """Steps through the uncertain places of a record, again from the first after the last."""

    def __init__(self) -> None:
        self.places: list[dict[str, Any]] = []
        self._at = -1

    def set(self, places: Sequence[dict[str, Any]]) -> None:
        if list(places) != self.places:
            self.places, self._at = list(places), -1

    def next(self, volume: Any) -> None:
        """Centre the slice views on the next place, where it lies in the volume now."""
        from UNetSegmentationLib import UserError, mrml

        if self.places:
            self._at = (self._at + 1) % len(self.places)
            place, prompts = self.places[self._at], []
            with suppress(UserError):  # its transform may be none that the core takes
                prompts = mrml.prompts_from_text(str(place.get("prompt", "")), volume) if volume is not None else []
            mrml.jump_slices(slicer.mrmlScene, next((p[1:4] for p in prompts if p[0] == "point"), place["point"]))

    @property
    def text(self) -> str:
        if not self.places:
            return _("nothing uncertain")
        n = len(self.places)
        return _("{n} to check").format(n=n) if self._at < 0 else _("{i} of {n}").format(i=self._at + 1, n=n)

"""The list of model packages: what is installed, their cards, import and removal."""

from __future__ import annotations

import html
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import qt
import slicer
from slicer.i18n import tr as _


@dataclass(frozen=True)
class Model:
    """A package in one of the two folders. card: None where it cannot be read, and then `error` says why."""

    path: Path
    imported: bool
    card: Any = None
    error: str = ""

    @property
    def name(self) -> str:
        """<name>-<version> as the card says, whatever the file is called: a scene remembers it, and segments carry it as a tag."""
        from UNetSegmentationLib.model import SUFFIX

        return f"{self.card.name}-{self.card.version}" if self.card else self.path.name.removesuffix(SUFFIX)

    @property
    def version(self) -> tuple[int, ...]:
        return tuple(int(v) for v in self.card.version.split("."))

    @property
    def megabytes(self) -> float:
        """Of the file; 0 where it cannot be looked at (deleted meanwhile, a folder that is away)."""
        try:
            return self.path.stat().st_size / 1e6
        except OSError:
            return 0.0


def installedModels(task: str = "automatic") -> list[Model]:
    """Every package for this task ("automatic" or "click"), bundled ones first, by its card alone.

    The card is checked; the network's bytes are verified when a package is imported and again before it runs.
    """
    from UNetSegmentationLib.files import UserError
    from UNetSegmentationLib.model import RESOURCES, model_files, read_card

    out = []
    for path in model_files():
        imported = RESOURCES not in path.parents
        try:
            model = Model(path, imported, read_card(path))
            summary(model), cardHtml(model), model.version  # so that what no check foresaw spoils this one, not the list
        except UserError as e:
            out.append(Model(path, imported, error=str(e)))
        except Exception as e:
            text = _("{file} cannot be shown ({reason}); remove it, and ask its author for a corrected package.")
            out.append(Model(path, imported, error=text.format(file=path.name, reason=f"{type(e).__name__}: {str(e)[:200]}")))
        else:
            if model.card.data["task"] == task:
                if twin := next((m for m in out if m.card and m.name == model.name), None):
                    text = _("{file} holds {name} too, as {other} does; remove one of the two.")
                    model = Model(path, imported, error=text.format(file=path.name, name=model.name, other=twin.path.name))
                out.append(model)
    return out


def resolve(names: Sequence[str], models: Sequence[Model]) -> tuple[list[Model], list[str]]:
    """The models of these <name>-<version>, and the names that nothing installed answers to.

    Where that version is not here, the newest one of the same name is taken; "<name>-" asks for it.
    """
    from UNetSegmentationLib.model import SUFFIX

    found: list[Model] = []
    missing = []
    for name in names:
        exact = [m for m in models if m.card and m.name == name]
        stem, _dash, version = name.rpartition("-")
        same = [m for m in models if m.card and m.card.name == stem and re.fullmatch(r"(\d+\.\d+\.\d+)?", version)]
        file = [m for m in models if m.card and m.path.name == name + SUFFIX]  # which scenes remembered once
        if good := exact or same or file:
            found.append(max(good, key=lambda m: m.version))
        else:
            missing.append(name)
    return list(dict.fromkeys(found)), missing


def mismatch(models: Sequence[Model]) -> str:
    """Why these models cannot be averaged, as one sentence; "" where they can."""
    if not models:
        return ""
    from UNetSegmentationLib.files import UserError
    from UNetSegmentationLib.model import check_together

    try:
        check_together([m.card for m in models])
    except UserError as e:
        return str(e)
    return ""


def importPackage(path: str | Path, replace: Callable[[str], bool]) -> Model | None:
    """Verify a .unet.zip and copy it into the folder of imported models, all or nothing.

    replace(name) is asked where another package of that name and version is there already, whatever its file is called; None
    where it says no.
    Raises UserError with one sentence for a file that is not a sound package.
    """
    from UNetSegmentationLib.files import UserError, atomic_path
    from UNetSegmentationLib.model import RESOURCES, SUFFIX, ModelPackage, model_files, named, user_models_folder

    path = Path(path)
    card = ModelPackage.read(path).card
    if card.data["task"] != "automatic" and card.data["task"] != "click":
        raise UserError(f"{path} is a model for {card.data['task']}, which this version does not know; update UNetSegmentation.")
    name = f"{card.name}-{card.version}"
    there = [p for p in model_files() if named(p) == (card.name, card.version)]
    if any(RESOURCES in p.parents for p in there):
        raise UserError(f"{name} comes with UNetSegmentation already; give yours another name or version.")
    if path.resolve() in [p.resolve() for p in there]:
        return Model(path, True, card)
    if there and not replace(name):
        return None
    # A file of that name may hold another model, as after somebody renamed it.
    targets = (user_models_folder() / f"{name}{more}{SUFFIX}" for more in ("", *(f"-{i}" for i in range(2, 1000))))
    target = next(t for t in targets if not t.exists() or any(t.samefile(p) for p in there))
    with atomic_path(target) as temporary:
        shutil.copyfile(path, temporary)
        try:
            ModelPackage.read(temporary)  # the copy is what will run
        except UserError as e:
            raise UserError(str(e).replace(str(temporary), str(path))) from e
    for file in there:
        with suppress(OSError):  # the list tells of it
            if not file.samefile(target):  # under other letters it may be: macOS' disks do not tell them apart
                file.unlink()
    return Model(target, True, card)


def importNetwork(path: str | Path, replace: Callable[[str], bool]) -> Model | None:
    """importPackage() of a bare .onnx and the answers to three questions; None, too, where these are not answered."""
    from UNetSegmentationLib.files import UserError
    from UNetSegmentationLib.model import SUFFIX, write_package

    path = Path(path)
    try:
        network = path.read_bytes()
    except OSError as e:
        raise UserError(f"{path} cannot be read ({e.strerror or e}); check its name and your rights.") from e
    card = askCard(path, network)
    if card is None:
        return None
    with slicer.util.WaitCursor(), tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        return importPackage(write_package(Path(folder) / f"{path.stem}{SUFFIX}", card, network).path, replace)


def askCard(path: Path, network: bytes) -> dict[str, Any] | None:
    """The card of a bare .onnx, by a person who knows what the file does not say; None where they cancel."""
    from UNetSegmentationLib.files import UserError
    from UNetSegmentationLib.intensity import presets
    from UNetSegmentationLib.model import SLICE_AXIS, bare_card, read_network

    _channels, size, count, _activation = read_network(network)
    dialog = qt.QDialog(slicer.util.mainWindow())
    dialog.windowTitle = _("Import {file}").format(file=path.name)
    form = qt.QFormLayout(dialog)
    labels, intensity, spacing, axis, note = qt.QLineEdit(), qt.QComboBox(), qt.QLineEdit(), qt.QComboBox(), qt.QLabel()
    labels.name, intensity.name, spacing.name, axis.name, note.name = "labels", "intensity", "spacing", "axis", "note"
    labels.placeholderText = ", ".join("ABCDEFGH"[:count])
    labels.toolTip = _("In the order of the network's outputs after the background, with commas between them")
    form.addRow(_("Its {n} segments:").format(n=count) if count > 1 else _("Its segment:"), labels)
    for preset in presets().values():
        intensity.addItem(presetText(preset), preset.name)
    intensity.addItem(_("Mean 0, standard deviation 1"), "zscore")
    intensity.currentIndex = -1  # a wrong one gives wrong segments without a word
    form.addRow(_("Images normalised by:"), intensity)
    spacing.placeholderText = _("empty: images as they are")
    form.addRow(_("Its pixels in mm (X,Y):") if len(size) == 2 else _("Its voxels in mm (X,Y,Z):"), spacing)
    if len(size) == 2:
        for name in SLICE_AXIS:
            axis.addItem(name, name)
        form.addRow(_("Its slices:"), axis)
    note.wordWrap, note.textFormat = True, qt.Qt.PlainText
    form.addRow(note)
    buttons = qt.QDialogButtonBox()
    buttons.setStandardButtons(qt.QDialogButtonBox.Ok | qt.QDialogButtonBox.Cancel)
    form.addRow(buttons)

    def update(*_unused: Any) -> None:
        buttons.button(qt.QDialogButtonBox.Ok).enabled = bool(labels.text.strip()) and intensity.currentIndex >= 0

    labels.connect("textChanged(QString)", update)
    intensity.connect("currentIndexChanged(int)", update)
    buttons.connect("accepted()", dialog, "accept()")
    buttons.connect("rejected()", dialog, "reject()")
    update()
    try:
        while dialog.exec_() == qt.QDialog.Accepted:
            try:
                chosen = intensity.itemData(intensity.currentIndex)
                return bare_card(path.stem, network, labels.text, chosen, spacing.text, axis.currentText)
            except UserError as e:
                note.text = breakable(str(e))
        return None
    finally:
        dialog.deleteLater()  # its parent would keep it


# ---------------------------------------------------------------------------------------------------------------- words


def presetText(preset: Any) -> str:
    return f"{preset.label} ({preset.level:g}, {preset.width:g})" if preset.percentiles is None else str(preset.label)


def dice(card: Any) -> str:
    """The measured Dice of a card in a few words; "" where none was measured."""
    scores = card.data.get("metrics", {}).get("dice")
    numbers = [v for v in scores.values() if isinstance(v, (int, float))] if isinstance(scores, dict) else []
    if not numbers:
        return ""
    if len(numbers) > 3:
        return _("mean Dice {value:.2f}").format(value=sum(numbers) / len(numbers))
    return "Dice " + ", ".join(f"{v:.2f}" for v in numbers)


def plainTip(text: str) -> str:
    """A tooltip that shows the text as it is: Qt takes any "<" for HTML, and a package's card comes from anywhere."""
    return f"<p>{html.escape(text)}</p>" if "<" in text else text


def breakable(text: str, copied: bool = False) -> str:
    """The text for a label that wraps words, whose least width is its longest word's: a name of 67 letters made the panel 546 pixels
    wide. Qt breaks lines at "/" alone, and at "-" before a letter. copied: by a person, perhaps, so that paths stay what they are."""
    long = r"(?<!\S)[^\s/\\]{40,}(?!\S)" if copied else r"[^\s/]{40,}"
    return re.sub(long, lambda m: re.sub(r"[_.\\-](?=\w)", "\\g<0>\u200b", m[0]), text)


def cardTitle(card: Any) -> str:
    """With the version: what is installed, or comes of training, may differ in that alone."""
    return f"{card.data.get('title') or card.name} ({card.version})"


def licence(card: Any) -> str:
    """The licence's name, without what follows its first sentence."""
    return card.data["licence"].split(". ")[0].rstrip(".")


def summary(model: Model) -> str:
    """Three lines for the list."""
    if model.card is None:
        return _("{name}\ncannot be used").format(name=model.name)
    card = model.card
    labels = ", ".join(label.name for label in card.labels)
    measured = dice(card) or _("not measured")
    kind = _("Automatic, {n}D").format(n="2.5" if card.context else card.dimensions)
    return "\n".join(
        (
            cardTitle(card),
            f"{measured} · {labels}",  # a long list of labels is cut, the score never
            f"{kind} · {model.megabytes:.0f} MB · {licence(card)}",
        )
    )


def cardHtml(model: Model) -> str:
    """A package's card for a person to read. Everything in it is escaped: a package comes from anywhere."""

    def text(value: Any) -> str:
        return html.escape(str(value))

    def table(rows: Sequence[tuple[str, str]]) -> str:
        cells = (f'<tr><td style="padding-right:8px">{text(key)}</td><td>{value}</td></tr>' for key, value in rows if value)
        return f"<table>{''.join(cells)}</table>"

    if model.card is None:
        return f"<p>{text(model.error)}</p>"
    card, data = model.card, model.card.data
    metrics, clicks = data.get("metrics", {}), data["task"] == "click"
    scores = metrics.get("dice") if isinstance(metrics.get("dice"), dict) else {}
    measured = "<br>".join(text(f"{k}: Dice {v:.3f}") for k, v in scores.items() if isinstance(v, (int, float)))
    if scores and clicks:
        measured += "<br>" + text(_("after one click"))
    if metrics.get("cases"):
        measured += "<br>" + text((_("on 1 case") if metrics["cases"] == 1 else _("on {n} cases")).format(n=metrics["cases"]))
    if metrics.get("held_out"):
        measured += "<br>" + text(metrics["held_out"])
    own = data.get("pixel_mm")
    spacing = " × ".join("–" if v is None else f"{v:g}" for v in (*(v or own for v in card.spacing[:2]), card.spacing[2]))
    intensity = card.intensity
    sees = intensity["mode"]
    if sees == "window":
        sees = _("window level {level:g}, width {width:g} HU").format(level=intensity["level"], width=intensity["width"])
    size = data.get("roi_mm")
    of_target = _("a box of about {mm:g} mm around one target").format(mm=size) if size else _("a box around one target")
    made_for = of_target if card.of_target else _("whole volumes")
    rows = [
        (_("Segments"), text(", ".join(label.name for label in card.labels))),
        (_("Input"), text(", ".join(data["channels"]))),
        (_("Made for"), text(_("one target that is clicked on") if clicks else made_for)),
        (_("Intended use"), text(data.get("intended_use", ""))),
        (_("Limits"), text(data.get("limits", ""))),
        (_("Measured"), measured or text(_("nothing is stated"))),
        (_("Trained on"), "<br>".join(text(v) for v in data.get("training_data", ())) or text(_("nothing is stated"))),
        (_("Licence"), text(data["licence"])),
        (_("Voxels"), text(_("{spacing} mm, {sees}").format(spacing=spacing, sees=sees))),
        (_("Version"), text(f"{card.name} {card.version}, {model.megabytes:.1f} MB")),
    ]
    return f"<p><b>{text(data.get('title') or card.name)}</b></p><p>{text(data.get('description', ''))}</p>{table(rows)}"


# ----------------------------------------------------------------------------------------------------------------- list


class ModelList:
    """The models' list with its buttons. changed() is called when a person chooses others, show() when there is only something to say:
    the settings then keep what they name, also what is not installed here."""

    def __init__(self, ui: Any, changed: Callable[[], None], show: Callable[[], None]) -> None:
        self.ui, self._changed, self._show = ui, changed, show
        self.models: list[Model] = []
        self.missing: list[str] = []  # what was to be chosen and is not here
        self.busy = False
        self.note = ""  # what is to be said about the last import or removal
        self.onClickModel: Callable[[], Any] = lambda: None  # called when a model of clicks was imported, before show()
        ui.modelList.connect("itemSelectionChanged()", self._onSelection)
        ui.detailsButton.connect("toggled(bool)", self._onDetails)
        ui.importButton.connect("clicked(bool)", self._onImport)
        ui.removeButton.connect("clicked(bool)", self._onRemove)
        ui.folderButton.connect("clicked(bool)", self._onFolder)
        self._onDetails(False)
        self.update()

    def read(self) -> None:
        """Look again what is installed; what was chosen stays chosen."""
        chosen = [*(m.name for m in self.selected), *self.missing]
        self.models = installedModels()
        widget = self.ui.modelList
        blocked = widget.blockSignals(True)
        widget.clear()
        for model in self.models:
            widget.addItem(summary(model))
            item = widget.item(widget.count - 1)
            item.setToolTip(plainTip(model.error or model.name))  # an error may quote the package
        widget.blockSignals(blocked)
        if self.models:  # three models are seen without scrolling, and no room is wasted on fewer
            height = widget.sizeHintForRow(0) * min(3, len(self.models)) + 2 * widget.frameWidth
            widget.minimumHeight = widget.maximumHeight = height
        self.select(chosen)

    @property
    def selected(self) -> list[Model]:
        """The chosen models that can run, in the list's order."""
        return [m for i, m in enumerate(self.models) if m.card and self.ui.modelList.item(i).isSelected()]

    def select(self, names: Sequence[str]) -> None:
        """Choose the models of these names; `missing` are those that nothing here answers to. changed() is not called."""
        found, self.missing = resolve(names, self.models)
        widget = self.ui.modelList
        blocked = widget.blockSignals(True)
        for i, model in enumerate(self.models):
            widget.item(i).setSelected(model in found)
        widget.blockSignals(blocked)
        if found:  # three are in sight
            widget.scrollToItem(widget.item(self.models.index(found[0])))
        self.update()

    def update(self) -> None:
        marked = [m for i, m in enumerate(self.models) if self.ui.modelList.item(i).isSelected()]
        self.ui.removeButton.enabled = not self.busy and any(m.imported for m in marked)
        self.ui.removeButton.visible = any(m.imported for m in self.models)
        self.ui.importButton.enabled = not self.busy
        self.ui.detailsButton.enabled = bool(marked)
        if self.ui.detailsButton.checked:
            self.ui.detailsBrowser.setHtml("<hr>".join(map(cardHtml, marked)))

    def _onSelection(self) -> None:
        self.note, self.missing = "", []
        self.update()
        self._changed()

    def _onDetails(self, shown: bool) -> None:
        self.ui.detailsBrowser.visible = shown
        self.update()

    def _onFolder(self, *_unused: Any) -> None:
        from UNetSegmentationLib.model import user_models_folder

        folder = user_models_folder()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            self.note = _("{path} cannot be made ({reason}); make it, or name another folder in UNETSEG_MODELS.").format(
                path=folder, reason=e.strerror
            )
            self._show()
            return
        qt.QDesktopServices.openUrl(qt.QUrl.fromLocalFile(str(folder)))

    def _onImport(self, *_unused: Any) -> None:
        title, filters = _("Import a model"), _("Models (*.unet.zip *.zip *.onnx)")
        path = qt.QFileDialog.getOpenFileName(slicer.util.mainWindow(), title, "", filters)
        if path:
            self.importFile(path)

    def importFile(self, path: str | Path) -> None:
        """Import, and choose what was imported; a failure is shown."""
        from UNetSegmentationLib.files import UserError

        def replace(name: str) -> bool:
            qt.QApplication.setOverrideCursor(qt.Qt.ArrowCursor)  # a question does not wait
            try:
                question = _("{name} is installed already. Replace it by this file?").format(name=name)
                return slicer.util.confirmYesNoDisplay(question, windowTitle=_("Import a model"), textFormat=qt.Qt.PlainText)
            finally:
                qt.QApplication.restoreOverrideCursor()

        try:
            if str(path).lower().endswith(".onnx"):
                model = importNetwork(path, replace)
            else:
                with slicer.util.WaitCursor():
                    model = importPackage(path, replace)
        except UserError as e:
            self.note = str(e)
            self._show()
            return
        if model is None:
            return
        self.note = ""
        awaited, missing = resolve(self.missing, [model])
        others = [*(m.name for m in self.selected), *missing] if awaited else []
        self.read()
        if model.card.data["task"] == "automatic":
            self.select([model.name, *others])
            self._changed()
        else:
            self.note = _("{name} is imported; it is a model for clicks, so it is chosen under 'Click a nodule'.").format(name=model.name)
            self.onClickModel()
            self._show()

    def _onRemove(self, *_unused: Any) -> None:
        marked = [m for i, m in enumerate(self.models) if m.imported and self.ui.modelList.item(i).isSelected()]
        names = ", ".join(m.name for m in marked)
        question = _("Delete {names} from this computer? The package's file is removed.").format(names=names)
        if not slicer.util.confirmYesNoDisplay(question, windowTitle=_("Remove a model"), textFormat=qt.Qt.PlainText):
            return
        try:
            for model in marked:
                model.path.unlink(missing_ok=True)
            self.note = ""
        except OSError as e:
            self.note = _("{path} cannot be deleted ({reason}); close what uses it and try again.").format(
                path=e.filename, reason=e.strerror
            )
        self.read()
        self.missing = [name for name in self.missing if name not in {m.name for m in marked}]
        self._changed()

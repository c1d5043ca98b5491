"""The Slicer module: panel, logic and self-test. What the panel does in detail lies in UNetSegmentationPanel, and what it
computes in UNetSegmentationLib, which also works without Slicer."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Union

import qt
import slicer
import UNetSegmentationPanel
import vtk
from slicer import (
    vtkMRMLMarkupsFiducialNode,
    vtkMRMLMarkupsROINode,
    vtkMRMLScalarVolumeNode,
    vtkMRMLSegmentationNode,
    vtkMRMLTableNode,
)
from slicer.i18n import tr as _
from slicer.i18n import translate
from slicer.parameterNodeWrapper import WithinRange, parameterNodeWrapper
from slicer.ScriptedLoadableModule import (
    ScriptedLoadableModule,
    ScriptedLoadableModuleLogic,
    ScriptedLoadableModuleTest,
    ScriptedLoadableModuleWidget,
)
from slicer.util import VTKObservationMixin
from UNetSegmentationPanel import inputs, models, nodules, packages, results, retrain, run, trainingset, worklist

# ------------------------------------------------------------------------------------------------------------- module


class UNetSegmentation(ScriptedLoadableModule):
    def __init__(self, parent: Any) -> None:
        ScriptedLoadableModule.__init__(self, parent)
        self.parent.title = _("U-Net Segmentation")
        self.parent.categories = [translate("qSlicerAbstractCoreModule", "Segmentation")]
        self.parent.dependencies = ["Segmentations", "Markups"]
        self.parent.contributors = ["UNetSegmentation developers"]
        self.parent.helpText = _(
            "Segments volumes with U-Nets on any computer: no PyTorch, no server, no GPU needed. Choose a volume and a model and "
            "press Apply. For research; not for diagnosis."
        ) + (
            ' <a href="https://github.com/UNetSegmentation/SlicerUNetSegmentation">'
            + _("More information is in the documentation.")
            + "</a>"
        )
        self.parent.acknowledgementText = _(
            "Models trained on LIDC-IDRI (CC BY 3.0), the Medical Segmentation Decathlon (CC BY-SA 4.0) and the Sunnybrook Cardiac Data "
            "(public domain). "
            "The sample scans come with pyradiomics (van Griethuysen et al. 2017)."
        )
        slicer.app.connect("startupCompleted()", registerSampleData)
        slicer.app.connect("aboutToQuit()", UNetSegmentationPanel.shutdown)


SAMPLES = {"lung1": "UNetLungCT1", "lung2": "UNetLungCT2"}


def registerSampleData() -> None:
    """Two chest CT with a labelled nodule each, in the Sample Data module; see UNetSegmentationLib.sample."""
    import SampleData

    icons = Path(__file__).parent / "Resources" / "Icons"
    for name in SAMPLES.values():
        SampleData.SampleDataLogic.registerCustomSampleDataSource(
            category="U-Net Segmentation",
            sampleName=name,
            thumbnailFileName=str(icons / "UNetSegmentation.png"),
            uris="",
            fileNames=f"{name}.nrrd",
            nodeNames=name,
            customDownloader=loadSample,
        )


def loadSample(source: Any = None) -> list[Any]:
    """Load a sample scan and its nodule's label as a segmentation; [volume, segmentation].

    source: of the Sample Data module; None for the first. The files come from UNetSegmentationLib.sample.
    """
    from UNetSegmentationLib import UserError
    from UNetSegmentationLib.sample import fetch_sample

    def say(_fraction: float, text: str) -> None:
        slicer.util.showStatusMessage(text, 3000)
        slicer.app.processEvents(qt.QEventLoop.ExcludeUserInputEvents)  # or nothing is to be seen until all is downloaded

    name = source.sampleName if source is not None else SAMPLES["lung1"]
    key = next(k for k, v in SAMPLES.items() if v == name)
    try:
        with slicer.util.WaitCursor():
            paths = fetch_sample(progress=say)
    except UserError as e:
        slicer.util.errorDisplay(str(e), windowTitle=_("Sample data"), textFormat=qt.Qt.PlainText)
        return []
    volume = slicer.util.loadVolume(str(paths[key]), {"name": name})
    slicer.mrmlScene.RemoveNode(volume.GetStorageNode())  # or Save would write an edited scan over the sample
    label = slicer.util.loadLabelVolume(str(paths[key + "_label"]), {"name": f"{name} label"})
    segmentation = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentationNode", f"{name} nodule by a reader")
    segmentation.CreateDefaultDisplayNodes()
    segmentation.SetReferenceImageGeometryParameterFromVolumeNode(volume)
    slicer.modules.segmentations.logic().ImportLabelmapToSegmentationNode(label, segmentation)
    slicer.mrmlScene.RemoveNode(label)
    segmentation.GetDisplayNode().SetVisibility(False)  # the answer is not given away
    return [volume, segmentation]


# ----------------------------------------------------------------------------------------------------------- parameters


@parameterNodeWrapper
class UNetSegmentationParameterNode:
    """What a scene keeps of the panel.

    channels: the volumes of a model's channels after the first. preset: "" is the model's own window, "custom" is level
    and width (HU). models: <name>-<version>, several are averaged. tta: "" is the model's own. record: of the last result,
    see UNetSegmentationPanel.results; the nodes are that result's. nodules: the segmentation that is clicked into, with
    clickModel ("" is the newest lung-nodule-click); earlier: that of an earlier study, `days` before (0: as the studies are dated).
    """

    volume: vtkMRMLScalarVolumeNode
    channels: list[vtkMRMLScalarVolumeNode]
    region: Union[vtkMRMLMarkupsROINode, vtkMRMLMarkupsFiducialNode, None]  # noqa: UP007 - the wrapper knows this form only
    allFrames: bool = False
    preset: str = ""
    level: Annotated[float, WithinRange(-10000, 10000)] = -300
    width: Annotated[float, WithinRange(1, 20000)] = 1400
    models: list[str]
    output: vtkMRMLSegmentationNode
    replace: bool = True
    uncertainty: bool = False
    tta: str = ""
    device: str = "auto"
    engine: str = "auto"
    record: str = ""
    resultSegmentation: vtkMRMLSegmentationNode
    resultTable: vtkMRMLTableNode
    resultUncertainty: vtkMRMLScalarVolumeNode
    nodules: vtkMRMLSegmentationNode
    clickModel: str = ""
    earlier: vtkMRMLSegmentationNode
    days: int = 0


# --------------------------------------------------------------------------------------------------------------- widget


class UNetSegmentationWidget(ScriptedLoadableModuleWidget, VTKObservationMixin):
    def __init__(self, parent: Any = None) -> None:
        ScriptedLoadableModuleWidget.__init__(self, parent)
        VTKObservationMixin.__init__(self)
        self.logic: Any = None
        self.ready = False  # the models are read
        self._warm = False  # all of the core is imported
        self._parameters: Any = None
        self._guiTag: Any = None
        self._guiObservers: list[int] = []
        self._observed: Any = None
        self._updating = self._closed = False
        self._volume: Any = None  # that was chosen last
        self._earlier: Any = None  # the earlier study that was last compared with
        self._leaving: Any = None  # that is just being removed from the scene
        self._region: Any = None  # that is observed
        self._empty: Any = None  # the chosen volume as long as it has no voxels
        # Of these two, apart: removeObserver() keeps a node, and with it its voxels, removeObservers() does not.
        self._input = VTKObservationMixin()

    # ------------------------------------------------------------------------------------------------------- life cycle

    def setup(self) -> None:
        ScriptedLoadableModuleWidget.setup(self)
        root = slicer.util.loadUI(self.resourcePath("UI/UNetSegmentation.ui"))
        self.layout.addWidget(root)
        self.root, self.ui = root, slicer.util.childWidgetVariables(root)
        root.setMRMLScene(slicer.mrmlScene)
        self.logic = UNetSegmentationLogic()
        self.controller = UNetSegmentationPanel.runController()
        self.controller.addListener(self._onRun)
        self.modelList = models.ModelList(self.ui, self._onModels, self._update)
        self.channelRows = inputs.ChannelRows(self.ui, self._onChannels)
        self.torchRow = packages.TorchRow(self.ui, self._update, lambda: self.workList.leavePyTorch())
        self.nodules = nodules.NoduleSection(self.ui, root, self._keepChoice)
        self.trainingSet = trainingset.TrainingSetSection(self)
        self.workList = worklist.WorkListSection(self)
        self.sections = (self.trainingSet, self.workList, retrain.RetrainSection(self))
        self.walk = results.PlaceWalk()
        self._fillChoices()
        self._connect()
        last = -20.0  # after the selectors, those of channels too, which come later: what they do not offer yet they cannot show
        for event, method, priority in (
            (slicer.mrmlScene.StartCloseEvent, self._onSceneStartClose, 0.0),
            (slicer.mrmlScene.EndCloseEvent, self._onSceneEndClose, last),
            (slicer.mrmlScene.StartImportEvent, self._onSceneStartImport, 0.0),
            (slicer.mrmlScene.EndImportEvent, self._onSceneEndClose, last),
            (slicer.mrmlScene.NodeAboutToBeRemovedEvent, self._onNodeAboutToBeRemoved, 0.0),
            (slicer.mrmlScene.NodeRemovedEvent, self._onNodeRemoved, 0.0),
        ):
            self.addObserver(slicer.mrmlScene, event, method, priority=priority)
        self.initializeParameterNode()
        # The core, and with it the models' cards, once the panel is there to be seen.
        qt.QTimer.singleShot(0, self._readModels)

    def addSection(self, section: Any) -> None:
        """A further section's root widget, above the empty rest."""
        box = self.root.layout()
        box.insertWidget(box.count() - 1, section)

    def cleanup(self) -> None:
        """The application quits, or the module is reloaded: a run of this panel ends without a trace."""
        self._closed = True
        self.controller.removeListener(self._onRun)
        self.controller.cancel()
        self.torchRow.close()
        self.nodules.close()
        for section in reversed(self.sections):
            section.close()
        self.setParameterNode(None)
        self.removeObservers()

    def enter(self) -> None:
        self.initializeParameterNode()
        if self.ready:
            self.modelList.read()
            self._adopt()
            self.nodules.read()
            self._update()
        for section in self.sections:
            section.enter()

    def exit(self) -> None:
        self.nodules.leave()
        for section in self.sections:
            section.leave()
        self.setParameterNode(None)

    def initializeParameterNode(self) -> None:
        if self._closed:
            return
        self.setParameterNode(self.logic.getParameterNode())
        if self._parameters.volume is None:
            self._parameters.volume = inputs.likelyVolume()

    def setParameterNode(self, parameters: Any) -> None:
        """Let the widgets show and change these settings; None: of none."""
        if self._parameters is not None:
            self._disconnectParameters()
            self.removeObserver(self._observed, vtk.vtkCommand.ModifiedEvent, self._onParameters)
        self._parameters, self._guiTag, self._observed = parameters, None, None
        self._volume = self._earlier = None
        self._observeInput()
        if parameters is not None:
            self._connectParameters()
            self._observed = parameters.parameterNode
            self.addObserver(self._observed, vtk.vtkCommand.ModifiedEvent, self._onParameters)
            self._volume, self._earlier = parameters.volume, parameters.earlier
            self._adopt()
            self._update()

    def _connectParameters(self) -> None:
        """As connectGui(), which up to Slicer 5.12 does not return the tag that disconnectGui() needs; and with the observer of the
        node that both leave behind: a panel that is entered for each scan would update its widgets ever more often."""
        parameters, name = self._parameters, "SlicerParameterName"
        node, tags = parameters.parameterNode, []

        def add(*of: Any) -> int:
            tags.append(node.AddObserver(*of))
            return tags[-1]  # which a later Slicer may keep

        parameters.AddObserver = add
        try:
            self._guiTag = parameters.connectParametersToGui({w.property(name): w for w in vars(self.ui).values() if w.property(name)})
        finally:
            del parameters.AddObserver
        self._guiObservers = tags

    def _disconnectParameters(self) -> None:
        self._parameters.disconnectGui(self._guiTag)
        for tag in self._guiObservers:
            self._parameters.RemoveObserver(tag)

    def _readModels(self) -> None:
        if self._closed:
            return
        self.modelList.read()
        self.nodules.read()
        self.ready = True
        self._adopt()
        self._update()
        steps = UNetSegmentationPanel.warmUp()

        def warm() -> None:
            if self._closed:
                return
            if next(steps, steps) is steps:
                self._warm = True
                for section in self.sections:
                    section.read()
                self._update()
            else:
                qt.QTimer.singleShot(20, warm)

        qt.QTimer.singleShot(200, warm)

    def _onSceneStartClose(self, caller: Any, event: Any) -> None:
        self.setParameterNode(None)
        for table in (self.ui.segmentsTable, self.ui.show3DButton):
            table.setSegmentationNode(None)
        self.ui.measuresTable.setMRMLTableNode(None)
        self.nodules.closeScene()
        for section in self.sections:
            section.closeScene()
        results.forgetScene()

    def _onSceneStartImport(self, caller: Any, event: Any) -> None:
        # The volume's selector chooses the first scan that comes, and would put it into the settings that come with it.
        self.setParameterNode(None)

    def _onSceneEndClose(self, caller: Any, event: Any) -> None:
        self.logic.wrapper = None  # it keeps what it has read, and hears nothing of references that an imported scene brings
        if self.parent.isEntered:  # also where the module was reloaded, which is no enter()
            self.initializeParameterNode()

    @vtk.calldata_type(vtk.VTK_OBJECT)
    def _onNodeAboutToBeRemoved(self, caller: Any, event: Any, node: Any) -> None:
        self._leaving = node
        # A node selector goes on to another node by itself: the next result would go into a segmentation that nobody chose, or come
        # from a channel that is another scan.
        if self._parameters is None or node is None:
            return
        channels = list(self._parameters.channels)
        if node in channels:
            self._parameters.channels = [None if n is node else n for n in channels]
        for name in ("output", "region", "nodules", "earlier"):
            if self._parameters.getValue(name) is node:
                qt.QTimer.singleShot(0, lambda name=name: self._parameters is not None and self._parameters.setValue(name, None))

    def _onNodeRemoved(self, caller: Any, event: Any) -> None:
        self._leaving = None
        self._update()

    # ---------------------------------------------------------------------------------------------------------- widgets

    def _fillChoices(self) -> None:
        for selector in (getattr(self.ui, f"{name}Selector") for name in ("volume", "region", "output", "nodule", "earlier")):
            inputs.letShrink(selector)
        inputs.leaveWheel(*(getattr(self.ui, f"{name}Combo") for name in ("preset", "clickModel", "tta", "device", "engine")))
        for value, text in (
            ("", _("Model default")),
            ("none", _("None")),
            ("flips", _("Flips")),
            ("rotations", _("Rotations")),
            ("full", _("Flips and rotations")),
        ):
            self.ui.ttaCombo.addItem(text, value)
        self._setIcon(self.ui.warningIcon, True)

    def _connect(self) -> None:
        ui = self.ui
        for combo, name in ((ui.presetCombo, "preset"), (ui.ttaCombo, "tta"), (ui.deviceCombo, "device"), (ui.engineCombo, "engine")):
            combo.connect("currentIndexChanged(int)", lambda _index, c=combo, n=name: self._onCombo(c, n))
        ui.levelSpinBox.connect("valueChanged(double)", self._onWindowEdited)
        ui.widthSpinBox.connect("valueChanged(double)", self._onWindowEdited)
        ui.drawBoxButton.connect("clicked(bool)", lambda *_: self._placeRegion(inputs.ROI))
        ui.placePointButton.connect("clicked(bool)", lambda *_: self._placeRegion(inputs.POINTS))
        ui.applyButton.connect("clicked(bool)", lambda *_: self.onApplyOrCancel())
        ui.tryAgainButton.connect("clicked(bool)", lambda *_: self.onApply())
        ui.undoButton.connect("clicked(bool)", lambda *_: self.onUndo())
        ui.copyButton.connect("clicked(bool)", lambda *_: self.onCopy())
        ui.exportButton.connect("clicked(bool)", lambda *_: self.onExport())
        ui.nextPlaceButton.connect("clicked(bool)", lambda *_: self.onNextPlace())
        ui.mapCheckBox.connect("toggled(bool)", self.onShowMap)
        # Within the panel only, so that no key of Slicer's is taken.
        self._shortcuts = []
        for key, method in (("Ctrl+Return", self.onApply), ("Ctrl+Enter", self.onApply), ("Esc", self.onEscape)):
            shortcut = qt.QShortcut(qt.QKeySequence(key), self.root)
            shortcut.setContext(qt.Qt.WidgetWithChildrenShortcut)
            shortcut.connect("activated()", method)
            self._shortcuts.append(shortcut)

    # ------------------------------------------------------------------------------------------------ what a person does

    def _onParameters(self, caller: Any, event: Any) -> None:
        if self._updating or self._parameters is None:
            return
        p = self._parameters
        if p.volume is not self._volume:
            former, self._volume, self._updating = self._volume, p.volume, True  # all of it is shown once, below
            try:
                if former is not None:
                    p.channels = []  # they may be another patient's
                    if former.GetScene() is not None and former is not self._leaving:  # that it is gone may be what is said
                        self.controller.clear()
                        clicked, earlier, _days = nodules.keptChoice(former)
                        if earlier is not None and earlier is p.earlier:  # another frame of a sequence has taken the attribute away
                            nodules.keepChoice(former, clicked, earlier, p.days)
                if p.volume is not None:
                    self._leaveSegmentations(p)
            finally:
                self._updating = False
            self._earlier = None  # that was of the former volume
        elif p.earlier is not None and self._earlier not in (None, p.earlier) and p.days:
            p.days, self._earlier = 0, p.earlier  # these were the days to another study, and this one's dates may tell
            return  # the settings' change was followed by this again
        self._volume, self._earlier = p.volume, p.earlier or self._earlier
        self._adopt()
        self._update()

    def _leaveSegmentations(self, p: Any) -> None:
        """The segmentations of the former volume are not the place for this one's, nor is its earlier study this one's, who may be
        another patient; both are come back to with the volume."""
        clicked, p.earlier, p.days = nodules.keptChoice(p.volume)
        for name in ("output", "nodules"):
            node = p.getValue(name)
            of = inputs.referenceVolume(node)
            # One with segments but without a volume may be of a volume that was removed.
            if node is not None and of is not p.volume and (of is not None or node.GetSegmentation().GetNumberOfSegments()):
                p.setValue(name, None)
        if clicked is not None and p.nodules is None and nodules.scanOf(clicked) in (None, p.volume):
            p.nodules = clicked
        if p.nodules is None and self._warm:
            from UNetSegmentationLib import mrml

            p.nodules = mrml.find_nodules(p.volume)

    def _keepChoice(self, name: str, value: Any) -> None:
        """Into the scene's settings, also while another module is open."""
        (self._parameters or self.logic.getParameterNode()).setValue(name, value)

    def _keepModels(self, first: Any, names: list[str]) -> None:
        """Likewise models, by their names, with each channel's volume as the card of the first one (None: none) takes them."""
        p = self._parameters or self.logic.getParameterNode()
        with slicer.util.NodeModify(p):  # in between, the former models would be chosen again
            if first is not None:
                p.channels = self.channelRows.carried(first.data["channels"], (p.volume, *p.channels))
            p.models = names

    def _onModels(self) -> None:
        chosen = self.modelList.selected
        if self._parameters is not None:
            self._keepModels(chosen[0].card if chosen else None, [*(m.name for m in chosen), *self.modelList.missing])
            self._update()

    def _onChannels(self) -> None:
        if self._parameters is not None:
            self._parameters.channels = self.channelRows.nodes

    def _onCombo(self, combo: Any, name: str) -> None:
        if self._updating or self._parameters is None or combo.currentIndex < 0:
            return
        value = combo.itemData(combo.currentIndex)
        self._parameters.setValue(name, value)
        if name == "preset":
            cards = [m.card for m in self.modelList.selected]
            window = inputs.ownWindow(cards, value)
            if window is not None:
                self._parameters.level, self._parameters.width = (float(v) for v in window)
            self._showWindow()

    def _onWindowEdited(self, *_unused: Any) -> None:
        parameters = self._parameters
        if self._updating or parameters is None:
            return
        with slicer.util.NodeModify(parameters):
            parameters.preset = inputs.CUSTOM
            parameters.level, parameters.width = self.ui.levelSpinBox.value, self.ui.widthSpinBox.value
        self._showWindow()

    def _showWindow(self) -> None:
        p = self._parameters
        inputs.showWindow(p.volume, [m.card for m in self.modelList.selected], p.preset, p.level, p.width)

    def _placeRegion(self, className: str) -> None:
        if self._parameters is not None:
            name = _("Segmentation box") if className == inputs.ROI else _("Target")
            self._parameters.region = inputs.startPlacing(className, name)

    def onApplyOrCancel(self) -> None:
        if self.controller.running:
            self.onCancel()
        else:
            self.onApply()

    def onApply(self) -> None:
        for box in (self.ui.levelSpinBox, self.ui.widthSpinBox):
            box.interpretText()  # a shortcut leaves the focus, and with it what is being typed, there
        p = self._parameters
        if p is None or self.controller.running or self._problem():
            return
        intensity = inputs.chosenIntensity(p.preset, p.level, p.width)
        all_ = self._allFrames(p)
        uncertainty = p.uncertainty and not all_
        options = {"intensity": intensity, "tta": p.tta or None, "device": p.device, "engine": p.engine, "uncertainty": uncertainty}
        self.controller.start(
            run.Request(
                volumes=self._volumes(),
                region=p.region,
                models=tuple(m.path for m in self.modelList.selected),
                options=options,
                segmentation=p.output,
                replace=p.replace,
                allFrames=all_,
                former=run.Outcome(p.resultSegmentation, p.resultTable, p.resultUncertainty, p.record),
            )
        )

    def onCancel(self) -> None:
        self.controller.cancel()

    def onEscape(self) -> None:
        if self.controller.running:
            self.onCancel()
        else:
            self.nodules.tool.disarm()

    def onUndo(self) -> None:
        shown = self._parameters.resultUncertainty if self._parameters is not None else None
        views = results.mapViews(shown)
        results.showMap(shown, False)  # of views whose foreground leaves the scene nobody knows what lay there before
        outcome = self.controller.undo()
        if views and shown.GetScene() is not None:
            results.showAgain(shown, views)
        if outcome is not None:
            self._keep(outcome, undone=True)

    def _remeasure(self) -> str:
        """The result's table is of the segments as they are now, corrected or not; else why not, as one sentence."""
        from UNetSegmentationLib import mrml
        from UNetSegmentationLib.files import UserError

        node = self._parameters.resultSegmentation
        if inputs.frames(node) > 1:
            return _("The measures are of the frames as Apply left them; measure those that were corrected since with Segment Statistics.")
        try:
            mrml.complete(mrml.remeasure_steps(node))
        except UserError as e:
            return str(e)
        return ""

    def onCopy(self) -> None:
        if self._parameters is not None and self._parameters.resultTable is not None:
            failed = self._remeasure()
            qt.QApplication.clipboard().setText(results.tableText(self._parameters.resultTable, "\t"))
            slicer.util.showStatusMessage(failed or _("The measures are in the clipboard."), 5000 if failed else 3000)

    def onExport(self) -> None:
        p = self._parameters
        if p is None or p.resultTable is None:
            return
        if failed := self._remeasure():
            slicer.util.showStatusMessage(failed, 5000)
        results.saveText(_("Export the measures"), f"{p.resultTable.GetName()}.csv", results.tableText(p.resultTable, ","))

    def onNextPlace(self) -> None:
        p = self._parameters
        if p is not None:
            self.walk.next(inputs.resultVolume(p.resultSegmentation, p.resultTable))
            self.ui.placeLabel.text = self.walk.text

    def onShowMap(self, shown: bool) -> None:
        if not self._updating and self._parameters is not None:
            results.showMap(self._parameters.resultUncertainty, shown)

    # ---------------------------------------------------------------------------------------------------------- the run

    def _onRun(self) -> None:
        """The run went on or ended."""
        if self._closed:
            return
        if self.controller.phase == "done":
            self._keep(self.controller.outcome)
        self._updateRun()

    def _keep(self, outcome: Any, undone: bool = False) -> None:
        """Into the scene's settings, also while another module is open."""
        parameters = self._parameters or self.logic.getParameterNode()
        former, node = parameters.resultUncertainty, outcome.segmentation
        if former is not outcome.uncertainty and results.mapIsShown(former):  # its box is another map's from now on
            results.showMap(former, False)
            results.showMap(outcome.uncertainty, True)
        of = inputs.resultVolume(node, outcome.table)
        with slicer.util.NodeModify(parameters):
            parameters.record = outcome.record
            parameters.resultSegmentation, parameters.resultTable = node, outcome.table
            parameters.resultUncertainty = outcome.uncertainty
            # The next Apply replaces it, or adds to it: not where it is the result of a volume that was left during the run, nor of the
            # run before the one that is undone.
            if node is not None and not undone and of in (None, parameters.volume):
                parameters.output = node

    @staticmethod
    def _allFrames(p: Any) -> bool:
        return p.allFrames and inputs.frames(p.volume) > 1

    def _volumes(self) -> tuple[Any, ...]:
        return (self._parameters.volume, *self.channelRows.nodes)

    def _problem(self) -> str:
        """Why Apply cannot be pressed, as one sentence; "" where it can."""
        p, chosen = self._parameters, self.modelList.selected
        if p is None or not self.ready:
            return _("The models are being read.")
        if self.torchRow.working:
            return _("Wait until PyTorch is installed or removed.")
        if p.volume is None:
            return _("Choose a volume.")
        if p.volume.GetImageData() is None:
            return _("'{name}' has no voxels; choose another volume.").format(name=p.volume.GetName())
        if not chosen:
            return _("Choose a model.")
        if models.mismatch(chosen):
            return models.mismatch(chosen)
        names, nodes = chosen[0].card.data["channels"], self._volumes()
        for i, (name, node) in enumerate(zip(names, nodes), 1):
            if node is None or node.GetImageData() is None:
                return _("Choose a volume for '{name}'.").format(name=name)
            if text := inputs.chosenTwice(names, nodes[:i]):
                return text
        if p.region is None and any(m.card.data.get("roi_mm") for m in chosen):
            size = max(m.card.data.get("roi_mm") or 0 for m in chosen)
            return _("This model is made for a box of about {mm:g} mm around one target: press Box or Point and mark it.").format(mm=size)
        return inputs.regionProblem(p.region)

    # ------------------------------------------------------------------------------------------------- what is to be seen

    def _observeInput(self) -> None:
        """Apply depends on what is drawn, and on voxels that a new volume gets after it was chosen."""
        p = self._parameters
        volume, region = (p.volume, p.region) if p is not None else (None, None)
        empty = volume if volume is not None and volume.GetImageData() is None else None
        if empty is self._empty and region is self._region:
            return
        self._input.removeObservers()
        if empty is not None:
            self._input.addObserver(empty, vtk.vtkCommand.ModifiedEvent, self._onParameters)
        if region is not None:
            for event in (vtk.vtkCommand.ModifiedEvent, region.PointModifiedEvent, region.PointPositionDefinedEvent):
                self._input.addObserver(region, event, self._onRegion)
        self._empty, self._region = empty, region

    def _onRegion(self, caller: Any, event: Any) -> None:
        self._updateRun()

    def _adopt(self) -> None:
        """The settings' models, chosen in the list."""
        if self.ready and self._parameters is not None:
            names = list(self._parameters.models)
            if names != [m.name for m in self.modelList.selected]:
                self.modelList.select(names)
            else:
                self.modelList.missing = []

    def _update(self) -> None:
        """Let everything show the settings."""
        p = self._parameters
        if p is None or self._updating or self._closed:
            return
        self._observeInput()
        if p.volume is not None and p.volume is self._volume:  # else the settings are still another one's
            nodules.keepChoice(p.volume, p.nodules, p.earlier, p.days)
        self._updating = True
        try:
            self._updateInput(p)
            self._updateModel()
            self._updateOutput(p)
            self._updateResult(p)
        finally:
            self._updating = False
        if self._warm:
            self.nodules.show(p)
            for section in self.sections:
                section.update()
        self._updateRun()

    def _updateInput(self, p: Any) -> None:
        ui, cards = self.ui, [m.card for m in self.modelList.selected]
        self.channelRows.show(cards[0].data["channels"] if cards else [""], list(p.channels))
        ui.allFramesCheckBox.visible = inputs.frames(p.volume) > 1
        offered = inputs.offeredPresets(cards) if self.ready else []
        ui.presetLabel.visible = ui.presetCombo.visible = len(offered) > 1
        if cards and not any(name == p.preset for name, _label in offered):
            p.preset = inputs.MODEL_DEFAULT
        inputs.fill(ui.presetCombo, offered, p.preset)
        window = (p.level, p.width) if p.preset == inputs.CUSTOM else inputs.ownWindow(cards, p.preset) if cards else None
        for widget in (ui.levelLabel, ui.levelSpinBox, ui.widthSpinBox):
            widget.visible = window is not None and len(offered) > 1
        if window is not None:
            inputs.showValue(ui.levelSpinBox, window[0])
            inputs.showValue(ui.widthSpinBox, window[1])

    def _updateModel(self) -> None:
        ui, chosen = self.ui, self.modelList.selected
        text = self.modelList.note or models.mismatch(chosen)
        if not text and self.modelList.missing:
            names = ", ".join(self.modelList.missing)
            text = _("{names} is not installed here; import it or choose another model.").format(names=names)
        if not text and len(chosen) > 1:
            text = _("The answers of these {n} models are averaged.").format(n=len(chosen))
        ui.modelMessage.text = models.breakable(text)
        ui.modelMessage.visible = bool(text)

    def _updateOutput(self, p: Any) -> None:
        ui = self.ui
        ui.replaceCheckBox.visible = p.output is not None
        ui.uncertaintyCheckBox.enabled = not self._allFrames(p)
        if self._warm:
            devices, engines = run.deviceChoices(), run.engineChoices()
            if p.device not in dict(devices):
                p.device = "auto"  # of a scene from another computer
            if p.engine not in dict(engines):
                p.engine = "auto"
            inputs.fill(ui.deviceCombo, devices, p.device)
            inputs.fill(ui.engineCombo, engines, p.engine)
            self.torchRow.show(self.controller.running)
        inputs.fill(ui.ttaCombo, None, p.tta)

    def _updateResult(self, p: Any) -> None:
        ui, data = self.ui, results.readRecord(p.record)
        shown = bool(data) and p.resultSegmentation is not None
        ui.resultSection.visible = shown
        ui.segmentsTable.setSegmentationNode(p.resultSegmentation if shown else None)
        ui.show3DButton.setSegmentationNode(p.resultSegmentation if shown else None)
        if ui.measuresTable.mrmlTableNode() is not (p.resultTable if shown else None):  # the same one would lose what is selected
            ui.measuresTable.setMRMLTableNode(p.resultTable if shown else None)
        ui.measuresTable.resizeColumnsToContents()
        self.walk.set(data.get("places", ()) if shown else ())
        if not shown:
            return
        node, said = p.resultSegmentation, results.summary(data)
        of = inputs.resultVolume(node, p.resultTable)
        if of is not None and p.volume is not None and of is not p.volume:
            said = _("Of '{name}', which is not the volume chosen above.").format(name=of.GetName()) + "\n" + said
        ui.summaryLabel.text = models.breakable(said)
        warnings = "\n".join(map(str, data.get("warnings", ())))
        ui.warningFrame.visible, ui.warningLabel.text = bool(warnings), models.breakable(warnings, copied=True)
        ui.measuresTable.visible = ui.copyButton.visible = ui.exportButton.visible = p.resultTable is not None
        ui.uncertainWidget.visible = bool(data.get("uncertainty"))
        ui.mapCheckBox.visible = p.resultUncertainty is not None
        ui.mapCheckBox.checked = results.mapIsShown(p.resultUncertainty)
        ui.nextPlaceButton.enabled = bool(self.walk.places)
        ui.placeLabel.text = self.walk.text

    def _updateRun(self) -> None:
        """Apply, progress and messages; called often while a run goes on, so it looks at nothing else."""
        ui, going = self.ui, self.controller
        problem = "" if going.running else self._problem()
        ui.applyButton.text = _("Cancel") if going.running else _("Apply")
        ui.applyButton.enabled = not problem
        tip = _("Stop; the scene stays as it is. (Esc)") if going.running else problem or _("Segment. (Ctrl+Return)")
        ui.applyButton.toolTip = models.plainTip(tip)
        ui.undoButton.enabled = going.canUndo
        ui.progressBar.visible = going.running
        ui.progressLabel.visible = going.running or bool(problem)
        if problem:
            ui.progressLabel.text = models.breakable(problem)
        self.torchRow.block(going.running)
        if self.modelList.busy != going.running:
            self.modelList.busy = going.running
            self.modelList.update()
        if going.running:
            percent, left = round(100 * going.fraction), _timeLeft(going.secondsLeft)
            if ui.progressBar.value != percent:  # it repaints at once
                ui.progressBar.value = percent
            ui.progressLabel.text = f"{going.text}, {left}" if left else f"{going.text} …"
        said = "" if going.running else going.text
        ui.messageFrame.visible = bool(said)
        ui.messageLabel.text = models.breakable(said, copied=True)
        ui.tryAgainButton.visible = going.phase in ("failed", "cancelled") and not problem
        if said and ui.messageIcon.toolTip != going.phase:
            ui.messageIcon.toolTip = going.phase
            self._setIcon(ui.messageIcon, going.phase == "failed")

    def _setIcon(self, label: Any, warning: bool) -> None:
        kind = qt.QStyle.SP_MessageBoxWarning if warning else qt.QStyle.SP_MessageBoxInformation
        label.setPixmap(self.root.style().standardIcon(kind).pixmap(16, 16))


def _timeLeft(seconds: float | None) -> str:
    if seconds is None:
        return ""
    if seconds < 60:
        return _("about {n} s left").format(n=max(1, round(seconds)))
    return _("about {n} min left").format(n=round(seconds / 60))


# ---------------------------------------------------------------------------------------------------------------- logic


class UNetSegmentationLogic(ScriptedLoadableModuleLogic):
    wrapper: Any = None

    def getParameterNode(self) -> UNetSegmentationParameterNode:
        node = super().getParameterNode()
        if self.wrapper is None or self.wrapper.parameterNode is not node:
            self.wrapper = UNetSegmentationParameterNode(node)
        return self.wrapper

    def process(
        self,
        volumeNode: Any,
        model: str | Path | Sequence[str | Path] = "lung-nodule-2d",
        segmentationNode: Any = None,
        replace: bool = True,
        progress: Callable[[float, str], None] | None = None,
        *,
        roiNode: Any = None,
        worker: bool = False,
        cancelled: Callable[[], bool] | None = None,
        **options: Any,
    ) -> Any:
        """Segment a volume node and return the segmentation node. Needs no panel: for the Python console and for scripts.

        volumeNode: a volume, or one for each channel of the model, in the card's order. model: a name, a .unet.zip file, or
        several to average. segmentationNode: where to write (None: a new node); replace: take the place of this model's
        former segments there. progress(fraction, text) is called between batches and cancelled() asked. roiNode: a markups
        ROI, or a point list whose last point is the target. worker: compute in a child process, which a crash or too little
        memory cannot take Slicer down with; always so where PyTorch's own folder is there and device is "gpu" or nothing else
        has an engine. options: fields of UNetSegmentationLib.inference.predict.Options, in the first image's index space and
        LPS mm, e.g. at=(x, y, z), tta="flips", uncertainty=True (adds a scalar volume).

        Returns when it is done, without the panel's Undo. Raises UNetSegmentationLib.UserError with one sentence for the
        person, or Cancelled; the scene is then as before.

        >>> import UNetSegmentation
        >>> logic = UNetSegmentation.UNetSegmentationLogic()
        >>> node = logic.process(getNode("CT"), at=(-22, -120, -611))

        and for many scans, with no window (Slicer --no-main-window --python-script batch.py):

        >>> for path in sorted(Path("scans").glob("*.nrrd")):
        ...     volume = slicer.util.loadVolume(str(path))
        ...     node = logic.process(volume, "hippocampus-3d", worker=True)
        ...     slicer.util.saveNode(node, f"results/{path.stem}.seg.nrrd")
        ...     slicer.mrmlScene.Clear()
        """
        from UNetSegmentationLib import Options, UserError, find_model, mrml, predict
        from UNetSegmentationLib.engines import ENGINES, installed
        from UNetSegmentationPanel.installer import workerPython

        volumes = list(volumeNode) if isinstance(volumeNode, (list, tuple)) else [volumeNode]
        packages = [find_model(name) for name in ([model] if isinstance(model, (str, Path)) else model)]
        mrml.check_accepts(segmentationNode)  # before all is computed
        image = mrml.image_from_volumes(volumes)
        scene, key = volumes[0].GetScene(), run.volumeKey(volumes)
        asked = {**inputs.regionOptions(roiNode, volumes[0]), **options}
        if asked.get("at") is not None:
            asked["at"] = mrml.carried(asked["at"], mrml.image_from_volume(volumes[0]), image)
        chosen = Options(**asked)
        python, variables = workerPython()
        engines = [chosen.engine] if chosen.engine in ENGINES else ENGINES
        if worker or (python is not None and (chosen.device == "gpu" or not any(map(installed, engines)))):
            from UNetSegmentationLib.worker.client import WorkerClient

            with WorkerClient(python, variables) as client:
                prediction = client.predict(client.load_volume(image), packages, chosen, progress, cancelled)
        else:
            prediction = predict(image, packages, chosen, progress, cancelled)
        if any(node.GetScene() is not scene for node in volumes) or run.volumeKey(volumes) != key:
            text = _("'{name}' was changed or removed during the run, so nothing was written; start again.")
            raise UserError(text.format(name=volumes[0].GetName()))
        undo = mrml.Undo(scene)
        undo.begin(segmentationNode)
        node = mrml.write_prediction(prediction, volumes[0], segmentationNode, replace)
        try:
            if prediction.uncertainty is not None:
                name = f"{volumes[0].GetName()} uncertainty"
                mrml.write_scalar_map(prediction.uncertainty, volumes[0], name, "uncertainty", prediction.roi)
        except BaseException:
            undo.commit([node])
            undo.undo()
            raise
        return node


# ----------------------------------------------------------------------------------------------------------------- test


class UNetSegmentationTest(ScriptedLoadableModuleTest):
    """The whole way of a person, in Slicer: load the sample, apply, cancel, undo."""

    ROI_RAS = (8.3, 35.6), (105.2, 134.8), (-630.0, -595.0)  # about twice the nodule of the first sample scan

    DICE = 0.6  # it is 0.666: the model outlines more generously than that label
    CLICK_DICE = 0.5  # of one click; what the models reach is in the README

    def setUp(self) -> None:
        slicer.mrmlScene.Clear()

    def runTest(self, **_unused: Any) -> None:
        for test in (self.test_panel, self.test_click, self.test_logic):
            self.setUp()
            test()
        self.delayDisplay("Test passed")

    def test_panel(self) -> None:
        volume, label = self.load()
        widget = self.panel()
        self.wait(lambda: widget.ready, 30, "the models to be read")
        settings, controller = widget._parameters, widget.controller
        before = slicer.mrmlScene.GetNumberOfNodesByClass("vtkMRMLSegmentationNode")

        self.delayDisplay("Choose volume, model and box")
        settings.volume = volume
        settings.models = ["lung-nodule-2d-1.2.1"]
        settings.region = self.box()
        settings.uncertainty = True
        slicer.app.processEvents()
        self.assertTrue(widget.ui.applyButton.enabled, widget.ui.applyButton.toolTip)

        self.delayDisplay("Apply and cancel")
        widget.ui.applyButton.click()
        self.assertTrue(controller.running)
        widget.ui.applyButton.click()
        self.assertEqual(controller.phase, "cancelled")
        self.assertEqual(slicer.mrmlScene.GetNumberOfNodesByClass("vtkMRMLSegmentationNode"), before)

        self.delayDisplay("Apply")
        widget.ui.applyButton.click()
        self.wait(lambda: not controller.running, 300, "the segmentation")
        self.assertEqual(controller.phase, "done", controller.text)
        dice = self.dice(settings.output, label, volume)
        self.delayDisplay(f"Dice {dice:.3f}")
        self.assertGreater(dice, self.DICE)
        self.assertEqual(settings.resultTable.GetTable().GetNumberOfRows(), 1)
        self.assertIsNotNone(settings.resultUncertainty)

        self.delayDisplay("Undo")
        widget.ui.undoButton.click()
        slicer.app.processEvents()
        self.assertEqual(slicer.mrmlScene.GetNumberOfNodesByClass("vtkMRMLSegmentationNode"), before)
        self.assertIsNone(settings.resultUncertainty)

    def test_click(self) -> None:
        volume, label = self.load()
        widget = self.panel()
        self.wait(lambda: widget._warm, 60, "the panel to be ready")
        widget._parameters.volume = volume
        slicer.app.processEvents()
        tool = widget.nodules.tool
        self.delayDisplay("Click a nodule")
        widget.ui.clickButton.click()
        self.assertTrue(tool.armed)
        tool.click([sum(ends) / 2 for ends in self.ROI_RAS])
        self.wait(lambda: not tool.busy, 300, "the nodule")
        self.assertIsNotNone(widget._parameters.nodules, tool.text)
        dice = self.dice(widget._parameters.nodules, label, volume)
        self.delayDisplay(f"Dice {dice:.3f}")
        self.assertGreater(dice, self.CLICK_DICE)
        self.wait(lambda: widget.ui.noduleTable.rowCount == 1, 30, "the table")

        self.delayDisplay("Undo the click")
        widget.ui.undoClickButton.click()
        slicer.app.processEvents()
        self.assertIsNone(widget._parameters.nodules)

    def test_logic(self) -> None:
        self.delayDisplay("Segment without the panel")
        volume, label = self.load()
        node = UNetSegmentationLogic().process(volume, roiNode=self.box(), worker=True)
        self.assertGreater(self.dice(node, label, volume), self.DICE)

    def panel(self) -> Any:
        """The one that is shown: once there was a second, Slicer's Reload would take that, which is gone by then."""
        widget = slicer.util.getModuleWidget("UNetSegmentation")
        widget.initializeParameterNode()
        return widget

    def load(self) -> list[Any]:
        self.delayDisplay("Load the sample scan")
        nodes = loadSample()
        if not nodes:
            self.skipTest("the sample scans cannot be had here; see UNetSegmentationLib/sample.py")
        self.assertIsNone(nodes[0].GetStorageNode())
        return nodes

    def box(self) -> Any:
        roi = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLMarkupsROINode")
        roi.SetCenterWorld([sum(ends) / 2 for ends in self.ROI_RAS])
        roi.SetSizeWorld([b - a for a, b in self.ROI_RAS])
        return roi

    def dice(self, segmentation: Any, label: Any, volume: Any) -> float:
        from UNetSegmentationLib.measure import dice
        from UNetSegmentationLib.mrml import segment_mask

        masks = (segment_mask(node, node.GetSegmentation().GetNthSegmentID(0), volume) for node in (segmentation, label))
        return dice(*masks)

    def wait(self, condition: Callable[[], bool], seconds: float, what: str) -> None:
        until = time.monotonic() + seconds
        while not condition():
            self.assertLess(time.monotonic(), until, f"waited {seconds} s for {what}")
            slicer.app.processEvents()
            time.sleep(0.005)

"""The stand-ins themselves: what Slicer refuses they refuse, what Slicer does they do, and no more than that."""

from __future__ import annotations

import ast
import enum
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Optional, Union

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
PANEL = [ROOT / "UNetSegmentation" / "UNetSegmentation.py", *sorted((ROOT / "UNetSegmentation" / "UNetSegmentationPanel").glob("*.py"))]

UI = """<?xml version="1.0" encoding="UTF-8"?>
<ui version="4.0"><class>Toy</class>
<widget class="qMRMLWidget" name="Toy"><layout class="QVBoxLayout" name="rows">
<item><widget class="ctkCollapsibleButton" name="inputSection"><property name="text"><string>Input</string></property>
<layout class="QFormLayout" name="form">
<item row="0" column="0"><widget class="QLabel" name="volumeLabel"><property name="text"><string>&amp;Volume</string></property>
<property name="buddy"><cstring>volumeSelector</cstring></property></widget></item>
<item row="0" column="1"><widget class="qMRMLNodeComboBox" name="volumeSelector">
<property name="nodeTypes"><stringlist><string>vtkMRMLScalarVolumeNode</string></stringlist></property>
<property name="addEnabled"><bool>false</bool></property><property name="removeEnabled"><bool>false</bool></property>
<property name="SlicerParameterName" stdset="0"><string>volume</string></property></widget></item>
<item row="1" column="1"><widget class="QDoubleSpinBox" name="levelBox">
<property name="SlicerParameterName" stdset="0"><string>level</string></property></widget></item>
<item row="2" column="1"><widget class="QCheckBox" name="flagBox"><property name="text"><string>Flag</string></property>
<property name="SlicerParameterName" stdset="0"><string>flag</string></property></widget></item>
<item row="3" column="1"><widget class="QComboBox" name="modeBox">
<property name="SlicerParameterName" stdset="0"><string>mode</string></property></widget></item>
</layout></widget></item>
<item><widget class="ctkCollapsibleButton" name="moreSection"><property name="text"><string>More</string></property>
<property name="collapsed"><bool>true</bool></property>
<layout class="QVBoxLayout" name="more"><item><widget class="QLineEdit" name="moreEdit"/></item></layout></widget></item>
<item><widget class="QPushButton" name="applyButton"><property name="text"><string>Apply</string></property></widget></item>
<item><widget class="qMRMLSegmentsTableView" name="segmentsTable"/></item>
</layout></widget>
<customwidgets>
<customwidget><class>qMRMLWidget</class><extends>QWidget</extends><header>qMRMLWidget.h</header><container>1</container></customwidget>
<customwidget><class>ctkCollapsibleButton</class><extends>QWidget</extends><header>ctkCollapsibleButton.h</header>
<container>1</container></customwidget>
<customwidget><class>qMRMLNodeComboBox</class><extends>QWidget</extends><header>qMRMLNodeComboBox.h</header></customwidget>
<customwidget><class>qMRMLSegmentsTableView</class><extends>QWidget</extends><header>qMRMLSegmentsTableView.h</header></customwidget>
</customwidgets>
<connections><connection><sender>Toy</sender><signal>mrmlSceneChanged(vtkMRMLScene*)</signal><receiver>volumeSelector</receiver>
<slot>setMRMLScene(vtkMRMLScene*)</slot></connection></connections>
</ui>
"""
MODULE = """
import enum
from typing import Annotated

import qt
import slicer
import vtk
from slicer import vtkMRMLScalarVolumeNode
from slicer.i18n import tr as _
from slicer.parameterNodeWrapper import WithinRange, parameterNodeWrapper
from slicer.ScriptedLoadableModule import *
from slicer.util import VTKObservationMixin


class Mode(enum.Enum):
    FAST = "fast"
    GOOD = "good"


@parameterNodeWrapper
class Parameters:
    volume: vtkMRMLScalarVolumeNode
    level: Annotated[float, WithinRange(-1000, 1000)] = 40
    flag: bool = True
    mode: Mode = Mode.GOOD
    names: list[str]


class Toy(ScriptedLoadableModule):
    def __init__(self, parent):
        super().__init__(parent)
        parent.title = _("Toy")
        parent.categories = ["Segmentation"]
        slicer.app.connect("startupCompleted()", self.started)
        self.calls = []

    def started(self):
        self.calls.append("started")


class ToyWidget(ScriptedLoadableModuleWidget, VTKObservationMixin):
    def __init__(self, parent=None):
        ScriptedLoadableModuleWidget.__init__(self, parent)
        VTKObservationMixin.__init__(self)
        self.calls, self.parameters, self.tag = [], None, None

    def setup(self):
        super().setup()
        root = slicer.util.loadUI(self.resourcePath("UI/Toy.ui"))
        self.layout.addWidget(root)
        self.ui = slicer.util.childWidgetVariables(root)
        root.setMRMLScene(slicer.mrmlScene)
        self.logic = ToyLogic()
        self.addObserver(slicer.mrmlScene, slicer.mrmlScene.StartCloseEvent, self.start)
        self.addObserver(slicer.mrmlScene, slicer.mrmlScene.EndCloseEvent, self.end)
        self.ui.applyButton.connect("clicked(bool)", self.apply)
        self.take()

    def take(self):
        self.give_back()
        # Kept: Python's collector counts a node's observers as the node's alone. Were the node's only Python references in a
        # cycle with its observers, as connectGui() makes one, it would empty functions that VTK goes on to call: a crash.
        self.node = self.logic.getParameterNode()
        self.parameters = Parameters(self.node)
        named = {w.property("SlicerParameterName"): w for w in vars(self.ui).values() if w.property("SlicerParameterName")}
        self.tag = self.parameters.connectParametersToGui(named)

    def give_back(self):
        if self.parameters:
            self.parameters.disconnectGui(self.tag)
        self.parameters = None

    def start(self, caller, event):
        self.calls.append("start close")
        self.give_back()

    def end(self, caller, event):
        self.calls.append("end close")
        if self.parent.isEntered:
            self.take()

    def enter(self):
        self.calls.append("enter")

    def exit(self):
        self.calls.append("exit")

    def cleanup(self):
        self.calls.append("cleanup")
        self.removeObservers()
        self.give_back()

    def apply(self):
        with slicer.util.tryWithErrorDisplay("Failed to apply."):
            raise ValueError("No volume")


class ToyLogic(ScriptedLoadableModuleLogic):
    pass
"""


@pytest.fixture
def toy(gui: Any, tmp_path: Path) -> Any:
    """The widget of a small module as Slicer's template has it."""
    (tmp_path / "Toy" / "Resources" / "UI").mkdir(parents=True)
    (tmp_path / "Toy" / "Toy.py").write_text(MODULE, "utf-8")
    (tmp_path / "Toy" / "Resources" / "UI" / "Toy.ui").write_text(UI, "utf-8")
    return gui.open("Toy", tmp_path / "Toy" / "Toy.py")


def add_volume(name: str = "CT") -> Any:
    import slicer

    return slicer.util.addVolumeFromArray(np.zeros((4, 5, 6), np.float32), name=name)


def add_segmentation(*names: str) -> Any:
    import slicer

    node = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentationNode")
    node.CreateDefaultDisplayNodes()
    for name in names:
        node.GetSegmentation().AddEmptySegment(name, name)
    return node


def selector(**properties: Any) -> Any:
    import slicer

    combo = slicer.qMRMLNodeComboBox()
    combo.nodeTypes = ["vtkMRMLScalarVolumeNode"]
    combo.addEnabled = combo.removeEnabled = False
    for name, value in properties.items():
        setattr(combo, name, value)
    combo.setMRMLScene(slicer.mrmlScene)
    return combo


# --- qt --------------------------------------------------------------------------------------------------------------


def test_properties_are_attributes(gui: Any) -> None:
    import qt

    button = qt.QPushButton("Apply")
    assert button.text == "Apply" and button.enabled and button.isEnabled() and not button.checked
    button.text, button.enabled, button.name = "Go", False, "goButton"
    assert (button.text, button.isEnabled(), button.objectName, button.className()) == ("Go", False, "goButton", "QPushButton")
    with pytest.raises(TypeError):
        button.text()
    with pytest.raises((TypeError, ValueError)):
        button.text = None
    parent = qt.QWidget()
    qt.QVBoxLayout(parent).addWidget(button)
    assert parent.goButton is button and parent.findChild(qt.QPushButton, "goButton") is button
    assert parent.findChildren("QPushButton") == (button,) and parent.findChild("QLabel", "goButton") is None


@pytest.mark.parametrize("name", ["txt", "Text", "exec", "set_text", "isChecked_"])
def test_unknown_names_are_refused(gui: Any, name: str) -> None:
    import qt

    button = qt.QPushButton()
    with pytest.raises(AttributeError):
        getattr(button, name)
    with pytest.raises(AttributeError, match="not allowed" if name != "exec" else ""):
        setattr(button, name, 1)


def test_methods_cannot_be_overwritten(gui: Any) -> None:
    import qt

    with pytest.raises(AttributeError, match="overwritten"):
        qt.QWidget().closeEvent = print
    with pytest.raises(AttributeError, match="overwritten"):
        qt.QPushButton().clicked = print


def test_a_python_subclass_may_have_attributes_of_its_own(gui: Any) -> None:
    import qt

    class Box(qt.QWidget):
        pass

    box = Box()
    box.mine = 3
    box.enabled = False
    assert box.mine == 3 and not box.isEnabled()


@pytest.mark.parametrize("name", ["Signal", "Slot", "Property", "QThread", "QRunnable", "QPushbutton", "QtCore"])
def test_names_that_slicer_lacks_or_the_house_forbids(gui: Any, name: str) -> None:
    import qt

    assert not hasattr(qt, name)


def test_members_newer_than_qt_5_are_refused(gui: Any) -> None:
    import qt

    for owner, name in (
        (qt.QCheckBox(), "checkStateChanged"),
        (qt.QFormLayout(), "setRowVisible"),
        (qt.QByteArray(), "first"),
        (qt.QColor, "fromString"),
        (qt.QApplication.styleHints(), "colorScheme"),
        (qt.Qt, "ColorScheme"),
    ):
        with pytest.raises(AttributeError):
            getattr(owner, name)


def test_enums_are_ints(gui: Any) -> None:
    import qt

    got: list[Any] = []
    box = qt.QCheckBox()
    box.connect("stateChanged(int)", got.append)
    box.click()
    assert got == [qt.Qt.Checked] and got[0] == 2 and qt.QMessageBox.Yes | qt.QMessageBox.No == 0x14000
    label = qt.QLabel()
    label.alignment = qt.Qt.AlignRight | qt.Qt.AlignVCenter
    assert label.alignment == 0x82


def test_lists_are_tuples(gui: Any) -> None:
    import qt

    widget = qt.QListWidget()
    widget.addItem("a")
    widget.item(0).setSelected(True)
    assert isinstance(widget.selectedItems(), tuple) and widget.selectedItems()[0].text() == "a"
    assert isinstance(widget.children(), tuple) and isinstance(qt.QSettings().allKeys(), tuple)


def test_connect_wants_the_exact_signature_and_passes_what_is_taken(gui: Any) -> None:
    import qt

    button, got = qt.QPushButton(), []
    button.checkable = True
    button.connect("clicked(bool)", lambda checked: got.append(("bool", checked)))
    button.connect("clicked(bool)", lambda: got.append("fewer"))
    button.connect("clicked()", lambda *a: got.append(("none", a)))
    button.connect("clicked(bool)", lambda *a: got.append(("all", a)))
    button.clicked.connect(lambda: got.append("attribute"))
    button.click()
    assert got == [("bool", True), "fewer", ("none", ()), ("all", (True,)), "attribute"]
    for wrong in ("click()", "clicked(int)", "toggled()", "", "checkStateChanged(Qt::CheckState)"):
        with pytest.raises(ValueError, match="no signal"):
            button.connect(wrong, print)
    with pytest.raises(TypeError):
        button.connect("clicked()", None)
    with pytest.raises(TypeError):
        button.connect(button.clicked, print)


def test_disconnect(gui: Any) -> None:
    import qt

    class Receiver:
        def __init__(self) -> None:
            self.count = 0

        def called(self) -> None:
            self.count += 1

    button, receiver = qt.QPushButton(), Receiver()
    button.connect("clicked()", receiver.called)
    button.click()
    assert button.disconnect("clicked()", receiver.called) and not button.disconnect("clicked()", receiver.called)
    button.click()
    assert receiver.count == 1
    button.connect("clicked()", receiver.called)
    button.connect("clicked()", lambda: receiver.called())
    button.connect("clicked(bool)", receiver.called)
    assert button.disconnect("clicked()")  # all of this signature
    button.click()
    assert receiver.count == 2


def test_a_signal_may_be_connected_to_a_slot_by_name(gui: Any) -> None:
    import qt

    button, box = qt.QPushButton(), qt.QCheckBox()
    box.checked = True
    button.connect("clicked()", box, "toggle()")
    button.click()
    assert not box.checked


def test_a_failing_slot_timer_or_observer_fails_the_test(gui: Any) -> None:
    import qt
    import slicer

    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    button = qt.QPushButton()
    button.connect("clicked()", fail)
    button.click()
    qt.QTimer.singleShot(0, fail)
    gui.wait(lambda: len(gui.errors) == 2)
    tag = slicer.mrmlScene.AddObserver(slicer.mrmlScene.NodeAddedEvent, fail)
    slicer.mrmlScene.AddNewNodeByClass("vtkMRMLTextNode")
    slicer.mrmlScene.RemoveObserver(tag)
    assert len(gui.errors) == 3 and all("ZeroDivisionError" in e for e in gui.errors)
    gui.errors.clear()


def test_timers(gui: Any) -> None:
    import qt

    got: list[str] = []
    timer = qt.QTimer()
    timer.singleShot, timer.interval = True, 1
    timer.connect("timeout()", lambda: got.append("timer"))
    timer.start()
    qt.QTimer.singleShot(0, lambda: got.append("static"))
    gui.wait(lambda: len(got) == 2)
    assert sorted(got) == ["static", "timer"] and not timer.active
    with pytest.raises(AssertionError, match="did not come true"):
        gui.wait(lambda: False, 0.05)


def test_process(gui: Any) -> None:
    import qt

    process, got = qt.QProcess(), []
    process.connect("finished(int,QProcess::ExitStatus)", lambda code, status: got.append((code, status)))
    process.connect("errorOccurred(QProcess::ProcessError)", got.append)
    process.start(sys.executable, ["-c", "print(input() * 2)"])
    process.write(b"ab\n")
    gui.wait(lambda: got)
    assert got == [(0, qt.QProcess.NormalExit)] and process.readAllStandardOutput().data().split() == [b"abab"]
    assert process.state() == qt.QProcess.NotRunning
    process.start("/no/such/program", [])
    gui.wait(lambda: len(got) == 2)
    assert got[1] == qt.QProcess.FailedToStart


def test_the_reference_count_of_none_lasts(gui: Any) -> None:
    import qt

    label, before = qt.QLabel(), sys.getrefcount(None)
    for _ in range(100):
        label.setText("x")
    assert sys.getrefcount(None) - before > -1000 and sys.getrefcount(None) > 1 << 20


def test_settings_are_the_tests_own(gui: Any) -> None:
    import qt
    import slicer

    qt.QSettings().setValue("Toy/folder", "x")
    assert slicer.app.userSettings().value("Toy/folder") == "x" and slicer.util.settingsValue("Toy/folder", "") == "x"
    assert str(gui.folder) in slicer.app.slicerUserSettingsFilePath
    assert slicer.util.settingsValue("Toy/other", 5, converter=int) == 5
    with pytest.raises(TypeError):
        qt.QSettings().value("Toy/folder", "", type=str)


# --- dialogs ---------------------------------------------------------------------------------------------------------


def test_dialogs_are_answered_by_the_test(gui: Any, tmp_path: Path) -> None:
    import qt
    import slicer

    gui.dialogs.answer(True, False, "Retry", tmp_path / "a.zip", [tmp_path / "b"], "", 1, "name", qt.QMessageBox.No)
    assert slicer.util.confirmOkCancelDisplay("Sure?") and not slicer.util.confirmYesNoDisplay("Really?", windowTitle="T")
    assert slicer.util.confirmRetryCloseDisplay("Again?")
    assert qt.QFileDialog.getOpenFileName(None, "Open", "", "*.zip") == str(tmp_path / "a.zip")
    assert qt.QFileDialog.getOpenFileNames(None, "Open") == [str(tmp_path / "b")]
    assert qt.QFileDialog.getExistingDirectory(None, "Folder") == ""
    dialog = qt.QDialog()
    dialog.windowTitle = "Card"
    assert dialog.exec_() == 1 and not dialog.visible
    assert qt.QInputDialog.getText(None, "Rename", "Name:") == "name"
    assert qt.QMessageBox.question(None, "Title", "Go?") == qt.QMessageBox.No
    slicer.util.errorDisplay("Broken", detailedText="why")
    slicer.util.delayDisplay("Wait", 100)
    qt.QDesktopServices.openUrl(qt.QUrl.fromLocalFile(str(tmp_path)))
    assert gui.dialogs.texts("message") == ["Sure?", "Really?", "Again?", "Go?"]
    assert gui.dialogs.texts("error") == ["Broken"] and gui.dialogs.texts("dialog") == ["Card"]
    assert gui.dialogs.texts("url") == [f"file://{tmp_path}"]


def test_a_dialog_is_shown_to_the_answer(gui: Any) -> None:
    import qt

    def answer(dialog: Any) -> None:
        assert dialog.visible
        dialog.findChild(qt.QPushButton, "ok").click()

    dialog = qt.QDialog()
    button = qt.QPushButton("OK", dialog)
    button.name = "ok"
    button.connect("clicked()", dialog, "accept()")
    gui.dialogs.answer(answer)
    assert dialog.exec_() == qt.QDialog.Accepted


def test_a_message_box_with_buttons_of_its_own(gui: Any) -> None:
    import qt

    box = qt.QMessageBox()
    box.text = "What now?"
    again = box.addButton("&Try again", qt.QMessageBox.AcceptRole)
    box.addButton(qt.QMessageBox.Cancel)
    gui.dialogs.answer("Try again")
    box.exec_()
    assert box.clickedButton() is again
    gui.dialogs.answer("Give up")
    with pytest.raises(AssertionError, match="no button"):
        box.exec_()


def test_a_dialog_that_nobody_expects_is_an_error(gui: Any) -> None:
    import qt
    import slicer

    with pytest.raises(AssertionError, match="no answer to the message: Sure"):
        slicer.util.confirmYesNoDisplay("Sure?")
    with pytest.raises(AssertionError, match="no answer to the file"):
        qt.QFileDialog.getSaveFileName(None, "Save")


# --- .ui files and CTK ------------------------------------------------------------------------------------------------


def test_a_ui_file_is_loaded(toy: Any, gui: Any) -> None:
    import slicer

    ui = toy.ui
    assert ui.inputSection.className() == "ctkCollapsibleButton" and ui.volumeSelector.nodeTypes == ("vtkMRMLScalarVolumeNode",)
    assert ui.volumeSelector.mrmlScene() is slicer.mrmlScene and ui.volumeSelector.property("SlicerParameterName") == "volume"
    assert ui.moreSection.collapsed and not ui.moreEdit.visible and ui.levelBox.visible
    gui.click(ui.moreSection, 40, 5)
    assert not ui.moreSection.collapsed and ui.moreEdit.visible


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (("ctkCollapsibleButton", "ctkCollapsableButton"), "no stand-in for ctkCollapsableButton"),
        (('name="addEnabled"', 'name="addEnable"'), "has no property addEnable"),
        (('<property name="collapsed">', '<property name="colapsed">'), "has no property colapsed"),
        (("<slot>setMRMLScene(", "<slot>setMrmlScene("), "setMrmlScene"),
    ],
)
def test_mistakes_in_a_ui_file(gui: Any, tmp_path: Path, change: tuple[str, str], error: str) -> None:
    import slicer

    (tmp_path / "toy.ui").write_text(UI.replace(*change), "utf-8")
    with pytest.raises((RuntimeError, AttributeError), match=error):
        slicer.util.loadUI(str(tmp_path / "toy.ui"))


def test_collapsing_keeps_what_the_owner_hid(gui: Any) -> None:
    import ctk
    import qt

    button, got = ctk.ctkCollapsibleButton("Section"), []
    layout = qt.QVBoxLayout(button)
    shown, hidden, later = qt.QLabel("a"), qt.QLabel("b"), qt.QLabel("c")
    for label in (shown, hidden, later):
        layout.addWidget(label)
    hidden.hide()
    window = qt.QWidget()
    rows = qt.QVBoxLayout(window)
    rows.addWidget(button)
    rows.addStretch()
    window.show()
    gui.process_events()
    tall = button.height
    button.connect("contentsCollapsed(bool)", got.append)
    button.collapsed = True
    later.hide()
    hidden.show()
    assert got == [True] and not shown.visible and not hidden.visible and not button.checked
    gui.process_events()
    assert button.height < tall
    button.checked = True
    assert got == [True, False] and shown.visible and hidden.visible and not later.visible
    with pytest.raises(AttributeError):
        button.setCollapsed(True)  # no slot
    with pytest.raises(AttributeError, match="does not accept"):
        button.contentsFrameShape = qt.QFrame.StyledPanel


def test_standins_show_only_names_of_the_real_class(gui: Any) -> None:
    """What the classes add to Qt's are Q_PROPERTYs, slots, Q_INVOKABLEs, signals and virtuals; their own names start with _."""
    from pythonqt import standins

    virtual = {"childEvent", "eventFilter", "changeEvent", "sizeHint", "minimumSizeHint", "hitButton", "paintEvent", "signals_", "standin"}
    known = {
        "ctkMenuButton": set(),
        "qMRMLWidget": {"mrmlScene", "setMRMLScene", "mrmlSceneChanged"},
        "qMRMLSegmentationShow3DButton": {"segmentationNode", "setSegmentationNode", "locked", "setLocked"},
        "ctkCollapsibleButton": set(
            "contentsCollapsed collapsed collapsedHeight flat contentsFrameShape contentsFrameShadow contentsLineWidth "
            "contentsMidLineWidth buttonTextAlignment indicatorAlignment".split()
        ),
    }
    for name, members in known.items():
        own = {n for n in vars(standins[name]) if not n.startswith("_") and n not in ("staticMetaObject",)}
        assert own - virtual == members, name


# --- MRML widgets ----------------------------------------------------------------------------------------------------


def test_the_node_selector_follows_the_scene(gui: Any) -> None:
    import slicer

    combo, got = selector(), []
    combo.connect("currentNodeChanged(vtkMRMLNode*)", lambda node: got.append(node and node.GetName()))
    combo.connect("currentNodeChanged(bool)", got.append)
    combo.connect("currentNodeIDChanged(QString)", lambda node_id: got.append(node_id))
    first = add_volume("CT")
    assert got == ["CT", True, first.GetID()] and combo.currentNode() is first
    second = add_volume("MR")
    assert combo.currentNode() is first and combo.nodeCount() == 2 and combo.nodeFromIndex(1) is second
    got.clear()
    combo.setCurrentNode(second)
    second.SetName("MR 2")
    assert got[0] == "MR" and got[3] == "MR 2" and len(got) == 6
    slicer.mrmlScene.RemoveNode(second)
    assert combo.currentNode() is first
    gui.close_scene()
    assert combo.currentNode() is None and combo.currentNodeID == "" and combo.nodeCount() == 0


def test_the_current_node_is_gone_before_it_left_the_scene(gui: Any) -> None:
    import slicer

    volume = add_volume()
    combo, present = selector(noneEnabled=True), []
    combo.setCurrentNodeID(volume.GetID())
    combo.connect("currentNodeChanged(vtkMRMLNode*)", lambda node: present.append((node, bool(slicer.mrmlScene.IsNodePresent(volume)))))
    slicer.mrmlScene.RemoveNode(volume)
    assert present == [(None, True)]


def test_a_node_selector_with_none_or_actions_selects_nothing_by_itself(gui: Any) -> None:
    import slicer

    for properties in ({"noneEnabled": True}, {"addEnabled": True}):
        combo = selector(**properties)
        volume = add_volume()
        assert combo.currentNode() is None
        combo.setCurrentNode(volume)
        combo.setCurrentNode(None)
        assert combo.currentNode() is None
        with pytest.raises(ValueError):
            combo.setCurrentNode("CT")
        slicer.mrmlScene.RemoveNode(volume)


def test_what_the_node_selector_offers(gui: Any) -> None:
    import slicer

    combo = selector(noneEnabled=True)
    labels = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLLabelMapVolumeNode")
    hidden = add_volume("hidden")
    assert combo.nodeCount() == 2
    hidden.SetHideFromEditors(True)
    assert combo.nodeCount() == 1
    combo.showChildNodeTypes = False
    assert combo.nodeCount() == 0
    combo.showHidden = True
    assert [combo.nodeFromIndex(0), combo.nodeFromIndex(1)] == [hidden, None]
    combo.showChildNodeTypes = True
    combo.hideChildNodeTypes = ["vtkMRMLLabelMapVolumeNode"]
    assert combo.nodeCount() == 1
    labels.SetAttribute("kind", "map")
    combo.hideChildNodeTypes = []
    combo.addAttribute("vtkMRMLScalarVolumeNode", "kind", "map")
    assert combo.nodeFromIndex(0) is labels and combo.nodeCount() == 1


def test_nodes_are_added_by_the_node_selector(gui: Any) -> None:
    combo, got = selector(addEnabled=True, baseName="Result"), []
    combo.connect("nodeAddedByUser(vtkMRMLNode*)", got.append)
    node = combo.addNode()
    assert node.GetName() == "Result" and combo.currentNode() is node and got == [node]
    assert combo.addNode("vtkMRMLModelNode") is None
    combo.removeCurrentNode()
    assert combo.nodeCount() == 0


def test_a_node_selector_remembers_what_was_wanted_before_its_scene(gui: Any) -> None:
    import slicer

    add_volume("CT")
    wanted = add_volume("MR")
    combo = slicer.qMRMLNodeComboBox()
    combo.nodeTypes = ["vtkMRMLScalarVolumeNode"]
    assert not combo.enabled
    combo.setCurrentNodeID(wanted.GetID())
    combo.setMRMLScene(slicer.mrmlScene)
    assert combo.enabled and combo.currentNode() is wanted


def test_names_that_python_cannot_reach(gui: Any) -> None:
    import qt

    combo = selector()
    for name in ("nodes", "setNodeTypes", "setNoneEnabled", "model", "comboBox", "count", "currentText"):
        with pytest.raises(AttributeError):
            getattr(combo, name)
    with pytest.raises(AttributeError):
        combo.noneEnable = True
    with pytest.raises(AttributeError, match="does not accept"):
        combo.sizeAdjustPolicy = qt.QComboBox.AdjustToMinimumContentsLengthWithIcon
    with pytest.raises(ValueError):
        combo.connect("currentNodeChanged()", print)


def test_a_destroyed_selector_does_not_observe(gui: Any) -> None:
    combo = selector()
    combo.deleteLater()
    gui.process_events()
    add_volume()


def test_segments_table(gui: Any) -> None:
    import slicer

    node = add_segmentation("nodule", "lung")
    view, got = slicer.qMRMLSegmentsTableView(), []
    view.setMRMLScene(slicer.mrmlScene)
    view.connect("selectionChanged(QItemSelection,QItemSelection)", lambda *_: got.append(view.selectedSegmentIDs()))
    view.setSegmentationNode(node)
    assert view.segmentCount == 2 and view.displayedSegmentIDs() == ("nodule", "lung")
    view.setSelectedSegmentIDs(["lung"])
    assert view.selectedSegmentIDs() == ("lung",) and got == [("lung",)]
    node.GetSegmentation().GetSegment("lung").SetName("left lung")
    node.GetSegmentation().AddEmptySegment("new", "new")
    assert view.segmentCount == 3 and view.selectedSegmentIDs() == ("lung",)
    view.opacityColumnVisible = False
    table = view.tableWidget()
    assert table.isColumnHidden(2) and not table.isColumnHidden(3)
    view.show()
    area = table.visualRect(table.model().index(0, 0)).center()
    gui.click(table.viewport(), area.x(), area.y())
    assert not node.GetDisplayNode().GetSegmentVisibility("nodule")
    view.textFilter = "NEW"
    assert view.displayedSegmentIDs() == ("new",)
    with pytest.raises(ValueError):
        view.setSegmentationNode(add_volume())
    slicer.mrmlScene.RemoveNode(node)
    view.setSegmentationNode(None)
    assert view.segmentCount == 0 and view.segmentationNode() is None


def test_show_3d_button(gui: Any) -> None:
    import slicer

    name = slicer.vtkSegmentationConverter.GetSegmentationClosedSurfaceRepresentationName()
    node = add_segmentation("nodule")
    mask = slicer.vtkOrientedImageData()
    mask.SetDimensions(6, 6, 6)
    mask.AllocateScalars(3, 1)
    mask.GetPointData().GetScalars().Fill(0)
    for z in range(2, 4):
        mask.SetScalarComponentFromDouble(3, 3, z, 0, 1)
    slicer.vtkSlicerSegmentationsModuleLogic.SetBinaryLabelmapToSegment(mask, node, "nodule")
    button = slicer.qMRMLSegmentationShow3DButton()
    assert not button.enabled
    button.setSegmentationNode(node)
    button.show()
    gui.click(button)
    assert button.checked and node.GetSegmentation().ContainsRepresentation(name)
    gui.click(button)
    assert not button.checked and not node.GetSegmentation().ContainsRepresentation(name)
    button.locked = True
    assert not button.enabled


def test_table_view(gui: Any) -> None:
    import qt
    import slicer

    node = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLTableNode")
    for column in ("Segment", "Volume"):
        node.AddColumn().SetName(column)
        node.SetColumnTitle(column, f"{column} [ml]" if column == "Volume" else column)
    node.AddEmptyRow()
    node.SetCellText(0, 0, "nodule")
    node.SetCellText(0, 1, "1.5")
    view = slicer.qMRMLTableView()
    view.setMRMLScene(slicer.mrmlScene)
    view.setMRMLTableNode(node)
    model = view.model()
    texts = [[model.index(r, c).data() for c in range(model.columnCount())] for r in range(model.rowCount())]
    assert texts == [["Segment", "Volume [ml]"], ["nodule", "1.5"]] and not view.firstRowLocked
    view.setFirstRowLocked(True)
    assert node.GetUseColumnTitleAsColumnHeader() and view.model().rowCount() == 1
    assert view.model().headerData(1, qt.Qt.Horizontal) == "Volume [ml]"
    view.selectAll()
    view.copySelection()
    assert qt.QApplication.clipboard().text() == "nodule\t1.5"
    with pytest.raises(ValueError):
        view.setMRMLTableNode(add_volume())


# --- parameter nodes -------------------------------------------------------------------------------------------------


class Kind(enum.Enum):
    ONE = 1
    TWO = 2


@pytest.fixture
def parameters(gui: Any) -> Any:
    import slicer
    from slicer.parameterNodeWrapper import Choice, Default, Minimum, parameterNodeWrapper
    from slicer.ScriptedLoadableModule import ScriptedLoadableModuleLogic

    kinds = {  # in a class body they would be texts here, of names that are no globals
        "volume": slicer.vtkMRMLScalarVolumeNode,
        "either": Union[slicer.vtkMRMLScalarVolumeNode, slicer.vtkMRMLSegmentationNode, None],  # noqa: UP007
        "count": Annotated[int, Minimum(1)],
        "ratio": Annotated[float, Default(0.5)],
        "word": Annotated[str, Choice(["a", "b"])],
        "flag": bool,
        "kind": Kind,
        "maybe": Optional[float],  # noqa: UP045
        "words": list[str],
        "pair": Annotated[tuple[int, str], Default((1, "x"))],
    }
    wrapper = parameterNodeWrapper(type("Parameters", (), {"__annotations__": kinds, "count": 3, "word": "a", "kind": Kind.TWO}))
    gui.kept.append(ScriptedLoadableModuleLogic().getParameterNode())  # see ToyWidget.take
    return lambda: wrapper(gui.kept[-1])


def test_parameters_have_types_and_defaults(parameters: Any) -> None:
    p = parameters()
    assert (p.volume, p.either, p.count, p.ratio, p.word, p.flag, p.kind) == (None, None, 3, 0.5, "a", False, Kind.TWO)
    assert (p.maybe, p.words, p.pair) == (None, [], (1, "x"))
    for name, value in (("count", 0), ("count", None), ("word", "c")):
        with pytest.raises(ValueError):
            setattr(p, name, value)
    for name, value in (("count", 1.5), ("flag", 1), ("kind", "ONE"), ("volume", "CT"), ("maybe", "x"), ("words", [1])):
        with pytest.raises(TypeError):
            setattr(p, name, value)
    with pytest.raises(ValueError):
        p.setValue("nothing", 1)
    assert p.words == [] and p.count == 3 and p.dataType("flag") is bool


def test_parameters_are_in_the_node(parameters: Any) -> None:
    """Under the names and texts under which Slicer keeps them, so that a scene from Slicer is read the same way."""
    p, volume = parameters(), add_volume()
    events: list[str] = []
    tag = p.AddObserver("ModifiedEvent", lambda *_: events.append(p.word))
    p.volume, p.either, p.count, p.flag, p.kind, p.maybe, p.pair = volume, volume, 7, True, Kind.ONE, 2.5, (2, "y")
    p.words = ["x"]
    p.words.append("y")
    p.words += ["z"]
    p.words[0] = "w"
    events.clear()
    p.word = "b"
    assert events == ["b"]
    p.RemoveObserver(tag)
    node = p.parameterNode
    kept = {n: node.GetParameter(n) for n in node.GetParameterNames()}
    assert kept["count"] == "7" and kept["flag"] == "True" and kept["kind"] == "ONE" and kept["maybe_0"] == "2.5"
    assert [kept["words_len"], kept["words_0"], kept["words_2"]] == ["3", "w", "z"] and kept["pair_1"] == "y"
    assert node.GetNodeReference("volume") is volume and node.GetNodeReference("either_0") is volume
    other = parameters()
    assert other.words == ["w", "y", "z"] and other.kind is Kind.ONE and other.pair == (2, "y")
    other.words = []
    assert p.words == [] and not node.HasParameter("words_0")
    p.maybe = None
    assert other.maybe is None


def test_types_that_slicer_cannot_keep(gui: Any) -> None:
    from slicer.parameterNodeWrapper import parameterNodeWrapper

    for kind in (object, float | None, set[int]):
        with pytest.raises(TypeError):
            parameterNodeWrapper(type("P", (), {"__annotations__": {"x": kind}}))
    with pytest.raises(ValueError, match="reserved"):
        parameterNodeWrapper(type("P", (), {"__annotations__": {"x": int}, "connectGui": 1}))


def test_parameters_and_widgets(gui: Any, parameters: Any) -> None:
    import qt

    p = parameters()
    ui = SimpleNamespace(count=qt.QSpinBox(), flag=qt.QCheckBox(), word=qt.QComboBox(), kind=qt.QComboBox(), volume=selector())
    for name, widget in vars(ui).items():
        widget.setProperty("SlicerParameterName", name)
    ui.volume.noneEnabled = True
    tag = p.connectParametersToGui(vars(ui))
    assert parameters().connectGui(SimpleNamespace()) is None
    assert ui.count.value == 3 and ui.count.minimum == 1 and ui.word.currentText == "a" and ui.kind.currentText == "TWO"
    ui.count.value, ui.flag.checked, ui.word.currentIndex, ui.kind.currentIndex = 9, True, 1, 0
    assert (p.count, p.flag, p.word, p.kind) == (9, True, "b", Kind.ONE)
    p.count, p.volume = 4, add_volume()
    assert ui.count.value == 4 and ui.volume.currentNode() is p.volume
    p.disconnectGui(tag)
    ui.count.value, p.flag = 5, False
    assert p.count == 4 and ui.flag.checked


def test_pairs_of_widget_and_type_that_slicer_does_not_connect(gui: Any, parameters: Any) -> None:
    import qt

    p = parameters()
    for name, widget in (
        ("words", qt.QListWidget()),
        ("flag", qt.QRadioButton()),
        ("count", qt.QDoubleSpinBox()),
        ("maybe", qt.QLineEdit()),
    ):
        with pytest.raises(RuntimeError, match="Unable to create GUI connector"):
            p.connectParametersToGui({name: widget})
    with pytest.raises(RuntimeError, match="slider"):
        p.connectParametersToGui({"count": qt.QSlider()})


# --- modules and the scene -------------------------------------------------------------------------------------------


def test_a_module_is_opened(toy: Any, gui: Any) -> None:
    import slicer

    module = slicer.modules.toy
    assert module.title == "Toy" and list(module.categories) == ["Segmentation"] and module.name == "Toy" and module.path.endswith("Toy.py")
    assert slicer.modules.ToyInstance.calls == ["started"] and toy.calls == ["enter"] and toy.parent.isEntered
    assert slicer.modules.ToyWidget is toy and module.widgetRepresentation().self() is toy
    assert slicer.util.getModuleWidget("Toy") is toy and slicer.util.getModuleLogic("Toy") is toy.logic
    assert gui.open("Toy") is toy and toy.calls == ["enter"]
    gui.leave(toy)
    assert toy.calls == ["enter", "exit"] and gui.open("Toy") is toy and toy.calls[-1] == "enter"
    with pytest.raises(AttributeError):
        module.titel = "x"
    assert slicer.util.mainWindow() is None
    with pytest.raises(RuntimeError):
        slicer.util.selectModule("Toy")


def test_errors_are_shown_and_raised(toy: Any, gui: Any) -> None:
    gui.click(toy.ui.applyButton)
    assert gui.dialogs.texts("error") == ["Failed to apply.\n\nNo volume"]
    assert "ValueError: No volume" in gui.errors.pop()


@pytest.mark.parametrize("name", ["scene.mrb", "scene.mrml"])
def test_settings_survive_saving_and_loading(toy: Any, gui: Any, tmp_path: Path, name: str) -> None:
    import slicer

    volume = add_volume()
    if name.endswith(".mrml"):
        slicer.util.saveNode(volume, str(tmp_path / "CT.nrrd"))
    ui = toy.ui
    assert toy.parameters.volume is volume
    ui.levelBox.value, ui.flagBox.checked, ui.modeBox.currentIndex = -600, False, 0
    toy.parameters.names = ["a", "b"]
    gui.save_scene(tmp_path / name)
    gui.close_scene()
    assert toy.calls[-2:] == ["start close", "end close"]
    assert ui.levelBox.value == 40 and ui.flagBox.checked and toy.parameters.names == [] and ui.volumeSelector.currentNode() is None
    gui.load_scene(tmp_path / name)
    p = toy.parameters
    assert (p.level, p.flag, p.mode.name, list(p.names)) == (-600, False, "FAST", ["a", "b"])
    toy.take()  # what enter() or an observer of EndImportEvent does
    assert p.volume.GetName() == "CT" and ui.volumeSelector.currentNode() is p.volume and ui.levelBox.value == -600


def test_a_module_is_reloaded(toy: Any, gui: Any) -> None:
    import slicer

    toy.ui.levelBox.value = 77
    parent = toy.parent
    new = gui.reload("Toy")
    assert new is not toy and type(new) is not type(toy) and new.parent is parent and slicer.modules.ToyWidget is new
    assert toy.calls == ["enter", "cleanup"] and new.calls == [] and new.ui.levelBox.value == 77
    assert new.ui.applyButton.visible and not toy.ui.applyButton.visible
    gui.close_scene()
    assert toy.calls == ["enter", "cleanup"] and new.calls == ["start close", "end close"]


def test_two_widgets_of_a_module(toy: Any, gui: Any) -> None:
    other = gui.open_another("Toy")
    assert other is not toy and other.calls == []
    other.ui.levelBox.value = 12
    assert toy.ui.levelBox.value == 12


def test_a_module_is_closed(toy: Any, gui: Any) -> None:
    gui.close(toy)
    assert toy.calls == ["enter", "exit", "cleanup"]
    add_volume()
    assert gui.open("Toy") is not toy


def test_the_application(gui: Any) -> None:
    import qt
    import slicer

    app = slicer.app
    assert (app.majorVersion, app.minorVersion, app.applicationName) == (5, 12, "Slicer")
    assert Path(app.temporaryPath).is_dir() and app.applicationLogic().GetSelectionNode() is not None
    assert "PATH" in slicer.util.startupEnvironment()
    assert app.palette().color(qt.QPalette.Window).isValid()
    manager = app.layoutManager()
    assert manager.sliceViewNames() == ("Red", "Green", "Yellow") and manager.sliceWidget("Blue") is None
    node = manager.sliceWidget("Red").mrmlSliceNode()
    node.JumpSliceByCentering(1, 2, 30)
    assert node.GetSliceToRAS().GetElement(2, 3) == 30
    manager.setLayout(slicer.vtkMRMLLayoutNode.SlicerLayoutOneUpRedSliceView)
    assert manager.layout == slicer.vtkMRMLLayoutNode.SlicerLayoutOneUpRedSliceView
    changed: list[int] = []
    manager.connect("layoutChanged(int)", changed.append)
    node = manager.layoutLogic().GetLayoutNode()
    node.AddLayoutDescription(999, '<layout><item><view class="vtkMRMLSliceNode" singletontag="Mine"></view></item></layout>')
    before = manager.layout
    node.SetViewArrangement(999)  # a module's own layout, by its node
    assert set(changed[:-1]) == {before} and changed[-1] == 999  # told for a description too
    assert manager.sliceWidget("Mine").mrmlSliceNode().GetLayoutName() == "Mine"
    assert manager.sliceWidget("Mine").mrmlSliceCompositeNode() is not None
    told = len(changed)
    manager.setLayout(999)
    assert len(changed) == told
    node.AddMaximizedViewNode(manager.sliceWidget("Mine").mrmlSliceNode())
    assert changed[told:] == [999]
    manager.disconnect("layoutChanged(int)", changed.append)
    node.SetViewArrangement(node.SlicerLayoutFourUpView)
    assert node.GetNumberOfMaximizedViewNodes() == 1  # the node keeps what fills all; the manager does not
    manager.setLayout(998)  # unknown
    assert manager.layout == node.SlicerLayoutConventionalView and node.GetNumberOfMaximizedViewNodes() == 0
    slicer.util.setSliceViewerLayers(background=add_volume(), fit=True)
    for name in ("mainWindow", "aplicationLogic"):
        with pytest.raises(AttributeError):
            getattr(app, name)


def test_packages(gui: Any) -> None:
    import slicer

    got: list[Any] = []
    assert slicer.packaging.pip_check("numpy>=1") and not slicer.packaging.pip_check(["numpy", "numpy>=999"])
    gui.pip.installed = {"numpy": None}
    assert not slicer.packaging.pip_check("numpy")
    gui.dialogs.answer(True)
    slicer.packaging.pip_ensure(["numpy>=1", "pytest"], requester="Toy")
    assert [c[:2] for c in gui.pip.calls] == [("pip_ensure", ["numpy>=1"])]
    gui.dialogs.answer(False)
    with pytest.raises(RuntimeError, match="declined"):
        slicer.packaging.pip_ensure("numpy")

    def fail(requirements: list[str]) -> None:
        raise subprocess.CalledProcessError(1, "pip", "no network")

    gui.pip.run = fail
    with pytest.raises(subprocess.CalledProcessError):
        slicer.util.pip_install("numpy")
    slicer.packaging.pip_install("numpy", blocking=False, logCallback=got.append, completedCallback=got.append)
    assert slicer.packaging.isPipInstallInProgress() and not got
    gui.wait(lambda: len(got) == 2)
    assert got == ["no network", 1]
    with pytest.raises(TypeError):
        slicer.packaging.pip_install("numpy", progress=True)
    gui.use_slicer("5.10")
    assert not hasattr(slicer, "packaging") and slicer.app.minorVersion == 10
    with pytest.raises(ImportError):
        import slicer.packaging  # noqa: F401
    with pytest.raises(TypeError):
        slicer.util.pip_install("numpy", blocking=False)


def test_sample_data_is_registered(gui: Any) -> None:
    from SampleData import SampleDataLogic

    SampleDataLogic.registerCustomSampleDataSource(category="Toy", sampleName="Lung", uris="https://example.org/a.nrrd")
    assert SampleDataLogic.sources[0]["sampleName"] == "Lung"
    with pytest.raises(TypeError):
        SampleDataLogic.registerCustomSampleDataSource(sampleNames="Lung")


# --- the test's hands -------------------------------------------------------------------------------------------------


def test_mouse_and_keys(gui: Any) -> None:
    import qt

    window, got = qt.QWidget(), []
    layout = qt.QVBoxLayout(window)
    button, edit = qt.QPushButton("Apply"), qt.QLineEdit()
    layout.addWidget(button)
    layout.addWidget(edit)
    shortcut = qt.QShortcut(qt.QKeySequence("Ctrl+Return"), window)
    shortcut.connect("activated()", lambda: got.append("shortcut"))
    button.connect("clicked()", lambda: got.append("clicked"))
    with pytest.raises(AssertionError, match="cannot be seen"):
        gui.click(button)
    window.show()
    gui.click(button)
    gui.press(edit, "a")
    gui.press(button, "Ctrl+Return")
    button.enabled = False
    gui.click(button)
    assert got == ["clicked", "shortcut"] and edit.text == "a"


def test_a_held_event_loop_is_measured(gui: Any) -> None:
    import qt

    def hold() -> None:
        end = time.process_time() + 0.2
        while time.process_time() < end:
            pass

    with gui.longest_block() as longest:
        time.sleep(0.3)  # the machine's time is not ours
        gui.process_events()
        assert longest[0] < 0.2
        qt.QTimer.singleShot(5, hold)
        gui.wait(lambda: longest[0] >= 0.2)


def test_pictures(toy: Any, gui: Any, tmp_path: Path) -> None:
    import qt

    toy.ui.segmentsTable.setSegmentationNode(add_segmentation("nodule"))
    shown = {}
    for name, options in {"light": {}, "dark": {"dark": True}, "narrow": {"width": 380}}.items():
        size = gui.grab(toy, tmp_path / f"{name}.png", **options)
        image = qt.QImage(str(tmp_path / f"{name}.png"))
        assert (image.width(), image.height()) == size and size[1] > 150
        shown[name] = (size[0], qt.QColor(image.pixel(2, 2)).lightness())
    assert shown["light"][1] > 200 and shown["dark"][1] < 80 and shown["narrow"][0] == 380


# --- the panel against Slicer's names ----------------------------------------------------------------------------------


def chains(tree: ast.AST) -> set[str]:
    """Every dotted name that begins with qt, ctk or slicer.app/util."""
    found = set()
    for node in ast.walk(tree):
        parts: list[str] = []
        while isinstance(node, ast.Attribute):
            parts.insert(0, node.attr)
            node = node.value
        if parts and isinstance(node, ast.Name) and (node.id in ("qt", "ctk") or node.id == "slicer" and parts[0] in ("app", "util")):
            found.add(".".join([node.id, *parts]))
    return found


@pytest.mark.parametrize("path", PANEL, ids=lambda p: p.name)
def test_the_panel_uses_only_names_that_are_there(gui: Any, path: Path) -> None:
    """Also in the branches that no test runs; and enums without the name of their type, which is not there for Python."""
    import ctk
    import qt
    import slicer

    missing = []
    for chain in sorted(chains(ast.parse(path.read_text("utf-8")))):
        first, *names = chain.split(".")
        thing: Any = {"qt": qt, "ctk": ctk, "slicer": slicer}[first]
        for name in names:
            owner = thing
            if isinstance(owner, type) and issubclass(owner, enum.Enum) or not hasattr(owner, name):
                missing.append(chain)
                break
            thing = getattr(owner, name)
            if not isinstance(thing, type) and thing is not slicer.app and thing is not slicer.util:
                break
    assert not missing


# --- the child process -------------------------------------------------------------------------------------------------

CHILD = "UNETSEG_PANEL_CHILD"
INNER = """
import os
import pytest

def test_pass(gui): pass
def test_fail(gui): assert 1 == 2, "as it should"
def test_skip(gui): pytest.skip("a reason")
@pytest.mark.xfail(reason="known")
def test_xfail(gui): assert False
def test_slot(gui):
    import qt
    b = qt.QPushButton(); b.connect("clicked()", lambda: 1 / 0); b.click()
@pytest.mark.parametrize("n", [1, 2])
def test_many(gui, n): pass
def test_crash(gui): os._exit(9)
def test_after(gui): pass
"""


@pytest.mark.parametrize(
    ("chosen", "outcome", "code"),
    [
        ([], ["5 passed", "3 failed", "1 skipped", "1 xfailed", "1 error"], 1),
        (["-k", "pass or many or skip or outer"], ["4 passed", "1 skipped", "5 deselected"], 0),
        (["-k", "nothing"], ["10 deselected"], 5),
    ],
)
def test_results_of_the_child_are_reported(tmp_path: Path, chosen: list[str], outcome: list[str], code: int) -> None:
    panel = tmp_path / "panel"
    panel.mkdir()
    (panel / "conftest.py").write_text((Path(__file__).parent / "conftest.py").read_text("utf-8"), "utf-8")
    (panel / "standins").symlink_to(Path(__file__).parent / "standins")
    (panel / "test_inner.py").write_text(INNER, "utf-8")
    (tmp_path / "test_outer.py").write_text(f"import os\ndef test_outer(): assert {CHILD!r} not in os.environ\n")
    environment = {k: v for k, v in os.environ.items() if k != CHILD}
    command = [sys.executable, "-m", "pytest", "-ra", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), "-c", os.devnull, str(tmp_path)]
    done = subprocess.run([*command, *chosen], cwd=tmp_path, env=environment, capture_output=True, text=True)
    last = done.stdout.strip().splitlines()[-1]
    assert done.returncode == code and all(o in last for o in outcome), done.stdout
    if not chosen:
        for line in ("as it should", "ended with 9", "SKIPPED", "a reason", "ZeroDivisionError", "XFAIL"):
            assert line in done.stdout

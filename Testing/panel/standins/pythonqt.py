"""`qt` as PythonQt gives it in Slicer 5.10/5.12 (Qt 5.15), on PySide6.

PythonQt's rules that PySide6 does not have, after commontk/PythonQt, src/PythonQtInstanceWrapper.cpp and
src/PythonQtSignalReceiver.cpp: properties are attributes and hide the getter of the same name (`label.text`, never
`label.text()`), `name` is objectName, a child is an attribute by its name, new attributes on Qt objects are refused, enums
are ints, `connect("clicked(bool)", f)` wants the exact signature and passes `f` no more arguments than it takes, file
dialogs give the path alone, and dialogs run with exec_(). What only PySide6 has is refused, as are QThread and its kin,
which the house rules forbid. Modal dialogs do not wait here: `dialogs` answers them.
"""

from __future__ import annotations

import ctypes
import inspect
import os
import re
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

if "PySide6" in sys.modules:
    raise RuntimeError("PySide6 was imported before the stand-ins: its enums are no ints then")
sys.pyside6_option_python_enum = 2  # type: ignore[attr-defined]  # every enum an IntEnum
os.environ.setdefault("QT_QPA_PLATFORM", "offscreen")
if sys.version_info < (3, 12):
    # PySide6 6.12 is built for the immortal None of Python 3.12, and each call without a result takes a reference from
    # None: after some thousand calls Python would end with "deallocating None".
    ctypes.c_ssize_t.from_address(id(None)).value += 1 << 40

from PySide6 import QtCore, QtGui, QtUiTools, QtWidgets  # noqa: E402

# The house rules forbid threads. The others came after Qt 5.15, or only PySide6 has them.
FORBIDDEN = "QThread QThreadPool QRunnable QMutex QSemaphore QWaitCondition QReadWriteLock".split()
FORBIDDEN += "QEnum QFlag QPyTextObject QIOPipe QKeyCombination QRangeModel QDirListing QStringConverter QStringDecoder".split()
# Members that came after Qt 5.15, or that only PySide6 has: those that a panel might be tempted to use.
QT6_ONLY = {
    "Qt": "ColorScheme",
    "QAbstractItemView": "itemDelegateForIndex updateThreshold setUpdateThreshold keyboardSearchFlags setKeyboardSearchFlags",
    "QAbstractSpinBox": "returnPressed",
    "QAction": "associatedObjects resetEnabled enabledChanged visibleChanged checkableChanged",
    "QByteArray": "assign erase first last percentDecoded removeAt removeFirst removeLast slice sliced",
    "QCheckBox": "checkStateChanged",
    "QColor": "fromString isValidColorName toTuple",
    "QComboBox": "labelDrawingMode setLabelDrawingMode LabelDrawingMode",
    "QCoreApplication": "checkPermission instanceExists requestPermission shutdown",
    "QDate": "toPython",
    "QDateTime": "toPython addDuration",
    "QFileInfo": "junctionTarget readSymLink stat",
    "QFont": "setFeature setVariableAxis legacyWeight setLegacyWeight",
    "QFormLayout": "isRowVisible setRowVisible",
    "QHeaderView": "isSortIndicatorClearable setSortIndicatorClearable",
    "QIcon": "ThemeIcon",
    "QMessageBox": "Option options setOption setOptions testOption",
    "QObject": "isQmlExposed",
    "QPalette": "accent setAccent",
    "QPixmap": "deviceIndependentSize",
    "QProcess": "startCommand failChildProcessModifier setUnixProcessParameters unixProcessParameters",
    "QShortcut": "keys setKeys",
    "QStackedWidget": "widgetAdded",
    "QStandardPaths": "StateLocation GenericStateLocation TemplatesLocation PublicShareLocation",
    "QStyleHints": "colorScheme colorSchemeChanged setColorScheme unsetColorScheme",
    "QTimer": "id intervalAsDuration remainingTimeAsDuration",
    "QWidget": "accessibleIdentifier setAccessibleIdentifier setScreen",
}

# Lists of Qt are tuples in PythonQt; here those that a panel may get.
LISTS = {
    "QFileDialog": "selectedFiles",
    "QItemSelectionModel": "selectedColumns selectedIndexes selectedRows",
    "QListWidget": "findItems selectedItems",
    "QMessageBox": "buttons",
    "QObject": "children dynamicPropertyNames",
    "QProcess": "arguments",
    "QProcessEnvironment": "keys toStringList",
    "QSettings": "allKeys childGroups childKeys",
    "QTableWidget": "findItems selectedItems",
    "QWidget": "actions",
}

qt = ModuleType("qt")
for _module in (QtCore, QtGui, QtWidgets):
    vars(qt).update({n: getattr(_module, n) for n in dir(_module) if re.match(r"Q[A-Z]|Qt$", n) and n not in FORBIDDEN})
sys.modules["qt"] = qt


def _print(kind: Any, context: Any, text: str) -> None:
    if "propagateSizeHints" not in text:  # the off-screen platform says it of every window
        print(text, file=sys.stderr)


QtCore.qInstallMessageHandler(_print)
_getters: dict[type, Any] = {}  # PySide6's own, of each class that has one, and then of those derived from it


def _object_getattribute(self: Any, name: str) -> Any:
    cls = type(self)
    if cls not in _getters:
        _getters[cls] = next(_getters[c] for c in cls.__mro__ if c in _getters)
    return _getters[cls](self, name)


class Dialogs:
    """What was shown to the user, and the answers that the test gives to what is shown next.

    `shown`: (kind, text) in order; kinds are "error", "warning", "info", "delay", "file", "message", "dialog", "input",
    "menu" and "url". Answers are taken in order by all but error, warning, info, delay and url: a path (or list of paths,
    "" for cancelled) for file; the button's text or value, or True or False for accepting or rejecting, for message, which
    are also slicer.util.confirm...Display(); the text for input; the action's text for menu; for a dialog a callable, given
    the dialog that is shown then, whose result exec_() returns, or that result. A callable is called for the others too,
    with where it begins for file, else with the text.
    """

    def __init__(self) -> None:
        self.shown: list[tuple[str, str]] = []
        self.answers: list[Any] = []

    def answer(self, *answers: Any) -> None:
        self.answers.extend(answers)

    def show(self, kind: str, text: str) -> None:
        self.shown.append((kind, str(text)))

    def ask(self, kind: str, text: str, given: Any = None) -> Any:
        self.show(kind, text)
        if not self.answers:
            raise AssertionError(f"the test has no answer to the {kind}: {text}")
        answer = self.answers.pop(0)
        return answer(text if given is None else given) if callable(answer) else answer

    def texts(self, kind: str) -> list[str]:
        return [t for k, t in self.shown if k == kind]

    def clear(self) -> None:
        self.shown.clear()
        self.answers.clear()


dialogs = Dialogs()


# --- properties are attributes ---------------------------------------------------------------------------------------


class _Absent:
    """A member of the class that is not to be found."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, instance: Any, owner: type) -> Any:
        raise AttributeError(f"{owner.__name__} has no attribute named '{self.name}'")


class _Property(property):
    """A property of the instances; the class keeps the function of that name, such as QTimer.singleShot."""

    def __init__(self, get: Any, put: Any, plain: Any) -> None:
        super().__init__(get, put)
        self.plain = plain

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self.plain if instance is None else super().__get__(instance, owner)


def _property(cls: type, meta: QtCore.QMetaProperty) -> property:
    name = meta.name()
    capital = name[0].upper() + name[1:]
    names = ("is" + capital, "has" + capital, name) if meta.typeName() == "bool" else (name,)
    getter = next((g for g in (getattr(cls, n, None) for n in names) if callable(g)), None)
    setter = getattr(cls, "set" + capital, None)
    if issubclass(cls, QtCore.QCoreApplication):  # static ones
        getter = setter = None

    def get(self: Any) -> Any:
        return self.property(name) if getter is None else getter(self)

    def put(self: Any, value: Any) -> None:
        try:
            if setter is not None and value is not None:
                return setter(self, value)
        except TypeError:
            if not isinstance(value, int):  # an enum as a plain int
                raise
        if value is None or not self.setProperty(name, value):
            raise ValueError(f"Property '{name}' of type '{meta.typeName()}' does not accept {value!r}")
        return None

    return _Property(get, put if meta.isWritable() else None, getattr(cls, name, None))


def adapt(cls: type) -> None:
    """Makes attributes of the properties of a Qt class, also of those that it inherits and gives a getter of its own."""
    meta = cls.staticMetaObject  # type: ignore[attr-defined]
    for index in range(meta.propertyCount()):
        entry = meta.property(index)
        name = entry.name()
        own = index >= meta.propertyOffset() or name in cls.__dict__
        if own and not isinstance(cls.__dict__.get(name), property):
            setattr(cls, name, _property(cls, entry))


def _is_qt(cls: type) -> bool:
    return cls.__module__.startswith("PySide6")


def _qt_classes() -> list[type]:
    found = [c for m in (QtCore, QtGui, QtWidgets, QtUiTools) for c in vars(m).values()]
    return sorted({c for c in found if isinstance(c, type) and issubclass(c, QtCore.QObject)}, key=lambda c: (len(c.__mro__), c.__name__))


# --- attributes ------------------------------------------------------------------------------------------------------

# PySide6's own, and Qt's that PythonQt names otherwise.
_absent: dict[str, tuple[type, ...]] = {}
HIDDEN = {"exec", "emit", "receivers", "sender", "isSignalConnected", "dumpObjectInfo", "dumpObjectTree"}


def _getattribute(self: Any, name: str) -> Any:
    if name == "connect":
        return lambda *arguments: _connect(self, *arguments)
    if name == "disconnect":
        return lambda *arguments: _disconnect(self, *arguments)
    if name in HIDDEN or isinstance(self, _absent.get(name, ())):
        raise AttributeError(f"{type(self).__name__} has no attribute named '{name}'")
    try:
        return _object_getattribute(self, name)
    except AttributeError:
        if name.startswith("_"):
            raise
        value = _object_getattribute(self, "property")(name)
        if value is not None:
            return value
        for child in _object_getattribute(self, "children")():
            if child.objectName == name:
                return child
        raise AttributeError(f"{type(self).__name__} has no attribute named '{name}'") from None


def _setattr(self: Any, name: str, value: Any) -> None:
    cls = type(self)
    known = inspect.getattr_static(cls, name, None)
    derived = not _is_qt(cls) and "standin" not in cls.__dict__
    if isinstance(known, property):
        known.__set__(self, value)
    elif type(known) is QtCore.Property:
        if isinstance(value, int) and type(value) is not bool:
            value = int(value)  # VTK's enums are ints, but PySide6 does not see it
        if not self.setProperty(name, value):
            raise ValueError(f"Property '{name}' of {cls.__name__} does not accept {value!r}")
    elif name.startswith("_") or isinstance(value, QtCore.SignalInstance):  # PySide6 keeps bound signals so
        self.__dict__[name] = value
    elif _loading:
        pass  # PySide6's loader makes attributes of the children
    elif known is not None and not derived:
        raise AttributeError(f"'{name}' can not be overwritten on {cls.__name__} object")
    elif derived:
        self.__dict__[name] = value
    elif name.encode() in [bytes(n.data()) for n in self.dynamicPropertyNames()]:
        self.setProperty(name, value)
    else:
        raise AttributeError(
            f"Attribute '{name}' does not exist on {cls.__name__} and creation of new attributes on C++ objects is not allowed"
        )


# --- signals ---------------------------------------------------------------------------------------------------------


def _normal(text: str) -> str:
    return bytes(QtCore.QMetaObject.normalizedSignature(text.removeprefix("2").strip())).decode()


def _signal(sender: Any, text: str) -> tuple[str, int]:
    """The name of PySide6's signal and the number of its arguments, for an exact signature. ValueError if there is none."""
    signature = _normal(text)
    arguments = signature[signature.find("(") + 1 : -1]
    count = len(arguments.split(",")) if arguments else 0
    for cls in type(sender).__mro__:
        if signature in cls.__dict__.get("signals_", {}):
            return cls.__dict__["signals_"][signature], count
        if "signals_" in cls.__dict__ and signature.split("(")[0] in cls.__dict__["signals_"].values():
            break  # the stand-in's Python signal, under a signature that the real class does not have
    else:
        if sender.metaObject().indexOfSignal(signature) >= 0:
            return signature.split("(")[0], count
    raise ValueError(f"QObject::connect: no signal {text!r} in {sender.className()}")


def _takes(slot: Callable[..., Any]) -> int | None:
    """How many arguments PythonQt passes to `slot` at most; None: all."""
    function = getattr(slot, "__func__", slot)
    code = getattr(function, "__code__", None)
    if code is None or code.co_flags & inspect.CO_VARARGS:
        return None
    return code.co_argcount - (function is not slot)


def _connect(sender: Any, *arguments: Any) -> bool:
    if len(arguments) == 3 and isinstance(arguments[2], str):  # signal, receiver, "slot()"
        signal, receiver, name = arguments
        slot = getattr(receiver, name.removeprefix("1").split("(")[0])
    elif len(arguments) == 2 and isinstance(arguments[0], str):
        signal, slot = arguments
    else:
        raise TypeError("connect() takes a signal's signature and a callable, or a signature, a receiver and a slot's signature")
    if not callable(slot):
        raise TypeError(f"{slot!r} is not callable")
    name, given = _signal(sender, signal)
    limit = _takes(slot)
    taken = given if limit is None else min(limit, given)
    # PySide6 passes as many arguments as a function declares.
    call = (
        lambda: slot(),
        lambda a: slot(*(a,)[:taken]),
        lambda a, b: slot(*(a, b)[:taken]),
        lambda a, b, c: slot(*(a, b, c)[:taken]),
    )[given]
    _object_getattribute(sender, name).connect(call)
    sender.__dict__.setdefault("_slots", []).append((_normal(signal), slot, call))
    return True


def _disconnect(sender: Any, *arguments: Any) -> bool:
    """False where there was nothing to disconnect, as in PythonQt."""
    name, _ = _signal(sender, arguments[0])
    signature = _normal(arguments[0])
    slot = arguments[1] if len(arguments) == 2 else getattr(arguments[1], arguments[2].split("(")[0]) if len(arguments) == 3 else None
    kept = sender.__dict__.setdefault("_slots", [])
    found = [k for k in kept if k[0] == signature and (slot is None or k[1] == slot)]
    for entry in found if slot is None else found[:1]:
        kept.remove(entry)
        _object_getattribute(sender, name).disconnect(entry[2])
    return bool(found)


# --- what PythonQt adds to QObject, and what it names otherwise -------------------------------------------------------


def _class_name(self: Any) -> str:
    return type(self).__name__


def _matches(child: Any, kind: Any) -> bool:
    return kind in [c.__name__ for c in type(child).__mro__] if isinstance(kind, str) else isinstance(child, kind)


def _find_children(self: Any, kind: Any, name: str = "") -> tuple[Any, ...]:
    found: list[Any] = []
    for child in self.children():
        if _matches(child, kind) and (not name or child.objectName == name):
            found.append(child)
        found += _find_children(child, kind, name)
    return tuple(found)


def _as_tuple(method: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, *arguments: tuple(method(self, *arguments))


def _find_child(self: Any, kind: Any, name: str = "") -> Any:
    return next(iter(_find_children(self, kind, name)), None)


def _exec(self: Any) -> int:
    """Shows the dialog, lets the test answer, and gives the result."""
    text = self.windowTitle
    self.show()
    try:
        answer = dialogs.ask("dialog", text, self)
    finally:
        self.hide()
    return self.result() if answer is None else int(answer)


def _exec_message(self: Any) -> int:
    if self.textFormat != qt.Qt.PlainText and QtGui.Qt.mightBeRichText(self.text):  # of others' names it would read any path
        raise AssertionError(f"the message box takes its text for HTML: {self.text}")
    answer = dialogs.ask("message", self.text)
    if isinstance(answer, bool):
        box = QtWidgets.QMessageBox
        roles = (box.AcceptRole, box.YesRole) if answer else (box.RejectRole, box.NoRole)
        answer = next(b.text for b in self.buttons() if self.buttonRole(b) in roles)
    button = next((b for b in self.buttons() if answer in (b.text, b.text.replace("&", ""))), None)
    if button is None:
        button = None if isinstance(answer, str) else self.button(QtWidgets.QMessageBox.StandardButton(int(answer)))
    if button is None:
        raise AssertionError(f"the message box has no button {answer!r}, but {[b.text for b in self.buttons()]}")
    self.show()
    button.click()
    self.hide()
    return int(self.standardButton(button)) if self.standardButton(button) else self.result()


def _exec_menu(self: Any, *_: Any) -> Any:
    answer = dialogs.ask("menu", " | ".join(a.text for a in self.actions() if a.text))
    action = next(a for a in self.actions() if a.text.replace("&", "") == answer)
    action.trigger()
    return action


def _file(many: bool = False) -> Callable[..., Any]:
    def ask(parent: Any = None, caption: str = "", directory: str = "", filter: str = "", *options: Any) -> Any:
        answer = dialogs.ask("file", caption, directory)
        return [str(a) for a in answer] if many else str(answer)

    return staticmethod(ask)  # type: ignore[return-value]


def _message(default: int) -> Callable[..., Any]:
    def ask(parent: Any, title: str, text: str, buttons: int = default, button: int = 0) -> int:
        return int(dialogs.ask("message", text))

    return staticmethod(ask)  # type: ignore[return-value]


def _input(parent: Any, title: str, label: str, *options: Any) -> Any:
    return dialogs.ask("input", label)


def _open_url(url: Any) -> bool:
    dialogs.show("url", url.toString())
    return True


def _single_shot(msec: int, *receiver: Any) -> None:
    """A callable, or an object and its slot's signature."""
    slot = receiver[0] if len(receiver) == 1 else getattr(receiver[0], receiver[1].removeprefix("1").split("(")[0])
    timer = QtCore.QTimer(QtCore.QCoreApplication.instance())
    timer.setSingleShot(True)

    def fire() -> None:
        timer.deleteLater()
        slot()

    timer.timeout.connect(fire)
    timer.start(int(msec))


def _setting(self: Any, key: str, default: Any = None) -> Any:
    return _setting_value(self, key, default)


for _class in _qt_classes():
    adapt(_class)
    _class.__setattr__ = _setattr
    if "__getattribute__" in _class.__dict__:  # those with methods that are static and not, too
        _getters[_class] = _class.__getattribute__
        _class.__getattribute__ = _getattribute
for _owner, _names in QT6_ONLY.items():
    for _name in _names.split():
        setattr(getattr(qt, _owner), _name, _Absent(_name))
        _absent[_name] = (*_absent.get(_name, ()), getattr(qt, _owner))
for _owner, _names in LISTS.items():
    for _name in _names.split():
        setattr(getattr(qt, _owner), _name, _as_tuple(getattr(getattr(qt, _owner), _name)))
QtCore.QObject.name = property(lambda self: self.objectName, lambda self, value: self.setObjectName(value))
QtCore.QObject.className = _class_name
QtCore.QObject.findChild = _find_child
QtCore.QObject.findChildren = _find_children
QtCore.QObject.delete = lambda self: self.deleteLater()
QtWidgets.QDialog.exec_ = _exec
QtWidgets.QMessageBox.exec_ = _exec_message
QtWidgets.QMenu.exec_ = _exec_menu
QtWidgets.QFileDialog.getOpenFileName = QtWidgets.QFileDialog.getSaveFileName = _file()
QtWidgets.QFileDialog.getExistingDirectory = _file()
QtWidgets.QFileDialog.getOpenFileNames = _file(many=True)
for _name, _button in (("question", 0x14000), ("information", 0x400), ("warning", 0x400), ("critical", 0x400)):
    setattr(QtWidgets.QMessageBox, _name, _message(_button))
for _name in ("getText", "getItem", "getInt", "getDouble", "getMultiLineText"):
    setattr(QtWidgets.QInputDialog, _name, staticmethod(_input))
QtCore.QTimer.__dict__["singleShot"].plain = _single_shot
QtGui.QDesktopServices.openUrl = staticmethod(_open_url)
_setting_value = QtCore.QSettings.value
QtCore.QSettings.value = _setting
for _name in ("ReadOnly", "WriteOnly", "ReadWrite", "Append", "Text"):  # Slicer's code asks QFile for them
    setattr(QtCore.QFile, _name, getattr(QtCore.QIODevice.OpenModeFlag, _name))


# --- .ui files -------------------------------------------------------------------------------------------------------

standins: dict[str, type] = {}
_loading = False
_failures: list[Exception] = []


def standin(cls: Any) -> Any:
    """Class decorator: `cls` stands in for the class of its name, also in .ui files. Names of its own start with "_"."""
    cls.standin = True
    standins[cls.__name__] = cls
    return cls


def _make(class_name: str, parent: Any) -> Any:
    try:
        if class_name not in standins:
            raise RuntimeError(f"no stand-in for {class_name}")
        return standins[class_name](parent)
    except Exception as e:
        _failures.append(e)  # PySide6's loader would go on without the widget
        raise


class QUiLoader(QtUiTools.QUiLoader):
    """Makes stand-ins of ctk* and qMRML* classes. A class without one, or a property that the class lacks, is an error."""

    def createWidget(self, class_name: str, parent: Any = None, name: str = "") -> Any:
        if re.match("(ctk|qMRML|qSlicer)", class_name):
            widget = _make(class_name, parent)
        else:
            widget = super().createWidget(class_name, parent, name)
        if widget is not None:
            widget.setObjectName(name)
            self.__dict__.setdefault("_made", {})[name] = widget
        return widget

    def load(self, device: Any, parent: Any = None) -> Any:
        tree = ElementTree.fromstring(bytes(device.readAll().data()))
        scene_connections = []
        for connections in tree.iter("connections"):
            for c in list(connections):
                if (c.findtext("signal") or "").startswith("mrmlSceneChanged("):
                    scene_connections.append([c.findtext(t) for t in ("sender", "signal", "receiver", "slot")])
                    connections.remove(c)
        content = QtCore.QBuffer()
        content.setData(QtCore.QByteArray(ElementTree.tostring(tree)))
        content.open(QtCore.QIODevice.OpenModeFlag.ReadOnly)
        global _loading
        _loading = True
        try:
            widget = super().load(content, parent)
        finally:
            _loading = False
        if _failures:
            failure = _failures[0]
            _failures.clear()
            raise failure
        if widget is None:
            raise RuntimeError(self.errorString())
        made = self.__dict__["_made"]
        for entry in tree.iter("widget"):
            known = made[entry.get("name")]
            for wanted in entry.findall("property"):
                if wanted.get("stdset") == "0" or wanted.get("name") == "buddy":  # dynamic, or set by the loader itself
                    continue
                if known.metaObject().indexOfProperty(wanted.get("name")) < 0:
                    raise RuntimeError(f"{entry.get('class')} {entry.get('name')} has no property {wanted.get('name')}")
        for sender, signal, receiver, slot in scene_connections:
            _connect(made[sender], signal, made[receiver], slot)
        widget.__dict__["_made"] = list(made.values())  # PySide6 forgets stand-ins that Python does not hold
        return widget


qt.QUiLoader = QUiLoader

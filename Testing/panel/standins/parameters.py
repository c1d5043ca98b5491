"""`slicer.parameterNodeWrapper`: typed attributes over a vtkMRMLScriptedModuleNode, stored as Slicer stores them.

After Base/Python/slicer/parameterNodeWrapper of Slicer 5.12; without parameter packs, dicts, gui creation and own
serializers. Types: bool, int, float, str, pathlib paths, Enum, MRML nodes, list[...], tuple[...], Optional and Union, with
the annotations Default, WithinRange, Minimum, Maximum, Choice, Exclude, Decimals and SingleStep.
"""

from __future__ import annotations

import enum
import pathlib
import types
import typing
import weakref
from collections.abc import Callable, MutableSequence
from typing import Annotated, Any

import qt
import slicer
import vtk

PATHS = (pathlib.Path, pathlib.PosixPath, pathlib.WindowsPath, pathlib.PurePath, pathlib.PurePosixPath, pathlib.PureWindowsPath)
SlicerParameterNamePropertyName = "SlicerParameterName"


# --- annotations -----------------------------------------------------------------------------------------------------


class Default:
    def __init__(self, value: Any = None, *, generator: Callable[[], Any] | None = None) -> None:
        self._value, self._generator = value, generator

    @property
    def value(self) -> Any:
        return self._generator() if self._generator else self._value


class Validator:
    def validate(self, value: Any) -> None:
        raise NotImplementedError


class NotNone(Validator):
    def validate(self, value: Any) -> None:
        if value is None:
            raise ValueError("Value must not be None")


class IsInstance(Validator):
    def __init__(self, classtype: Any) -> None:
        self.classtype = classtype

    def validate(self, value: Any) -> None:
        if value is not None and not isinstance(value, self.classtype):
            raise TypeError(f"Value must be of type {self.classtype}, is {value!r}")


class WithinRange(Validator):
    def __init__(self, minimum: Any, maximum: Any) -> None:
        self.minimum, self.maximum = minimum, maximum

    def validate(self, value: Any) -> None:
        if not self.minimum <= value <= self.maximum:
            raise ValueError(f"Value must be within [{self.minimum}, {self.maximum}], is {value}")


class Minimum(Validator):
    def __init__(self, minimum: Any) -> None:
        self.minimum = minimum

    def validate(self, value: Any) -> None:
        if value < self.minimum:
            raise ValueError(f"Value must be {self.minimum} or more, is {value}")


class Maximum(Validator):
    def __init__(self, maximum: Any) -> None:
        self.maximum = maximum

    def validate(self, value: Any) -> None:
        if value > self.maximum:
            raise ValueError(f"Value must be {self.maximum} or less, is {value}")


class Choice(Validator):
    def __init__(self, choices: Any) -> None:
        self.choices = choices

    def validate(self, value: Any) -> None:
        if value not in self.choices:
            raise ValueError(f"Value must be one of {self.choices}, is {value!r}")


class Exclude(Validator):
    def __init__(self, excludedValues: Any) -> None:
        self.excludedValues = excludedValues

    def validate(self, value: Any) -> None:
        if value in self.excludedValues:
            raise ValueError(f"Value must be none of {self.excludedValues}, is {value!r}")


class Decimals:
    def __init__(self, value: int) -> None:
        self.value = value


class SingleStep:
    def __init__(self, value: float) -> None:
        self.value = value


def splitAnnotations(possiblyAnnotatedType: Any) -> tuple[Any, tuple[Any, ...]]:
    plain, *annotations = typing.get_args(Annotated[possiblyAnnotatedType, None])
    return plain, tuple(annotations[:-1])


def unannotatedType(possiblyAnnotatedType: Any) -> Any:
    return splitAnnotations(possiblyAnnotatedType)[0]


def findFirstAnnotation(annotationsList: Any, annotationType: type) -> Any:
    return next((a for a in annotationsList if isinstance(a, annotationType)), None)


# --- how a value is kept in the node ---------------------------------------------------------------------------------


class _Kept:
    """One value as the parameter `name` of the node; checks are run before it is written."""

    cached = True

    def __init__(self, default: Any, checks: typing.Sequence[Validator] = ()) -> None:
        self.default, self.checks = default, list(checks)

    def check(self, value: Any) -> None:
        for validator in self.checks:
            validator.validate(value)

    def isIn(self, node: Any, name: str) -> bool:
        return bool(node.HasParameter(name))

    def write(self, node: Any, name: str, value: Any) -> None:
        self.check(value)
        node.SetParameter(name, self.text(value))

    def read(self, node: Any, name: str) -> Any:
        return self.value(node.GetParameter(name))

    def remove(self, node: Any, name: str) -> None:
        node.UnsetParameter(name)

    def text(self, value: Any) -> str:
        return str(value)

    def value(self, text: str) -> Any:
        raise NotImplementedError


class _Plain(_Kept):
    def __init__(self, kind: Any, default: Any, accepted: Any = None) -> None:
        super().__init__(default, [NotNone(), IsInstance(accepted or kind)])
        self.kind = kind

    def value(self, text: str) -> Any:
        return self.kind(text)


class _Bool(_Kept):
    def value(self, text: str) -> bool:
        return text == "True"


class _Enum(_Kept):
    def __init__(self, kind: type[enum.Enum]) -> None:
        super().__init__(next(iter(kind)), [IsInstance(kind)])
        self.kind = kind

    def text(self, value: Any) -> str:
        return value.name

    def value(self, text: str) -> Any:
        try:
            return self.kind[text]
        except KeyError:
            raise ValueError(f"Found {text!r} in parameter node but it is not a name in {self.kind!r}") from None


class _Nothing(_Kept):
    def check(self, value: Any) -> None:
        if value is not None:
            raise ValueError("Value must be None")

    def value(self, text: str) -> None:
        return None


class _Node(_Kept):
    def write(self, node: Any, name: str, value: Any) -> None:
        self.check(value)
        node.SetParameter(name, "")
        node.SetNodeReferenceID(name, value.GetID() if value is not None else None)

    def read(self, node: Any, name: str) -> Any:
        return node.GetNodeReference(name)

    def remove(self, node: Any, name: str) -> None:
        node.UnsetParameter(name)
        node.RemoveNodeReferenceIDs(name)


class ObservedList(MutableSequence):
    """Writes itself into the node when it is changed."""

    def __init__(self, node: Any, kept: _List, name: str, values: list[Any]) -> None:
        self._node, self._kept, self._name, self._values = node, kept, name, values

    def _save(self) -> None:
        try:
            self._kept.write(self._node, self._name, self._values)
        finally:
            self._values = list(self._kept.read(self._node, self._name))

    def __eq__(self, other: object) -> bool:
        return self._values == list(other) if isinstance(other, (list, ObservedList)) else NotImplemented

    def __repr__(self) -> str:
        return f"ObservedList({self._values})"

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, index: Any) -> Any:
        return self._values[index]

    def __setitem__(self, index: Any, value: Any) -> None:
        self._values[index] = value
        self._save()

    def __delitem__(self, index: Any) -> None:
        del self._values[index]
        self._save()

    def insert(self, index: int, value: Any) -> None:
        self._values.insert(index, value)
        self._save()

    def __add__(self, other: object) -> Any:
        raise NotImplementedError("Adding an ObservedList is not supported. However, += is supported.")


class _List(_Kept):
    def __init__(self, element: _Kept) -> None:
        super().__init__([])
        self.element, self.cached = element, element.cached

    def isIn(self, node: Any, name: str) -> bool:
        return bool(node.HasParameter(f"{name}_len"))

    def _length(self, node: Any, name: str) -> int:
        return int(node.GetParameter(f"{name}_len")) if self.isIn(node, name) else 0

    def write(self, node: Any, name: str, value: Any) -> None:
        values = list(value)
        self.check(values)
        for element in values:
            self.element.check(element)
        with slicer.util.NodeModify(node):
            before = self._length(node, name)
            for index, element in enumerate(values):
                self.element.write(node, f"{name}_{index}", element)
            node.SetParameter(f"{name}_len", str(len(values)))
            for index in range(len(values), before):
                self.element.remove(node, f"{name}_{index}")

    def read(self, node: Any, name: str) -> ObservedList:
        values = [self.element.read(node, f"{name}_{i}") for i in range(self._length(node, name))]
        return ObservedList(node, self, name, values)

    def remove(self, node: Any, name: str) -> None:
        for index in range(self._length(node, name)):
            self.element.remove(node, f"{name}_{index}")
        node.UnsetParameter(f"{name}_len")


class _Tuple(_Kept):
    def __init__(self, elements: list[_Kept]) -> None:
        super().__init__(tuple(e.default for e in elements))
        self.elements, self.cached = elements, all(e.cached for e in elements)

    def isIn(self, node: Any, name: str) -> bool:
        return self.elements[0].isIn(node, f"{name}_0")

    def write(self, node: Any, name: str, value: Any) -> None:
        self.check(value)
        if len(value) != len(self.elements):
            raise ValueError("Unexpected number of tuple values")
        with slicer.util.NodeModify(node):
            for index, (element, item) in enumerate(zip(self.elements, value)):
                element.write(node, f"{name}_{index}", item)

    def read(self, node: Any, name: str) -> tuple[Any, ...]:
        return tuple(e.read(node, f"{name}_{i}") for i, e in enumerate(self.elements))

    def remove(self, node: Any, name: str) -> None:
        for index, element in enumerate(self.elements):
            element.remove(node, f"{name}_{index}")


class _Union(_Kept):
    def __init__(self, parts: list[_Kept]) -> None:
        super().__init__(None if len(parts) == 2 and isinstance(parts[1], _Nothing) else parts[0].default)
        self.parts, self.cached = parts, all(p.cached for p in parts)

    def isIn(self, node: Any, name: str) -> bool:
        return any(p.isIn(node, f"{name}_{i}") for i, p in enumerate(self.parts))

    def write(self, node: Any, name: str, value: Any) -> None:
        self.check(value)
        errors = []
        for index, part in enumerate(self.parts):
            if (value is None) != isinstance(part, _Nothing):
                continue
            try:
                part.check(value)
            except (TypeError, ValueError) as e:
                errors.append(e)
                continue
            with slicer.util.NodeModify(node):
                self.remove(node, name)
                part.write(node, f"{name}_{index}", value)
            return
        raise errors[-1] if errors else TypeError(f"Unable to write value {value!r}")

    def read(self, node: Any, name: str) -> Any:
        for index, part in enumerate(self.parts):
            if part.isIn(node, f"{name}_{index}"):
                return part.read(node, f"{name}_{index}")
        raise KeyError(f"Unable to find value for name: {name}")

    def remove(self, node: Any, name: str) -> None:
        for index, part in enumerate(self.parts):
            part.remove(node, f"{name}_{index}")


def _keeper(annotated: Any) -> _Kept:
    kind, annotations = splitAnnotations(annotated)
    kept = _plain_keeper(kind)
    kept.checks += [a for a in annotations if isinstance(a, Validator)]
    return kept


def _plain_keeper(kind: Any) -> _Kept:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is list:
        return _List(_keeper(arguments[0]))
    if origin is tuple:
        return _Tuple([_keeper(a) for a in arguments])
    if origin is typing.Union:
        return _Union([_keeper(a) for a in arguments])
    if origin is types.UnionType or not isinstance(kind, type):  # Slicer knows only Optional[...] and Union[...]
        raise TypeError(f"Unable to create serializer for type: {kind}")
    if kind is type(None):
        return _Nothing(None)
    if kind is bool:
        return _Bool(False, [NotNone(), IsInstance(bool)])
    if kind in (int, float):
        return _Plain(kind, 0, (int, float) if kind is float else int)
    if kind is str:
        return _Plain(str, "")
    if kind in PATHS:
        return _Plain(kind, kind())
    if issubclass(kind, enum.Enum):
        return _Enum(kind)
    if issubclass(kind, slicer.vtkMRMLNode):
        return _Node(None, [IsInstance(kind)])
    raise TypeError(f"Unable to create serializer for type: {kind}")


class _Parameter:
    """One parameter of one node. Values that cannot change behind the node's back are kept, as Slicer keeps them."""

    def __init__(self, name: str, kept: _Kept, default: Default, node: Any) -> None:
        self.name, self.kept, self.default, self.node = name, kept, default, node
        if not kept.isIn(node, name):
            kept.write(node, name, default.value)
        if kept.cached:
            self._value = kept.read(node, name)
            self._writing = False
            me = weakref.ref(self)
            node.AddObserver(vtk.vtkCommand.ModifiedEvent, lambda *_: (parameter := me()) and parameter._changed())

    def _changed(self) -> None:
        if not self._writing:
            self._value = self._stored()

    def _stored(self) -> Any:
        if not self.kept.isIn(self.node, self.name):
            self.kept.write(self.node, self.name, self.default.value)
        return self.kept.read(self.node, self.name)

    def read(self) -> Any:
        return self._value if self.kept.cached else self._stored()

    def write(self, value: Any) -> None:
        self._writing = True
        try:
            with slicer.util.NodeModify(self.node):
                self.kept.write(self.node, self.name, value)
                if self.kept.cached:
                    self._value = self.kept.read(self.node, self.name)
        finally:
            self._writing = False


# --- widgets ---------------------------------------------------------------------------------------------------------


def isNodeOrUnionOfNodes(datatype: Any) -> bool:
    kinds = typing.get_args(unannotatedType(datatype)) or (unannotatedType(datatype),)
    nodes = [k for k in map(unannotatedType, kinds) if k is not type(None)]
    return bool(nodes) and all(isinstance(k, type) and issubclass(k, slicer.vtkMRMLNode) for k in nodes)


def getNodeTypes(datatype: Any) -> tuple[str, ...]:
    kinds = typing.get_args(unannotatedType(datatype)) or (unannotatedType(datatype),)
    return tuple(unannotatedType(k)().GetClassName() for k in kinds if unannotatedType(k) is not type(None))


class GuiConnector:
    """A widget's value: how it is read and written, and the signal that tells of a change."""

    def __init__(self, widget: Any, signal: str, read: Callable[[], Any], write: Callable[[Any], Any]) -> None:
        self._widget, self._signal, self.read, self.write = widget, signal, read, write
        self._callback: Callable[[], None] | None = None

    def onChanged(self, callback: Callable[[], None] | None) -> None:
        signal = getattr(self._widget, self._signal)
        if callback is None:
            signal.disconnect(self.changed)
        else:
            signal.connect(self.changed)
        self._callback = callback

    def changed(self, *_: Any) -> None:
        if self._callback:
            self._callback()

    def widget(self) -> Any:
        return self._widget


def _range(widget: Any, annotations: tuple[Any, ...], low: Any, high: Any) -> None:
    for annotation, name in ((Decimals, "decimals"), (SingleStep, "singleStep")):
        if (found := findFirstAnnotation(annotations, annotation)) is not None:
            setattr(widget, name, found.value)
    within = findFirstAnnotation(annotations, WithinRange)
    minimum, maximum = findFirstAnnotation(annotations, Minimum), findFirstAnnotation(annotations, Maximum)
    if isinstance(widget, qt.QSlider) and within is None and (minimum is None or maximum is None):
        raise RuntimeError("Cannot have a connection to a slider where the type is unbounded.")
    widget.minimum = within.minimum if within else minimum.minimum if minimum else low
    widget.maximum = within.maximum if within else maximum.maximum if maximum else high


def _choices(widget: Any, choices: list[tuple[str, Any]]) -> GuiConnector:
    widget.clear()
    for text, _ in choices:
        widget.addItem(text)
    values = [value for _, value in choices]

    def write(value: Any) -> None:
        if value not in values:
            raise ValueError(f"Unable to find value {value} in choices {values}")
        widget.currentIndex = values.index(value)

    return GuiConnector(widget, "currentIndexChanged", lambda: values[widget.currentIndex], write)


def createGuiConnector(widget: Any, datatype: Any) -> GuiConnector:
    """Slicer connects exactly these pairs of widget class (no subclasses) and type; RuntimeError for all others."""
    kind, annotations = splitAnnotations(datatype)
    of = type(widget)

    def by_attribute(name: str, signal: str) -> GuiConnector:
        return GuiConnector(widget, signal, lambda: getattr(widget, name), lambda value: setattr(widget, name, value))

    if kind is bool and of is qt.QCheckBox:
        return by_attribute("checked", "stateChanged")
    if kind is bool and of is qt.QPushButton:
        widget.checkable = True
        return by_attribute("checked", "toggled")
    if kind is int and of in (qt.QSlider, qt.QSpinBox):
        _range(widget, annotations, -(2**31), 2**31 - 1)
        return by_attribute("value", "valueChanged")
    if kind is float and of is qt.QDoubleSpinBox:  # and ctkSliderWidget, for which there is no stand-in
        _range(widget, annotations, float("-inf"), float("inf"))
        return by_attribute("value", "valueChanged")
    if of is qt.QComboBox and kind in (int, float, str, bool):
        choice = findFirstAnnotation(annotations, Choice)
        if choice is None:
            raise RuntimeError("ComboBoxToStringableConnector requires the Choice annotation to be used.")
        return _choices(widget, [(str(c), c) for c in choice.choices])
    if of is qt.QComboBox and isinstance(kind, type) and issubclass(kind, enum.Enum):
        label = getattr(kind, "label", lambda member: member.name)
        return _choices(widget, [(label(member), member) for member in kind])
    if kind is str and of is qt.QLineEdit:
        return by_attribute("text", "textChanged")
    if kind is str and of is qt.QTextEdit:
        return GuiConnector(widget, "textChanged", widget.toPlainText, widget.setPlainText)
    if of is slicer.qMRMLNodeComboBox and isNodeOrUnionOfNodes(datatype):
        widget.nodeTypes = list(getNodeTypes(datatype))
        return GuiConnector(widget, "currentNodeChanged", widget.currentNode, widget.setCurrentNode)
    raise RuntimeError(f"Unable to create GUI connector from datatype '{datatype}' to widget type '{of}'")


# --- the decorator ---------------------------------------------------------------------------------------------------


# The garbage collector sees that only the node's observers hold the wrappers, and not that the scene holds the node: it would
# clear the observers of a node that lives, whose next event then ends Python.
_alive: list[Any] = []


class _Methods:
    """What the decorator adds to the class."""

    def __init__(self, parameterNode: Any, prefix: str | None = None) -> None:
        self.parameterNode = parameterNode
        if not any(node is parameterNode for node in _alive):
            _alive.append(parameterNode)
        self._guis: dict[int, dict[str, GuiConnector]] = {}
        self._updating = False
        self._parameters = {
            name: _Parameter(f"{prefix or ''}{name}", kept, default, parameterNode)
            for name, (kept, default, _) in self.allParameters.items()  # type: ignore[attr-defined]
        }

    def _parameter(self, name: str) -> _Parameter:
        if name not in self._parameters:
            raise ValueError(f"Cannot find a param with the given name: {name}")
        return self._parameters[name]

    def default(self, name: str) -> Default:
        return self._parameter(name).default

    @classmethod
    def dataType(cls, name: str) -> Any:
        if name not in cls.allParameters:  # type: ignore[attr-defined]
            raise ValueError(f"Cannot find a param with the given name: {name}")
        return cls.allParameters[name][2]  # type: ignore[attr-defined]

    def getValue(self, name: str) -> Any:
        return self._parameter(name).read()

    def setValue(self, name: str, value: Any) -> None:
        self._parameter(name).write(value)

    def connectGui(self, gui: Any) -> None:
        widgets = gui.findChildren(qt.QWidget) if getattr(gui, "isWidgetType", lambda: False)() else gui.__dict__.values()
        named = {w.property(SlicerParameterNamePropertyName): w for w in widgets if w.property(SlicerParameterNamePropertyName)}
        self.connectParametersToGui(named)  # without its tag, up to Slicer 5.12 at least

    def connectParametersToGui(self, mapping: dict[str, Any]) -> int:
        for name in mapping:
            self._parameter(name)
        connectors = {name: w if isinstance(w, GuiConnector) else createGuiConnector(w, self.dataType(name)) for name, w in mapping.items()}
        tag = len(self._guis) and max(self._guis) + 1
        self._guis[tag] = connectors
        for name, connector in connectors.items():
            connector.write(self.getValue(name))
            connector.onChanged(self._reader(name, connector))
        self.AddObserver(vtk.vtkCommand.ModifiedEvent, lambda *_: self._update())
        return tag

    def _reader(self, name: str, connector: GuiConnector) -> Callable[[], None]:
        def changed() -> None:
            if not self._updating:
                with slicer.util.NodeModify(self):
                    self.setValue(name, connector.read())

        return changed

    def _update(self) -> None:
        if self._updating:
            return
        self._updating = True
        try:
            with slicer.util.NodeModify(self):
                for connectors in self._guis.values():
                    for name, connector in connectors.items():
                        connector.write(self.getValue(name))
        finally:
            self._updating = False

    def disconnectGui(self, guiTag: int) -> None:
        for connector in self._guis.pop(guiTag, {}).values():
            connector.onChanged(None)

    def StartModify(self) -> int:
        return self.parameterNode.StartModify()

    def EndModify(self, wasModified: int) -> int:
        return self.parameterNode.EndModify(wasModified)

    def AddObserver(self, event: Any, callback: Any, priority: float = 0.0) -> int:
        return self.parameterNode.AddObserver(event, callback, priority)

    def RemoveObserver(self, tag: int) -> None:
        self.parameterNode.RemoveObserver(tag)

    def Modified(self) -> None:
        self.parameterNode.Modified()


def parameterNodeWrapper(classtype: Any = None) -> Any:
    """The class decorator, with or without parentheses."""
    if classtype is None:
        return parameterNodeWrapper
    described = {}
    for name, annotated in typing.get_type_hints(classtype, include_extras=True).items():
        kept = _keeper(annotated)
        default = findFirstAnnotation(splitAnnotations(annotated)[1], Default) or Default(kept.default)
        if hasattr(classtype, name):
            default = Default(getattr(classtype, name))
        described[name] = (kept, default, annotated)
    for name in described:
        setattr(classtype, name, property(lambda self, n=name: self.getValue(n), lambda self, value, n=name: self.setValue(n, value)))
    for name, member in vars(_Methods).items():
        if name == "__init__" or not name.startswith("__"):
            if name != "__init__" and hasattr(classtype, name):
                raise ValueError(f"Cannot use reserved name '{name}' in a parameterNodeWrapper")
            setattr(classtype, name, member)
    classtype.allParameters = described
    classtype._is_parameter_node_wrapper = True
    return classtype

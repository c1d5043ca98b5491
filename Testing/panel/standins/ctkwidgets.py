"""`ctk`: the widgets of CTK that the panel uses, with the names of their headers (commontk/CTK, Libs/Widgets)."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import qt
from PySide6.QtCore import Property, QEvent, QRect, QSize, Signal
from PySide6.QtWidgets import QAbstractButton, QComboBox, QMessageBox, QPushButton, QStyle, QStyleOptionButton, QStylePainter, QWidget
from pythonqt import standin


def value(kind: Any, name: str, default: Any, changed: str = "") -> Property:
    """A Q_PROPERTY that only keeps its value; `changed` is a method called after a change."""

    def get(self: Any) -> Any:
        return self.__dict__.get("_" + name, default)

    def put(self: Any, new: Any) -> None:
        new = tuple(new) if isinstance(new, list) else new
        if new != get(self):
            self.__dict__["_" + name] = new
            if changed:
                getattr(self, changed)()

    return Property(kind, get, put)


def foreign(name: str, kind: str) -> property:
    """A property whose enum is another Qt class's: PythonQt neither reads nor writes it (Qt 5, commontk/CTK issue 791)."""

    def put(self: Any, new: Any) -> None:
        raise AttributeError(f"Property '{name}' of type '{kind}' does not accept an object of type {new!r}")

    return property(lambda self: None, put)


@standin
class ctkCollapsibleButton(QAbstractButton):
    """ctkCollapsibleButton.h. Collapsing hides the children; a child that its owner hides or shows meanwhile stays so after."""

    contentsCollapsed = Signal(bool)
    signals_ = {"contentsCollapsed(bool)": "contentsCollapsed"}

    def __init__(self, text: Any = "", parent: Any = None) -> None:
        if not isinstance(text, str):
            text, parent = "", text
        self._collapsed = self._forcing = False
        self._hidden: set[Any] = set()  # children that their owner hid
        super().__init__(parent)
        self.setCheckable(True)
        self.setChecked(True)
        self.setText(text)
        self.setSizePolicy(qt.QSizePolicy.Minimum, qt.QSizePolicy.Preferred)
        self.setBackgroundRole(qt.QPalette.Window)
        self._fit()
        self.toggled.connect(lambda checked: self._collapse(not checked))

    def _fit(self) -> None:
        self.setContentsMargins(0, self._header().height(), 0, 0)

    def _option(self) -> QStyleOptionButton:
        option = QStyleOptionButton()
        option.initFrom(self)
        option.state |= QStyle.StateFlag.State_Sunken if self.isDown() else QStyle.StateFlag.State_Raised
        return option

    def _header(self) -> QSize:
        size = self.fontMetrics().size(int(qt.Qt.TextShowMnemonic), self.text or "XXXX")
        contents = QSize(size.width() + 20, max(size.height(), 13))
        return self.style().sizeFromContents(QStyle.ContentsType.CT_PushButton, self._option(), contents, self)

    def _collapse(self, collapsed: bool) -> None:
        if collapsed == self._collapsed:
            return
        self._collapsed = collapsed
        self.setMaximumHeight(self._size(False).height() if collapsed else 16777215)
        for child in self.children():
            self._show(child)
        self.updateGeometry()
        self.contentsCollapsed.emit(collapsed)

    def _show(self, child: Any) -> None:
        if isinstance(child, QWidget):
            self._forcing = True
            child.setVisible(not self._collapsed and child not in self._hidden)
            if child not in self._hidden:  # not an explicit wish: hide() of the owner's is still to be noticed
                child.setAttribute(qt.Qt.WA_WState_ExplicitShowHide, False)
            self._forcing = False

    def _set_collapsed(self, collapsed: bool) -> None:
        if self.isCheckable():
            self.setChecked(not collapsed)
        else:
            self._collapse(collapsed)

    collapsed = Property(bool, lambda self: self._collapsed, _set_collapsed)
    collapsedHeight = value(int, "collapsed_height", 14, "updateGeometry")
    flat = value(bool, "flat", False, "update")
    contentsFrameShape = foreign("contentsFrameShape", "QFrame::Shape")
    contentsFrameShadow = foreign("contentsFrameShadow", "QFrame::Shadow")
    contentsLineWidth = value(int, "line_width", 1)
    contentsMidLineWidth = value(int, "mid_line_width", 0)
    buttonTextAlignment = value(int, "text_alignment", 0x81)
    indicatorAlignment = value(int, "indicator_alignment", 0x81)

    def childEvent(self, event: Any) -> None:
        super().childEvent(event)
        if event.type() == QEvent.Type.ChildAdded:
            event.child().installEventFilter(self)
        elif event.type() == QEvent.Type.ChildPolished and self._collapsed:
            self._show(event.child())

    def eventFilter(self, child: Any, event: Any) -> bool:
        if not self._forcing and isinstance(child, QWidget):
            if event.type() == QEvent.Type.ShowToParent:
                self._hidden.discard(child)
                if self._collapsed:
                    self._show(child)
            elif event.type() == QEvent.Type.HideToParent:
                self._hidden.add(child)
        return False

    def changeEvent(self, event: Any) -> None:
        if event.type() in (QEvent.Type.FontChange, QEvent.Type.StyleChange):
            self._fit()
        super().changeEvent(event)

    def _size(self, least: bool) -> QSize:
        header = self._header()
        if self._collapsed:
            return header + QSize(0, self.collapsedHeight)
        layout = self.layout()
        if layout is None:
            return header
        return (layout.totalMinimumSize() if least else layout.totalSizeHint()).expandedTo(header)

    def sizeHint(self) -> QSize:
        return self._size(False)

    def minimumSizeHint(self) -> QSize:
        return self._size(True)

    def hitButton(self, position: Any) -> bool:
        return QRect(0, 0, self.width, self._header().height()).contains(position)

    def paintEvent(self, event: Any) -> None:
        height = self._header().height()
        painter, option = QStylePainter(self), self._option()
        option.rect = QRect(0, 0, self.width, height)
        if self.flat:
            option.features |= QStyleOptionButton.ButtonFeature.Flat
        painter.drawControl(QStyle.ControlElement.CE_PushButtonBevel, option)
        arrow = QStyle.PrimitiveElement.PE_IndicatorArrowRight if self._collapsed else QStyle.PrimitiveElement.PE_IndicatorArrowDown
        option.rect = QRect((height - 13) // 2, (height - 13) // 2, 13, 13)
        painter.drawPrimitive(arrow, option)
        box = QRect(height, 0, self.width - height, height)
        flags = int(qt.Qt.AlignLeft | qt.Qt.AlignVCenter | qt.Qt.TextShowMnemonic)
        self.style().drawItemText(painter, box, flags, self.palette, self.isEnabled(), self.text, self.foregroundRole())
        painter.end()


@standin
class ctkMenuButton(QPushButton):
    """ctkMenuButton.h."""

    def __init__(self, text: Any = "", parent: Any = None) -> None:
        if not isinstance(text, str):
            text, parent = "", text
        super().__init__(text, parent)


@standin
class ctkComboBox(QComboBox):
    """ctkComboBox.h: a QComboBox that may leave the mouse wheel to what it lies in. The default text and icon are missing."""

    NeverScroll, AlwaysScroll, ScrollWithFocus, ScrollWithNoVScrollBar = range(4)
    scrollWheelEffect = value(int, "scroll_wheel_effect", 1)

    def wheelEvent(self, event: Any) -> None:
        if self.scrollWheelEffect == self.AlwaysScroll or (self.scrollWheelEffect == self.ScrollWithFocus and self.hasFocus()):
            super().wheelEvent(event)
        else:
            event.ignore()


@standin
class ctkMessageBox(QMessageBox):
    """ctkMessageBox.h."""

    dontShowAgainVisible = value(bool, "dont_show", False)
    dontShowAgainSettingsKey = value(str, "dont_show_key", "")


sys.modules["ctk"] = ctk = ModuleType("ctk")
vars(ctk).update({c.__name__: c for c in (ctkCollapsibleButton, ctkComboBox, ctkMenuButton, ctkMessageBox)})

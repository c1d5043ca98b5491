"""Slicer without its application: a real MRML scene with the module logics that the tests need, from slicer-core.

Importing this module needs slicer-core. Nothing here is a stand-in, except for `slicer.modules`, which in Slicer hands
out the same logics.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

# VTK chooses its OpenGL window class when the first one is made; EGL draws off screen, without an X server.
if os.name == "posix" and not os.environ.get("DISPLAY"):
    os.environ.setdefault("VTK_DEFAULT_OPENGL_WINDOW", "vtkEGLRenderWindow")

import numpy as np
import slicer
import vtk
from vtk.util.numpy_support import vtk_to_numpy


class Runtime:
    """One scene and its logics. `modules` goes into `slicer.modules`, `scene` into `slicer.mrmlScene`.

    folder: an empty one, for what the logics put on disk.
    """

    def __init__(self, folder: Path) -> None:
        output = vtk.vtkOutputWindow()
        output.SetDisplayModeToAlwaysStdErr()
        vtk.vtkOutputWindow.SetInstance(output)
        self.scene = slicer.vtkMRMLScene()
        self.application_logic = slicer.vtkSlicerApplicationLogic()
        self.application_logic.SetMRMLScene(self.scene)
        self.application_logic.GetColorLogic().SetMRMLScene(self.scene)
        # Slicer's colour files are not in the wheel: an empty folder keeps the logic from complaining on stderr.
        (folder / "share" / "ColorFiles").mkdir(parents=True)
        self.application_logic.SetTemporaryPath(str(folder))
        self.application_logic.SetHomeDirectory(str(folder))
        self.application_logic.SetShareDirectory("share")
        self.application_logic.GetColorLogic().AddDefaultColorNodes()
        self.application_logic.SetSliceLogics(vtk.vtkCollection())
        self.application_logic.SetViewLogics(vtk.vtkCollection())
        self.modules = SimpleNamespace()
        self._add_logic("Colors", slicer.vtkMRMLColorLogic())
        self._add_logic("SubjectHierarchy", slicer.vtkSlicerSubjectHierarchyModuleLogic())
        self._add_logic("Volumes", slicer.vtkSlicerVolumesLogic())
        self._add_logic("Segmentations", slicer.vtkSlicerSegmentationsModuleLogic())
        self._add_logic("Transforms", slicer.vtkSlicerTransformLogic())
        self._add_logic("Markups", slicer.vtkSlicerMarkupsLogic())
        self._add_logic("Tables", slicer.vtkSlicerTablesLogic())
        self._add_logic("Sequences", slicer.vtkSlicerSequencesLogic())
        slicer.vtkMRMLSliceNode.AddDefaultSliceOrientationPresets(self.scene, True)

    def _add_logic(self, name: str, logic: Any) -> None:
        # Before SetMRMLScene: logics look one another up while the scene is set.
        logic.SetMRMLApplicationLogic(self.application_logic)
        logic.SetMRMLScene(self.scene)
        self.application_logic.SetModuleLogic(name, logic)
        setattr(self.modules, name.lower(), SimpleNamespace(logic=lambda: logic))


class SliceView:
    """A real slice view, drawn off screen."""

    def __init__(self, runtime: Runtime, name: str, orientation: str, size: tuple[int, int], node: Any = None) -> None:
        """node: the slice node of a layout, which keeps its orientation; None makes one."""
        self.mapper = vtk.vtkImageMapper()
        self.mapper.SetColorWindow(255)
        self.mapper.SetColorLevel(127.5)
        actor = vtk.vtkActor2D()
        actor.SetMapper(self.mapper)
        actor.GetProperty().SetDisplayLocationToBackground()
        self.renderer = vtk.vtkRenderer()
        self.window = vtk.vtkRenderWindow()
        self.window.SetOffScreenRendering(1)
        self.window.SetMultiSamples(0)
        self.window.AddRenderer(self.renderer)
        # Before the displayable managers add theirs, or the fills hide the image.
        self.renderer.AddViewProp(actor)
        self.renderer.GetActiveCamera().ParallelProjectionOn()
        self.interactor = vtk.vtkRenderWindowInteractor()
        self.interactor.SetRenderWindow(self.window)
        self.interactor.Initialize()
        self.window.SetSize(*size)
        self.interactor.UpdateSize(*size)
        factory = slicer.vtkMRMLSliceViewDisplayableManagerFactory.GetInstance()
        factory.SetMRMLApplicationLogic(runtime.application_logic)
        if not factory.IsDisplayableManagerRegistered("vtkMRMLSegmentationsDisplayableManager2D"):
            factory.RegisterDisplayableManager("vtkMRMLSegmentationsDisplayableManager2D")
        self.group = slicer.vtkMRMLDisplayableManagerGroup()
        self.group.SetRenderer(self.renderer)
        self.group.Initialize(factory, self.renderer)
        self.logic = slicer.vtkMRMLSliceLogic()
        self.logic.SetMRMLApplicationLogic(runtime.application_logic)
        runtime.application_logic.GetSliceLogics().AddItem(self.logic)
        self.logic.SetMRMLScene(runtime.scene)
        if node is None:
            self.node = self.logic.AddSliceNode(name)
            self.node.SetOrientation(orientation)
        else:
            self.node = node
            self.logic.SetSliceNode(node)
        self.node.SetMappedInLayout(1)
        self.group.SetMRMLDisplayableNode(self.node)
        self.logic.ResizeSliceNode(*size)

    def show(self, background: Any, foreground: Any = None, opacity: float = 1.0) -> None:
        composite = self.logic.GetSliceCompositeNode()
        composite.SetBackgroundVolumeID(background.GetID())
        composite.SetForegroundVolumeID(foreground.GetID() if foreground is not None else None)
        composite.SetForegroundOpacity(opacity)
        self.logic.FitSliceToBackground()

    def picture(self) -> np.ndarray:
        """What the view shows: uint8 (row, column, RGB), the first row on top."""
        self.logic.UpdatePipeline()
        self.mapper.SetInputConnection(self.logic.GetImageDataConnection())
        self.window.Render()
        grab = vtk.vtkWindowToImageFilter()
        grab.SetInput(self.window)
        grab.ReadFrontBufferOff()
        grab.ShouldRerenderOff()
        grab.Update()
        width, height, _ = grab.GetOutput().GetDimensions()
        return vtk_to_numpy(grab.GetOutput().GetPointData().GetScalars()).reshape(height, width, -1)[::-1, :, :3].copy()

    def pixel(self, picture: np.ndarray, ras: tuple[float, float, float]) -> np.ndarray:
        """The colour of the picture at a world point."""
        to_xy = vtk.vtkMatrix4x4()
        vtk.vtkMatrix4x4.Invert(self.node.GetXYToRAS(), to_xy)
        x, y = to_xy.MultiplyPoint([*ras, 1.0])[:2]
        return picture[picture.shape[0] - 1 - round(y), round(x)]


def draw_chart(chart_node: Any, size: tuple[int, int]) -> np.ndarray:
    """What a plot view shows of a chart node, in its essentials (qMRMLPlotView.cxx): uint8 (row, column, RGB), the first row on top."""
    view = vtk.vtkContextView()
    view.GetRenderWindow().SetOffScreenRendering(1)
    view.GetRenderWindow().SetMultiSamples(0)
    view.GetRenderWindow().SetSize(*size)
    view.GetRenderer().SetBackground(1, 1, 1)
    chart = vtk.vtkChartXY()
    view.GetScene().AddItem(chart)
    chart.SetTitle(chart_node.GetTitle())
    chart.GetTitleProperties().SetFontSize(chart_node.GetTitleFontSize())
    for place, title in ((1, chart_node.GetXAxisTitle()), (0, chart_node.GetYAxisTitle())):
        axis = chart.GetAxis(place)
        axis.SetTitle(title)
        axis.GetTitleProperties().SetFontSize(chart_node.GetAxisTitleFontSize())
        axis.GetLabelProperties().SetFontSize(chart_node.GetAxisLabelFontSize())
    if not chart_node.GetYAxisRangeAuto():
        chart.GetAxis(0).SetBehavior(vtk.vtkAxis.FIXED)
        chart.GetAxis(0).SetRange(*chart_node.GetYAxisRange())
    chart.SetShowLegend(chart_node.GetLegendVisibility())
    chart.GetLegend().SetLabelSize(chart_node.GetLegendFontSize())
    for i in range(chart_node.GetNumberOfPlotSeriesNodes()):
        series = chart_node.GetNthPlotSeriesNode(i)
        plot = chart.AddPlot(vtk.vtkChart.LINE)
        plot.SetInputData(series.GetTableNode().GetTable(), series.GetXColumnName(), series.GetYColumnName())
        plot.SetLabel(series.GetName())
        plot.SetWidth(series.GetLineWidth())
        plot.GetPen().SetLineType(series.GetLineStyle())
        plot.SetMarkerStyle(series.GetMarkerStyle())
        plot.SetMarkerSize(series.GetMarkerSize())
        plot.SetColorF(*series.GetColor())
    view.GetRenderWindow().Render()
    grab = vtk.vtkWindowToImageFilter()
    grab.SetInput(view.GetRenderWindow())
    grab.ReadFrontBufferOff()
    grab.Update()
    width, height, _ = grab.GetOutput().GetDimensions()
    return vtk_to_numpy(grab.GetOutput().GetPointData().GetScalars()).reshape(height, width, -1)[::-1, :, :3].copy()

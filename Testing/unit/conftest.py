import sys

import pytest


@pytest.fixture
def unetseg(monkeypatch, capfd):
    """Run the command in this process: (exit code, stdout, stderr)."""
    from UNetSegmentationLib.__main__ import main

    def run(*arguments):
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["unetseg", *map(str, arguments)])
        try:
            main()
            code = 0
        except SystemExit as e:
            code = e.code
        return code, *capfd.readouterr()

    return run

"""python -m unetseg_training FOLDER: the process of a job that UNetSegmentationLib.training.start() has made."""

import sys
from pathlib import Path


def main() -> int:
    from UNetSegmentationLib import environment, files, training

    environment.activate()  # before anything but the standard library is imported
    folder = Path(files.unescape_arguments(sys.argv)[1])
    if not training.claim(folder):
        return 0  # another process has it
    files.stand_back(5)
    try:
        from .retrain import run
    except (ImportError, OSError) as e:  # the latter of PyTorch on Windows, where one of its DLLs cannot be loaded
        name = (getattr(e, "name", None) or "").split(".")[0]
        what = f"lacks the package {name}" if isinstance(e, ModuleNotFoundError) and name else f"cannot load what training needs ({e})"
        then = "close other programs" if files.OUT_OF_MEMORY.search(str(e)) else "install what training needs"
        training.end(folder, "failed", f"The Python at {sys.executable} {what}; {then} and resume it.")
        return 1
    return run(folder)


if __name__ == "__main__":
    sys.exit(main())

"""python -m UNetSegmentationLib.worker FOLDER PARENT_PID [background|desk], as client.command() builds it; protocol.py says what
is spoken. "background": with a lower priority, which costs nothing where cores are free and keeps a panel smooth where not;
"desk": the same, and it serves a work list (desk.py)."""

import json
import os
import sys

from ..files import stand_back, unescape_arguments


def main() -> int:
    # Only the protocol may use the real stdin and stdout: what libraries print goes to stderr, from their import on.
    source, sink = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    # Before the imports, which may take a minute: the client may have started a launcher that started this process, and
    # to end it must know its id.
    os.write(sink, b'\n{"event":"starting","pid":%d}\n' % os.getpid())
    desk = sys.argv[3:] == ["desk"]
    if sys.argv[3:] == ["background"] or desk:
        stand_back()  # before there are threads, which inherit it
    try:
        from ..environment import activate

        activate()
        if desk:
            from .desk import Desk as Program
        else:
            from .server import Server as Program  # type: ignore[assignment]
    except Exception as e:
        name = (getattr(e, "name", None) or "").split(".")[0]
        what = f"lacks the package {name}" if isinstance(e, ModuleNotFoundError) and name else f"cannot load the worker ({e})"
        text = f"The Python at {sys.executable} {what}; install the requirements again or choose another Python."
        os.write(sink, b"\n" + json.dumps({"event": "error", "id": None, "kind": "user", "error": text}).encode() + b"\n")
        return 1
    return Program.serve(source, sink, unescape_arguments(sys.argv[1:]))


if __name__ == "__main__":
    sys.exit(main())

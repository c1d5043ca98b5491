"""python -m UNetSegmentationLib.worker FOLDER PARENT_PID, as client.command() builds it; protocol.py says what is spoken."""

import json
import os
import sys


def main() -> int:
    # Only the protocol may use the real stdin and stdout: what libraries print goes to stderr, from their import on.
    source, sink = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    try:
        from .server import serve
    except Exception as e:
        name = (getattr(e, "name", None) or "").split(".")[0]
        what = f"lacks the package {name}" if isinstance(e, ModuleNotFoundError) and name else f"cannot load the worker ({e})"
        text = f"The Python at {sys.executable} {what}; install the requirements again or choose another Python."
        os.write(sink, b"\n" + json.dumps({"event": "error", "id": None, "kind": "user", "error": text}).encode() + b"\n")
        return 1
    return serve(source, sink, sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())

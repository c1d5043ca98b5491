"""How long the panel takes to open, and what that imports: python benchmarks/panel_open.py

Opened in the stand-ins (Testing/panel/standins) in processes of their own. "open" is until the person sees the panel and can
use it but for the models' list; "models" until that is filled too. What Slicer itself has imported by then (numpy, VTK, its
own modules) is loaded before the clock starts.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RUNS = 5
CHILD = """
import json, os, sys, time
from pathlib import Path
sys.path[:0] = [str(Path({root!r}, "Testing", "panel")), str(Path({root!r}, "UNetSegmentation"))]
from standins.slicergui import start, finish
gui = start(Path({folder!r}))
import numpy, vtk.util.numpy_support
gui.load()
before = set(sys.modules)
began = time.perf_counter()
widget = gui.load().widgetRepresentation().self()
widget.parent.show()
widget.parent.enter()
opened = time.perf_counter() - began
at_open = sorted(set(sys.modules) - before)
gui.wait(lambda: widget.ready, 30)
ready = time.perf_counter() - began
later = sorted(set(sys.modules) - before - set(at_open))
print("RESULT" + json.dumps({{"open": opened, "models": ready, "at_open": at_open, "later": later}}))
finish(0)
"""


def once() -> dict:
    with tempfile.TemporaryDirectory(prefix="unetseg-open-") as folder:
        code = CHILD.format(root=str(ROOT), folder=str(Path(folder, "gui")))
        environment = {**os.environ, "UNETSEG_MODELS": str(Path(folder, "models"))}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    line = next((line for line in done.stdout.splitlines() if line.startswith("RESULT")), None)
    if line is None:
        sys.exit(done.stderr[-3000:])
    return json.loads(line.removeprefix("RESULT"))


def main() -> None:
    results = [once() for _ in range(RUNS)]
    for key, what in (("open", "the panel is open"), ("models", "the models are listed")):
        times = [r[key] for r in results]
        print(f"{what}: median {1000 * statistics.median(times):.0f} ms ({1000 * min(times):.0f} to {1000 * max(times):.0f})")
    ours = [m for m in results[0]["at_open"] if m.startswith("UNetSegmentation")]
    others = sorted({m.split(".")[0] for m in results[0]["at_open"]} - {m.split(".")[0] for m in ours})
    later = sorted({m.split(".")[0] for m in results[0]["later"]})
    print(f"imported to open: {', '.join([*ours, *others]) or 'nothing'}")
    print(f"imported for the models: {', '.join(later)}")
    heavy = {"torch", "onnxruntime", "openvino"} & ({m.split(".")[0] for r in results for m in (*r["at_open"], *r["later"])})
    print(f"torch, onnxruntime, openvino: {', '.join(heavy) or 'none of them'}")


if __name__ == "__main__":
    main()

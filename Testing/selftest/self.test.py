"""Runs the modules' self-tests in a real Slicer and ends it with an exit code:

    Slicer --no-splash --additional-module-paths UNetSegmentation UNetSegmentation/SegmentEditorUNetClick \\
      --python-script Testing/selftest/self.test.py

(A name with a point: slicer-core imports every module that it finds in a folder called slicer.)

It installs onnxruntime into that Slicer's Python where it is missing, fetches the sample CT (or takes it from the
folder in UNETSEG_SAMPLE), and writes what it saw to self_test.log.
"""

import importlib.util
import sys
import traceback
import unittest

import slicer


def run() -> bool:
    if importlib.util.find_spec("onnxruntime") is None:
        slicer.util.pip_install("onnxruntime")
    from SegmentEditorUNetClick import SegmentEditorUNetClickTest

    from UNetSegmentation import UNetSegmentationTest

    with open("self_test.log", "w", encoding="utf-8") as log:
        load = unittest.defaultTestLoader.loadTestsFromTestCase
        suite = unittest.TestSuite(map(load, (UNetSegmentationTest, SegmentEditorUNetClickTest)))
        result = unittest.TextTestRunner(log, verbosity=2).run(suite)
    with open("self_test.log", encoding="utf-8") as log:
        print(log.read())
    # A run that skipped everything has tested nothing.
    return result.wasSuccessful() and result.testsRun > len(result.skipped)


try:
    passed = run()
except Exception:
    traceback.print_exc()
    passed = False
sys.stdout.flush()
slicer.util.exit(0 if passed else 1)

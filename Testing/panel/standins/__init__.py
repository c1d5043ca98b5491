"""What stands in for Slicer's application in the panel's tests: `from standins.slicergui import start`."""

"""The effect, which Slicer loads from SegmentEditorEffect.py."""

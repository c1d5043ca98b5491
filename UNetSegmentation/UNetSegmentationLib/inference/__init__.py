"""From an image to a prediction: tiling, test-time augmentation, the one path."""

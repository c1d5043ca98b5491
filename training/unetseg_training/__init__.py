"""The training companion: makes the model packages that UNetSegmentation runs."""

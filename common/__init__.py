"""Shared by all other packages: boxes, masks, files, checkpoints, drawing, workers, ranks."""

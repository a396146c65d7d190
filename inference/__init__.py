"""Applies trained models: `from inference import Predictor` is the public import for other programs."""

from inference.predictor import ImageDetections, Predictor

__all__ = ["ImageDetections", "Predictor"]

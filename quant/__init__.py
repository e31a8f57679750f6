"""Formats and quantizers. Quantizing is an edit of a Module tree, or of a checkpoint tensor by tensor."""
from .quantizer import MODES, RECIPES, Format, Predicate, Quantizer, quantize, recipe

__all__ = ["MODES", "RECIPES", "Format", "Predicate", "Quantizer", "quantize", "recipe"]

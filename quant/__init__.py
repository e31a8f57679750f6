"""Formats and quantizers. Quantizing is an edit of a Module tree, or of a checkpoint tensor by tensor."""
from .affine import Format, Predicate, Quantizer, quantize

__all__ = ["Format", "Predicate", "Quantizer", "quantize"]

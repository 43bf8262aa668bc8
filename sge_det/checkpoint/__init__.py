"""Weights from where they are to Detectron2: reading, recognising, renaming, transplanting."""

from .convert import Conversion, convert_file
from .sources import Recipe, Source, read_source
from .transplant import transplant_file, transplant_state

__all__ = [
    "Conversion",
    "Recipe",
    "Source",
    "convert_file",
    "read_source",
    "transplant_file",
    "transplant_state",
]

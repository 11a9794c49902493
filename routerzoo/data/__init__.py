"""Lightning data modules: text for language modelling, images for classification."""

from routerzoo.data.images import ImageData
from routerzoo.data.text import TextData

__all__ = ["ImageData", "TextData"]

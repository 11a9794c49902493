"""Lightning data modules: text for language modeling, images and labeled texts for classification."""

from routerzoo.data.images import ImageData
from routerzoo.data.labelled_text import LabelledText
from routerzoo.data.text import TextData

__all__ = ["ImageData", "LabelledText", "TextData"]

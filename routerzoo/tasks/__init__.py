"""Lightning modules: model, loss and metrics of each task."""

from routerzoo.tasks.image_classification import ImageClassification
from routerzoo.tasks.language_modeling import LanguageModeling
from routerzoo.tasks.pretrained_language_modeling import PretrainedLanguageModeling
from routerzoo.tasks.pretrained_text_classification import PretrainedTextClassification
from routerzoo.tasks.text_classification import TextClassification

__all__ = [
    "ImageClassification",
    "LanguageModeling",
    "PretrainedLanguageModeling",
    "PretrainedTextClassification",
    "TextClassification",
]

"""Lightning modules: what is trained, and what is reported."""

from routerzoo.tasks.image_classification import ImageClassification
from routerzoo.tasks.language_modeling import LanguageModeling

__all__ = ["ImageClassification", "LanguageModeling"]

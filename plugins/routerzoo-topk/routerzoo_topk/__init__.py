"""The top-k gates of large language models, as routers for routerzoo."""

from routerzoo_topk.gate import TopKRouter
from routerzoo_topk.hash_first import HashFirstRouter
from routerzoo_topk.presets import PRESETS, Preset

__all__ = ["PRESETS", "HashFirstRouter", "Preset", "TopKRouter"]

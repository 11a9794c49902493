"""The top-k gates of large language models, as routers for routerzoo."""

from routerzoo_topk.gate import TopKRouter

__all__ = ["TopKRouter"]

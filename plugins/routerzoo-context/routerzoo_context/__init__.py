"""Routers that look beyond a token's hidden state: at layers, other tokens, codes and tasks, or at nothing."""

from routerzoo_context.attention import AttentionRouter
from routerzoo_context.omni import OmniRouter
from routerzoo_context.rmoe import RMoERouter
from routerzoo_context.similarity import SimilarityRouter
from routerzoo_context.task import TaskRouter
from routerzoo_context.thor import ThorRouter
from routerzoo_context.vqmoe import VQMoERouter
from routerzoo_context.yuan import YuanRouter

__all__ = [
    "AttentionRouter",
    "OmniRouter",
    "RMoERouter",
    "SimilarityRouter",
    "TaskRouter",
    "ThorRouter",
    "VQMoERouter",
    "YuanRouter",
]

"""Routers that look beyond a token's hidden state: at other layers, at other tokens, at how experts relate."""

from routerzoo_context.omni import OmniRouter
from routerzoo_context.rmoe import RMoERouter
from routerzoo_context.similarity import SimilarityRouter
from routerzoo_context.yuan import YuanRouter

__all__ = ["OmniRouter", "RMoERouter", "SimilarityRouter", "YuanRouter"]

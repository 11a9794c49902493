"""Routers that mix instead of selecting: tokens into slots, or experts into one."""

from routerzoo_soft.smear import SMEARRouter
from routerzoo_soft.soft_moe import SoftMoERouter

__all__ = ["SMEARRouter", "SoftMoERouter"]

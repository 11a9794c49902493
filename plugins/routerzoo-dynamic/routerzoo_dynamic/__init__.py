"""Routers that give each token as many experts as it needs."""

from routerzoo_dynamic.block_ffn import BlockFFNRouter
from routerzoo_dynamic.da_moe import DAMoERouter
from routerzoo_dynamic.dyn_mole import DynMoLERouter
from routerzoo_dynamic.top_p import TopPRouter

__all__ = ["BlockFFNRouter", "DAMoERouter", "DynMoLERouter", "TopPRouter"]

"""The top-k gates of large models, as routers for routerzoo."""

from routerzoo_topk.gemma4 import Gemma4Router
from routerzoo_topk.gshard import GShardRouter
from routerzoo_topk.hash_first import HashFirstRouter
from routerzoo_topk.presets import PRESETS, Preset
from routerzoo_topk.quantile import QuantileBalancingRouter
from routerzoo_topk.simbal import SimBalRouter
from routerzoo_topk.sparse_mixer import SparseMixerRouter
from routerzoo_topk.switch import SwitchRouter
from routerzoo_topk.topk import TopKRouter
from routerzoo_topk.v_moe import VMoERouter

__all__ = [
    "PRESETS",
    "GShardRouter",
    "Gemma4Router",
    "HashFirstRouter",
    "Preset",
    "QuantileBalancingRouter",
    "SimBalRouter",
    "SparseMixerRouter",
    "SwitchRouter",
    "TopKRouter",
    "VMoERouter",
]

"""Models of transformers: dense ones become Mixtures of Experts, released ones route with any router.

Needs the extra `routerzoo[hf]`. Importing it lets the Auto classes of transformers load what was saved.
"""

from importlib.util import find_spec

if find_spec("transformers") is None:
    raise ImportError("routerzoo.hf needs transformers: pip install 'routerzoo[hf]'")

from routerzoo.hf.decoder import from_decoder
from routerzoo.hf.evaluation import evaluate
from routerzoo.hf.export import to_transformers
from routerzoo.hf.pretrained import freeze_experts, replace_routers, train_routers_only, upcycle
from routerzoo.hf.trainer import RoutingCallback

__all__ = [
    "RoutingCallback",
    "evaluate",
    "freeze_experts",
    "from_decoder",
    "replace_routers",
    "to_transformers",
    "train_routers_only",
    "upcycle",
]

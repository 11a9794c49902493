"""The routers that come with routerzoo, one method a file."""

from routerzoo.routers.hash import HashRouter
from routerzoo.routers.hyper import HyperRouter
from routerzoo.routers.linear import LinearRouter
from routerzoo.routers.random_frozen import RandomFrozenRouter
from routerzoo.routers.stablemoe import StableMoERouter
from routerzoo.routers.xmoe import XMoERouter

__all__ = ["HashRouter", "HyperRouter", "LinearRouter", "RandomFrozenRouter", "StableMoERouter", "XMoERouter"]

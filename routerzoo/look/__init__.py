"""Views of routing: which expert a patch or a piece of text is routed to, and which labels each expert specializes in.

`observe` runs a model and records the selected experts, `drawings` draws them, `page` writes them as HTML.
"""

from routerzoo.look.observe import Observation, claims, observe
from routerzoo.look.page import write_page

__all__ = ["Observation", "claims", "observe", "write_page"]

"""Looking at routing: which expert a patch or a piece of text goes to, and what each expert claims.

`observe` runs a model and keeps who was chosen, `drawings` draws it, `page` writes it as HTML.
"""

from routerzoo.look.observe import Observation, claims, observe
from routerzoo.look.page import write_page

__all__ = ["Observation", "claims", "observe", "write_page"]

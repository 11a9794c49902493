"""A router for routerzoo, to copy and change."""

from routerzoo_template.router import TemplateRouter

__all__ = ["TemplateRouter"]

"""`family_of`: the kind of a router, by what it declares and the package that it comes from."""

from __future__ import annotations

from routerzoo.registry import list_routers, router_class, router_package

FROZEN, OTHER = "frozen", "other"
OWN = "routerzoo"


def family_of(label: str) -> str:
    """Return the family of a router.

    Routers that declare not to learn are `frozen`, wherever they come from. Otherwise a plugin is a family
    (`routerzoo-assignment` is `assignment`), and so is each of the built-in routers, by its module.

    Args:
        label: of the router in rows. One that is no registered name, such as a router with arguments, is of `other`.
    """
    if label not in list_routers():
        return OTHER
    cls = router_class(label)
    if cls.trainable is False:
        return FROZEN
    package = router_package(label)
    return cls.__module__.rpartition(".")[2] if package == OWN else package.removeprefix(f"{OWN}-")

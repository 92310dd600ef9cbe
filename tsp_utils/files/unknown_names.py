"""Names that are not known, in one sentence."""

import difflib
from collections.abc import Iterable


def unknown(what: str, name, known: Iterable[str], others: Iterable[str] = ()) -> str:
    """The sentence for a name that is neither known nor among others, with the nearest one."""
    near = difflib.get_close_matches(str(name).lower(), [*known, *others], 1, 0)[0]
    return (f"The {what} {name!r} is not known; the nearest one is {near!r}, all are "
            f"{', '.join(known)}.")

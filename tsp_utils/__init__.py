"""TSP: deep clustering with features from self-supervised pretraining (Zhou & Zhang, 2022).

Every public name is importable from here, and loads its module only when it is asked for:
`import tsp_utils` alone loads neither torch nor numpy.
"""

import importlib

_HOME = {}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__version__ = "0.1.0"
__all__ = ["__version__", *_MODULE_OF]


def __getattr__(name):
    if name in _MODULE_OF:
        return getattr(importlib.import_module("tsp_utils." + _MODULE_OF[name]), name)
    raise AttributeError(f"module 'tsp_utils' has no attribute {name!r}")


def __dir__():
    return sorted(__all__)

"""One cache for all that is kept: features, K-means, heads, other clusterers, records of an hour.

`keys` says what a result depends on, `entries` keeps arrays under such a key, `vectors` features
by the content of their images.
"""

from tsp_utils.cache.entries import (
    arrays,
    call,
    file_name,
    fitted,
    hardware,
    prune,
    record,
    seeds,
    versions,
)
from tsp_utils.cache.keys import code_called_by, code_of, hash_of, key_of
from tsp_utils.cache.vectors import rows

__all__ = ["arrays", "call", "code_called_by", "code_of", "file_name", "fitted", "hardware",
           "hash_of", "key_of", "prune", "record", "rows", "seeds", "versions"]

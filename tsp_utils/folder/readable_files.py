"""Files of a folder, of which some cannot be read, change or go away while one looks at them."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from tsp_utils import cache
from tsp_utils.files.image_folders import ImageFiles, digest_of, is_constant
from tsp_utils.files.paths import cache_dir


class ReadableFiles(ImageFiles):
    """ImageFiles that goes on where a file cannot be read: a grey image in its place, and a note.

    `seen` has the indices that were decoded. Of their paths, `unreadable` has those that could not
    be, each with the sentence that says why, `constant` those of one colour throughout, and `pages`
    which page was taken of those that have several. `digests` are of what was decoded: a file that
    changes meanwhile gives no vector to what it held before.
    """

    def __init__(self, folder: Path, paths: Sequence[str]):
        super().__init__(folder, paths)
        self.seen: set[int] = set()
        self.unreadable: dict[str, str] = {}
        self.constant: set[str] = set()
        self.pages: dict[str, int] = {}
        self._shape: tuple[int, ...] = (32, 32, 3)

    @cached_property
    def digests(self) -> list[bytes]:
        """16 bytes an image, of what its file held when it was last read."""
        return super().digests

    def read_bytes(self, path: str) -> bytes:
        """What a file holds; nothing, and a note, where it cannot be opened."""
        try:
            return super().read_bytes(path)
        except OSError as error:
            self.unreadable[path] = (f"{self.folder / path} cannot be read ({error.strerror}): "
                                     f"replace or delete it.")
            return b""

    def __getitem__(self, index):
        if isinstance(index, slice):
            return super().__getitem__(index)
        path = self.paths[index]  # an IndexError ends an iteration
        content = self.read_bytes(path)
        self.seen.add(index)
        self.digests[index] = digest_of(content)
        try:
            image, page = self._with_page(self.folder / path, content)
        except OSError as error:
            self.unreadable.setdefault(path, str(error))
            return np.full(self._shape, 128, np.uint8)
        if page:
            self.pages[path] = page
        if is_constant(image):
            self.constant.add(path)
        self._shape = image.shape  # so that backbones for images of one size go on, too
        return image

    def look_at_all(self) -> None:
        """Fill `unreadable`, `constant` and `pages` by what all files hold, here or elsewhere."""
        def look(row: int) -> list:
            if row not in self.seen:
                self[row]
            path = self.paths[row]
            return [path in self.unreadable, path in self.constant, self.pages.get(path, 0)]

        def make(rows):
            for start in range(0, len(rows), 256):
                part = rows[start : start + 256]
                yield part, np.array([look(row) for row in part], np.float32)

        facts = cache.rows(cache_dir() / "files", "files", {}, [ReadableFiles], self.digests, make)
        for row in np.flatnonzero(facts.any(1)):
            path, (bad, constant, page) = self.paths[row], facts[row]
            if bad and path not in self.unreadable:
                self[row]  # for the reason, which is not kept
                self.unreadable.setdefault(path, f"{self.folder / path} could not be read in an "
                                           f"earlier run: tsp-utils cache --prune 0 forgets it.")
            if constant:
                self.constant.add(path)
            if page:
                self.pages[path] = int(page)

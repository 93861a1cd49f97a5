"""The digest that a model's pipeline carries, of its files alone: no tensor is read.

Not here: hashing, and what is remembered of it (`weights/digests`).
"""

from __future__ import annotations

from gesso.weights import manifest
from gesso.weights.catalogue import Entry
from gesso.weights.files import digest, files_of


def weights_digest(entry: Entry) -> str:
    """The digest of the model's weights. Files that were loaded and not written to since are not hashed again.

    Raises FileError for files that are missing, WeightsError for a model of our own layout that was altered.
    """
    if entry.layout == "gesso":
        return manifest.verify(entry.folder, tuple(name for name in entry.files if name != manifest.NAME))
    parts = entry.files
    if entry.family == "z-image":
        from gesso.engine.loading.z_image import picture_parts

        parts = (*parts, *picture_parts(entry.folder))
    return digest(files_of(entry.folder, parts))

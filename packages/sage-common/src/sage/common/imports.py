"""Faster imports of large packages."""

import contextlib
import gc
import sys
from collections.abc import Iterable, Iterator

#: Packages that transformers imports if they are installed, although language models do not need them. The imports take 1 s
#: and 120 MB.
UNUSED_BY_LANGUAGE_MODELS = ("datasets", "pandas", "scipy", "sklearn")


@contextlib.contextmanager
def fast_imports(unused: Iterable[str] = ()) -> Iterator[None]:
    """Make the imports in the block faster. Garbage collection is disabled, and the packages `unused` are hidden.

    Imported modules are never freed, but garbage collection would examine their objects repeatedly. This would take a sixth
    of the import time. After the block, these objects are excluded from garbage collection.

    unused: packages to hide. An import of a hidden package raises ImportError, even after the block.
    """
    sys.modules.update(dict.fromkeys(unused))  # type: ignore[arg-type] # None: the import raises ImportError
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()

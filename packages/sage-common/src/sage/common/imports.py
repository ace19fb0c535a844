"""Faster imports of large packages."""

import contextlib
import gc
import sys
from collections.abc import Iterable, Iterator

#: Packages that transformers imports if they are installed. Language models do not use them. They take 1 s and 120 MB.
UNUSED_BY_LANGUAGE_MODELS = ("datasets", "pandas", "scipy", "sklearn")


@contextlib.contextmanager
def fast_imports(unused: Iterable[str] = ()) -> Iterator[None]:
    """Make imports in the block faster, for example of torch: without garbage collection and without `unused` packages.

    Imported modules are never freed, but garbage collection would examine all their objects again and again, which takes
    a sixth of the time. After the block, these objects are excluded from garbage collection.

    unused: packages that appear as not installed from now on.
    """
    sys.modules.update(dict.fromkeys(unused))  # type: ignore[arg-type] # None: the import raises ImportError
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()

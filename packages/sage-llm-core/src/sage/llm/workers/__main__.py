"""Start a server of this package: `python -m sage.llm.workers generation --model M --port P`."""

import importlib
import sys

from sage.common.imports import UNUSED_BY_LANGUAGE_MODELS, fast_imports

name = sys.argv.pop(1)
with fast_imports(() if name == "embedding" else UNUSED_BY_LANGUAGE_MODELS):
    server = importlib.import_module(f"sage.llm.workers.{name}")
server.main()

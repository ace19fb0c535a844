"""Start a server of this package: `python -m sage.llm.workers generation --model M --port P`."""

import importlib
import sys

from sage.common.imports import UNUSED_BY_MODELS, fast_imports

with fast_imports(UNUSED_BY_MODELS):
    server = importlib.import_module(f"sage.llm.workers.{sys.argv.pop(1)}")
server.main()

"""`python -m sage.llm.gateway`: run the gateway in the foreground."""

import sys

from sage.common.imports import fast_imports

with fast_imports():
    from sage.llm.gateway.main import main
sys.exit(main())

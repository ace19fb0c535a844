"""The typed HTTP client of the gateway, sync and async."""

from sage.llm.client.async_client import AsyncSageClient
from sage.llm.client.client import SageClient

__all__ = ["AsyncSageClient", "SageClient"]

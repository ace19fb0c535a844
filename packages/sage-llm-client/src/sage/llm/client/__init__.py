"""The typed HTTP client of the gateway, sync and async."""

from sage.llm.client.client import AsyncSageClient, SageClient

__all__ = ["AsyncSageClient", "SageClient"]

"""Resolve model names to local folders, and load models from them."""

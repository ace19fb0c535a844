"""Inference servers: how each is started."""

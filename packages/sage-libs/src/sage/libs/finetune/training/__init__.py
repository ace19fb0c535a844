"""What runs in the worker's process. It imports torch; nothing outside of it and `worker.py` imports it."""

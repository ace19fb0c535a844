"""One executor for each way of running an engine."""

"""The HTTP routes. Each route calls the control plane."""

"""The routes, each a thin layer over the control plane."""

"""The HTTP surface, thin over the control plane."""

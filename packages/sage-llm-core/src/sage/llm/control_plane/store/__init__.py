"""The database of the control plane: engines, servers, events, nodes and leases."""

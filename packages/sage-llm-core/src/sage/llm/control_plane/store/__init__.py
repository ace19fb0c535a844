"""What the control plane was told and what it did, in a database."""

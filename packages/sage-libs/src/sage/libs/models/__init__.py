"""Models by name: which local folder a name means, and how it is loaded."""

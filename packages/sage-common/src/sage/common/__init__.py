"""Code that all parts of SAGE share: paths, settings, errors, logging, process locks."""

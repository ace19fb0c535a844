"""What every part of SAGE shares: paths, settings, errors, logging, process locks."""

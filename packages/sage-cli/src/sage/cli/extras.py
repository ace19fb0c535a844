"""Check whether the optional packages that a command needs are installed."""

import importlib.util

from sage.common.errors import ConfigError


def require(module: str, purpose: str) -> None:
    """Raise ConfigError if a module is not installed.  purpose: first words of the error message, such as "An export"."""
    try:
        is_installed = importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the parent package is not installed either
        is_installed = False
    if not is_installed:
        raise missing(module, purpose)


def missing(module: str, purpose: str) -> ConfigError:
    """Return the error for a module that a command needs and that is not installed."""
    return ConfigError(
        code="package_missing",
        message=f"{purpose} needs {module}, which is not installed.",
        hint="Install it: pip install 'sage-cli[local]'.",
    )

"""Range checks of the methods' configurations."""

from typing import Any

from hypdefect.errors import ConfigError


def require_positive(config: Any, *names: str) -> None:
    """Raise ConfigError where one of the named fields is not > 0."""
    for name in names:
        if not getattr(config, name) > 0:
            raise ConfigError(f"method.{name} must be positive, got {getattr(config, name)}")


def require_at_least(config: Any, least: float | int, *names: str) -> None:
    """Raise ConfigError where one of the named fields is below `least`."""
    for name in names:
        if not getattr(config, name) >= least:
            raise ConfigError(f"method.{name} must be at least {least}, got {getattr(config, name)}")


def require_share(config: Any, *names: str) -> None:
    """Raise ConfigError where one of the named fields lies outside [0, 1]."""
    for name in names:
        if not 0 <= getattr(config, name) <= 1:
            raise ConfigError(f"method.{name} must lie in [0, 1], got {getattr(config, name)}")

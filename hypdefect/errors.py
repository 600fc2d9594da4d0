"""Every error a user can cause or must act on. The message names the value, the place and the remedy."""


class HypdefectError(Exception):
    """Base of all errors raised on purpose by hypdefect."""


class ConfigError(HypdefectError, ValueError):
    """A setting is unknown, of the wrong type or out of range."""


class DataError(HypdefectError, ValueError):
    """An image, mask, manifest or episode request cannot be used as it is."""


class ArtifactError(HypdefectError):
    """A stored thing (feature store, run directory, registry version) is missing, damaged or of another kind."""


class NumericsError(HypdefectError):
    """A loss, state or solver left the finite numbers."""

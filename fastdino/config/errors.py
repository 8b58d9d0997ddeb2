"""What a user can mend, and the check of a setting that raises it."""


class UserError(Exception):
    """Something that a user can mend; the message says what, where and what to do. The command ends with it."""

    exit_code = 2


class ConfigError(UserError, ValueError):
    """A setting that cannot work; the message names the setting, its value and the remedy."""


def require(holds: bool, path: str, value: object, allowed: str, reason: str = "") -> None:
    """Raises ConfigError unless ``holds``: the setting ``path`` must be ``allowed``."""
    if not holds:
        raise ConfigError(f"{path}={value!r} must be {allowed}" + (f": {reason}" if reason else ""))

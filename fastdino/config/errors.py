"""What a user can mend, and the checks of settings that raise it."""


class UserError(Exception):
    """Something that a user can mend; the message says what, where and what to do. The command ends with it."""

    exit_code = 2


class ConfigError(UserError, ValueError):
    """A setting that cannot work; the message names the setting, its value and the remedy."""


def require(condition: bool, path: str, value: object, allowed: str, reason: str) -> None:
    if not condition:
        raise ConfigError(f"{path}={value!r} must be {allowed}: {reason}")


def require_range(path: str, low_high: tuple[float, float]) -> None:
    low, high = low_high
    require(0 < low <= high <= 1, path, low_high, "two numbers with 0 < low <= high <= 1", "shares of the image's area")

"""A loss becomes a better model. The package is callable: ``fastdino.train(config)`` runs :func:`trainer.train`."""

import sys
import types
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastdino.config import Config
    from fastdino.train.trainer import Result


class _CallablePackage(types.ModuleType):
    """``fastdino.train`` names this room and the function; a callable module lets both be what one expects."""

    def __call__(self, config: "Config") -> "Result":
        from fastdino.train.trainer import train

        return train(config)


sys.modules[__name__].__class__ = _CallablePackage

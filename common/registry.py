"""Tables of named parts, open to other people's code: a module given to `--plugins` registers its parts here."""

import difflib
from collections.abc import Iterable
from typing import Any

from config import ConfigError, UserError


class Registry(dict):
    """A dict from the names that a setting accepts to their values; a name cannot be registered for two values.

    BACKBONES = Registry("BACKBONE.NAME")
    BACKBONES.register("resnet", resnet)
    BACKBONES.find(settings.BACKBONE.NAME)
    """

    def __init__(self, key: str, *, error: type[UserError] = ConfigError, otherwise: str = ""):
        """
        Args:
            key: the setting whose value is a name. error: class of the errors raised.
            otherwise: other values that the setting accepts, for messages.
        """
        super().__init__()
        self.key, self._error, self._otherwise = key, error, otherwise

    def register(self, name: str, value: Any) -> Any:
        """Adds an entry and returns its value.

        Raises:
            ConfigError (or `error`): the name is registered for another value.
        """
        if self.get(name, value) is not value:
            raise self._error(f"{self.key} {name!r} is registered already: choose another name")
        self[name] = value
        return value

    def find(self, name: str) -> Any:
        """Returns the value of a name.

        Raises:
            ConfigError (or `error`): the name is not registered; the message lists similar names.
        """
        if name not in self:
            near = difflib.get_close_matches(name, self, n=3)
            listed = f"near: {', '.join(near)}" if near else f"known: {', '.join(self) or 'none'}"
            others = f"{self._otherwise}; --plugins imports modules that register more"
            raise self._error(f"no {self.key} {name!r} ({listed}{others})")
        return self[name]

    def find_all(self, names: Iterable[str]) -> list[Any]:
        """Returns the values of several names; raises as `find` does."""
        return [self.find(name) for name in names]

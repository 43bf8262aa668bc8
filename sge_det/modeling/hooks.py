"""Hooks on modules that somebody else has built: they copy and pickle with the model."""

from ..errors import UserError


class Unscriptable(UserError, AttributeError):
    """A model that is scripted has hooks of ours: says what takes the place of scripting."""


class Hook:
    """A hook, which TorchScript does not take.

    Attributes:
        instead: what to do in the place of ``torch.jit.script``, a sentence.
    """

    instead: str

    @property
    def __name__(self) -> str:
        # what torch.jit.script asks hooks for first
        raise Unscriptable(self.instead)

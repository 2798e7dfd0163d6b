"""What can go wrong, one class a stage: each message says what, where, what was found, and how to mend it."""


class FxregError(Exception):
    """Base of every error fxreg raises on purpose."""


class RuleError(FxregError):
    """A rule or an effect is malformed: found when it is constructed, or when its classes are looked up."""


class MatchError(FxregError):
    """A rule matched nothing, or two rules claim the same thing: found before anything is captured."""


class CaptureError(FxregError):
    """The model, or a rule on it, cannot be turned into a graph that is sure to train like the model."""


class VerifyError(FxregError):
    """The emitted module does not do what the model and the rules say."""

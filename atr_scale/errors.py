"""The one error type a user is meant to see."""


class UserError(ValueError):
    """A mistake the user can mend: one line with the cause, the place and the remedy.

    The command line prints the message alone and exits with code 2; anything else is a failure of ours.
    """

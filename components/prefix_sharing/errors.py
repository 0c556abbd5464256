"""The one exception for what a user can put right."""


class UserError(Exception):
    """Bad input: its message is one sentence that says where the fault lies and what to do about it.

    The recipes print it without a traceback and exit with status 1.
    """

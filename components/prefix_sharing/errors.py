"""Errors that a user can fix."""


class UserError(Exception):
    """Bad input: its message is one sentence that says where the fault is and what to do about it.

    The recipes print it without a traceback and exit with status 1.
    """


class ConfigError(UserError):
    """A fault in a config: the message begins with ``Config key 'x.y': ``.

    Args:
        key (str): the dotted key.
        problem (str): what is wrong and what to do, without the full stop.
    """

    def __init__(self, key: str, problem: str) -> None:
        super().__init__(key, problem)  # both, so that it can be pickled
        self.key = key
        self.problem = problem

    def __str__(self) -> str:
        end = "" if self.problem.endswith((".", "?")) else "."
        return f"Config key '{self.key}': {self.problem}{end}"

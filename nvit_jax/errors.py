"""The one exception that means "the user can fix this": main.py prints it as one line and exits with 2."""


class UserError(Exception):
    """A mistake in a path, a config value or a file. The message says what is wrong, where, and what to do."""

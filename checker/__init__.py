"""The rules of the assignment, measured on any network: a program of its own, `python checker`."""

"""The commands of `nvit-jax`, one a module: `usage()` says what it takes, `execute(words)` does it.

Modules of this folder import JAX inside of functions only: help and mistakes are answered at once.
"""

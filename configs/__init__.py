"""The built-in configs. Installed they are nvit_jax.configs, and `--config demo` finds them from anywhere.

Their headers say `nvit-jax run --config NAME`. In a clone that is not installed, `python main.py` is the same program.
A config is loaded from its path as a module of its own: it imports from nvit_jax, never from its neighbours. What
several share lies in nvit_jax/run/recipes.py.
"""

"""One function for each thing that a user wants: what `import nvit_jax` offers, and what the command line calls."""

"""The stages of a run: each reads what earlier ones left in the workdir, does its work once, and writes its files."""

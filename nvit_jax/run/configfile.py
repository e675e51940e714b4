"""Configuration files: found by path or by the name of a built-in one, and loaded with one line for all that fails.

The built-in ones lie in nvit_jax/configs/ of an installed package and in configs/ of a clone: the same files.
"""

import importlib.machinery
import importlib.util
import inspect
import pathlib
import sys
import types
from typing import TYPE_CHECKING, Any

import nvit_jax
from nvit_jax.errors import UserError, first_line, nearest
from nvit_jax.paths import kind, named

if TYPE_CHECKING:  # help and mistakes do not wait for it
    from ml_collections import ConfigDict


def builtin_folder() -> pathlib.Path:
    """Where the built-in configs lie."""
    package = pathlib.Path(nvit_jax.__file__).parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def builtin_names() -> list[str]:
    """Of the built-in configs, sorted."""
    return sorted(path.stem for path in builtin_folder().glob("*.py") if not path.stem.startswith("_"))


def find_config(text: str) -> pathlib.Path:
    """The file that `text` means, without its variant: a path, else a built-in name. UserError when there is none."""
    name = text if "://" in text else text.partition(":")[0]
    path = named(name, "--config=")
    if (found := kind(path, "--config=")) == "a file":
        return path
    if found not in (None, "a directory"):
        raise UserError(f"--config={text} is {found}, not a file")
    names = builtin_names()
    if name in names:
        return builtin_folder() / f"{name}.py"
    if found and path.name not in names:
        raise UserError(f"--config={text} is a directory, not a file")
    if path.suffix or len(path.parts) > 1:
        hint = f"; there is a built-in one: --config {path.stem}" if path.stem in names else ""
        raise UserError(f"--config={text}: there is no such file{hint}")
    raise UserError(
        f"--config={text}: there is no such file and no built-in config of that name{nearest(name, names)} "
        f"(built in: {', '.join(names)})"
    )


def load_config(text: str) -> "ConfigDict":
    """What get_config() of a file returns; `text` is PATH or NAME, with :VARIANT for its argument. UserError."""
    if text.endswith((".json", ".yaml", ".yml", ".toml")):
        raise UserError(
            f"--config={text}: a config is a Python file with a function get_config(); --config.KEY=VALUE sets a key"
        )
    module = _run_file(text)
    if not callable(getattr(module, "get_config", None)):
        raise UserError(f"--config={text} has no function get_config()")
    variant = text.split(":", 1)[1:]
    try:
        inspect.signature(module.get_config).bind(*variant)
    except TypeError as error:
        what = "has no variants" if variant else "needs a variant, as in --config NAME:VARIANT"
        raise UserError(f"--config={text}: this config {what}") from error
    try:
        config = module.get_config(*variant)
    except UserError as error:
        raise UserError(f"--config={text}: {error}") from error
    except (Exception, SystemExit) as error:
        raise UserError(f"--config={text}: get_config() fails: {_in_words(error)}") from error
    from ml_collections import ConfigDict

    if not isinstance(config, ConfigDict):
        start = "start from nvit_jax.run.config.default_config()"
        raise UserError(f"--config={text}: get_config() returns a {type(config).__name__}, not a ConfigDict; {start}")
    return config


def _run_file(text: str) -> types.ModuleType:
    """A module of its own, whatever the file's name ends in; the newest is `sys.modules["nvit_jax_config"]`."""
    loader = importlib.machinery.SourceFileLoader("nvit_jax_config", str(find_config(text)))
    spec: Any = importlib.util.spec_from_loader(loader.name, loader)
    module = importlib.util.module_from_spec(spec)
    sys.modules[loader.name] = module  # dataclasses look their module up
    try:
        loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise UserError(f"--config={text} cannot be imported: {_in_words(error)}") from error
    return module


def _in_words(error: BaseException) -> str:
    if isinstance(error, SystemExit):
        return f"it calls sys.exit({'' if error.code is None else repr(error.code)})"
    return f"{type(error).__name__}: {first_line(error)}"

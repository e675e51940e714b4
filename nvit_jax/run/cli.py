"""The command line: flags and config overrides, and one line for everything that is wrong with them."""

import difflib
import importlib.util
import pathlib
from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict, config_flags

from nvit_jax.errors import UserError
from nvit_jax.run.config import STAGES, check_config, default_config, flatten_config


def parse(argv: list[str]) -> tuple[Any, ConfigDict, tuple[str, ...]]:
    """(flags, config, stages to run). UserError for what absl and ml_collections do not accept, and bad values."""
    unset = [a.removeprefix("--config.").removesuffix("=None") for a in argv if _unsets(a)]
    argv = [a for a in argv if not _unsets(a)]  # ml_collections would read "None" as a value
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "", flag_values=values, sys_argv=argv)
    flags.DEFINE_string("workdir", None, "", flag_values=values)
    flags.DEFINE_string("stage", None, "", flag_values=values)
    flags.DEFINE_boolean("force", False, "", flag_values=values)
    flags.DEFINE_boolean("distributed", False, "", flag_values=values)
    flags.DEFINE_string("coordinator", None, "", flag_values=values)
    flags.DEFINE_integer("processes", None, "", flag_values=values)
    flags.DEFINE_integer("process_id", None, "", flag_values=values)
    flags.DEFINE_list("local_devices", None, "", flag_values=values)
    path = next((a.split("=", 1)[1] for a in argv if a.startswith("--config=")), None)
    if path is None and "--config" in argv[:-1]:
        path = argv[argv.index("--config") + 1]
    if path is None:
        raise UserError("--config is missing; for example --config configs/demo.py")
    if not pathlib.Path(path.split(":")[0]).is_file():
        raise UserError(f"--config={path}: there is no such file")
    try:
        rest = values(argv)
    except Exception as error:  # whatever the user's config file raises, too
        raise UserError(_explain(str(error), argv, path)) from error
    if len(rest) > 1:
        raise UserError(f"unexpected argument {rest[1]!r}; overrides look like --config.seed=1")
    if not values.workdir:
        raise UserError("--workdir is missing")
    given = (values.coordinator, values.processes, values.process_id, values.local_devices)
    if any(value is not None for value in given) and not values.distributed:
        raise UserError("--coordinator, --processes, --process_id and --local_devices go with --distributed")
    if values.coordinator is not None and not values.coordinator.rpartition(":")[2].isdecimal():
        raise UserError(f"--coordinator={values.coordinator}: give HOST:PORT, the same on every host")
    if values.local_devices is not None and not all(number.isdecimal() for number in values.local_devices):
        raise UserError(f"--local_devices={','.join(values.local_devices)}: give numbers, such as 0,1")
    config = values.config
    known = flatten_config(default_config())
    for key in unset:
        if known.get(key, "") is not None:
            raise UserError(f"--config.{key}=None: {'it cannot be unset' if key in known else 'unknown config key'}")
        *parents, last = key.split(".")
        node = config
        for parent in parents:
            node = node[parent]
        node[last] = None
    check_config(config)
    if values.stage is None:
        return values, config, tuple(config.stages)
    if values.stage not in STAGES:
        near = difflib.get_close_matches(values.stage, STAGES, 1, 0)
        raise UserError(f"unknown stage {values.stage!r}; did you mean {near[0]!r}? There are {', '.join(STAGES)}")
    return values, config, (values.stage,)


def join(flags: Any) -> None:
    """Join the processes of this run; UserError when they cannot be found."""
    local = None if flags.local_devices is None else [int(number) for number in flags.local_devices]
    try:
        jax.distributed.initialize(
            flags.coordinator, flags.processes, flags.process_id, local, heartbeat_timeout_seconds=30
        )
    except (ValueError, IndexError, RuntimeError) as error:
        raise UserError(
            f"--distributed: {(str(error).splitlines() or [type(error).__name__])[0]}; where JAX does not find the "
            "other processes by itself, give --coordinator=HOST:PORT --processes=N --process_id=I, 0 <= I < N"
        ) from error
    if jax.process_index() == 0:
        count, devices = jax.process_count(), jax.device_count()
        print(f"{count} processes, {devices} devices; when one is lost, the others end and the same command resumes")


def _unsets(argument: str) -> bool:
    return argument.startswith("--config.") and argument.endswith("=None")


def _explain(message: str, argv: list[str], path: str) -> str:
    """One line for an error of absl or ml_collections, with the nearest key for a misspelt override."""
    first = message.splitlines()[0] if message else "the configuration cannot be read"
    spec = importlib.util.spec_from_file_location("config_file", path.split(":")[0])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        return f"--config={path} cannot be imported: {type(error).__name__}: {error}"
    if not hasattr(module, "get_config"):
        return f"--config={path} has no function get_config()"
    try:
        keys = list(flatten_config(module.get_config(*path.split(":")[1:])))
    except Exception as error:
        return f"--config={path}: get_config() fails: {type(error).__name__}: {error}"
    for argument in argv:
        key = argument.split("=", 1)[0].removeprefix("--config.")
        if argument.startswith("--config.") and key not in keys and f"no{key}" not in keys:
            near = difflib.get_close_matches(key, keys, 1, 0)
            return f"unknown config key {key!r}; did you mean {near[0]!r}?"
    return first

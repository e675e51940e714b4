"""The flags of `nvit-jax run` and config overrides, and one line for everything that is wrong with them."""

import difflib
import itertools
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from nvit_jax.errors import UserError, first_line, nearest
from nvit_jax.paths import file, named, read
from nvit_jax.run.config import STAGES, default_config, flatten_config
from nvit_jax.run.configfile import load_config
from nvit_jax.run.shapes import SHAPES
from nvit_jax.run.validation import check_config
from nvit_jax.schema import Flag, Maybe

_OVERRIDE = re.compile(r"--?(no)?config\.")


def parse(argv: list[str]) -> tuple[Any, ConfigDict, tuple[str, ...]]:
    """(flags, config, stages to run) of a command line, the program's name first.

    UserError for what absl and ml_collections do not accept, and for bad values.
    """
    values = _define()
    _check_flagfiles(argv, set())
    try:
        words = values.read_flags_from_files(argv[1:], force_gnu=False)
    except flags.Error as error:
        raise UserError(_said(error)) from error
    _check_given(words, values)
    text, words = _take_config(words)
    _check_names(words, values)
    if text is None:
        raise UserError("--config is missing; for example --config demo")
    config = load_config(text)
    _apply(config, words, values)
    if not values.workdir:
        raise UserError("--workdir is missing")
    named(values.workdir, "--workdir=")
    _check_processes(values)
    check_config(config)
    if values.stage is None:
        return values, config, tuple(config.stages)
    if values.stage not in STAGES:
        raise UserError(f"unknown stage {values.stage!r}{nearest(values.stage, STAGES)} (known: {', '.join(STAGES)})")
    return values, config, (values.stage,)


def override(config: ConfigDict, words: Sequence[str]) -> None:
    """Set the keys of `--config.KEY=VALUE` words; `=None` unsets one. UserError for unknown keys and bad values."""
    _apply(config, words, flags.FlagValues())


def join(values: Any) -> None:
    """Join the processes of this run; UserError when they cannot be found."""
    import jax

    local = None if values.local_devices is None else [int(number) for number in values.local_devices]
    try:
        jax.distributed.initialize(
            values.coordinator, values.processes, values.process_id, local, heartbeat_timeout_seconds=30
        )
    except (ValueError, IndexError, RuntimeError) as error:
        raise UserError(
            f"--distributed: {_said(error)}; where JAX does not find the "
            "other processes by itself, give --coordinator=HOST:PORT --processes=N --process_id=I, 0 <= I < N"
        ) from error
    if jax.process_index() == 0:
        count, devices = jax.process_count(), jax.device_count()
        print(f"{count} processes, {devices} devices; when one is lost, the others end and the same command resumes")


def _define() -> flags.FlagValues:
    values = flags.FlagValues()
    for name in ("workdir", "stage", "coordinator"):
        flags.DEFINE_string(name, None, "", flag_values=values)
    for name in ("force", "distributed"):
        flags.DEFINE_boolean(name, False, "", flag_values=values)
    for name in ("processes", "process_id"):
        flags.DEFINE_integer(name, None, "", flag_values=values)
    flags.DEFINE_list("local_devices", None, "", flag_values=values)
    return values


def _check_flagfiles(words: Sequence[str], seen: set[pathlib.Path]) -> None:
    """UserError for a file of flags that is none, also for one that another names: absl would wait for a pipe."""
    for name in _flagfiles(words):
        path = pathlib.Path(name).expanduser()
        if path in seen:
            continue
        seen.add(path)
        content = read(file(path, "--flagfile="), "--flagfile=", most=2**20)
        _check_flagfiles([line.strip() for line in content.decode(errors="replace").splitlines()], seen)


def _flagfiles(words: Sequence[str]) -> Iterator[str]:
    """What absl would open."""
    for word, following in itertools.pairwise((*words, "")):
        if match := re.fullmatch(r"--?flagfile(?:=(.*))?", word):
            yield following if match[1] is None else match[1]


def _check_given(words: Sequence[str], values: flags.FlagValues) -> None:
    """UserError for an option whose value was forgotten: absl would take the next option for it."""
    switches = {name for name in values if values[name].boolean}
    switches |= {f"config.{key}" for key, shape in SHAPES.items() if shape in (Flag(), Maybe(Flag()))}
    for word, following in itertools.pairwise(words):
        name = word.lstrip("-")
        valued = name == "config" or name.startswith("config.") or name in values
        forgotten = word.startswith("-") and "=" not in word and following.startswith("--")
        if forgotten and valued and name not in switches:
            raise UserError(f"{word}: its value is missing; {following} comes next")


def _take_config(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """The value of --config, the last one when there are several, and the other words."""
    text, rest, left = None, [], iter(words)
    for word in left:
        if re.fullmatch(r"--?config", word):
            text = next(left, None)
        elif re.match(r"--?config=", word):
            text = word.split("=", 1)[1]
        else:
            rest.append(word)
    return text, rest


def _check_names(words: Sequence[str], values: flags.FlagValues) -> None:
    """UserError, with the nearest one, for a flag that does not exist."""
    known = ["config", *values, *(f"no{name}" for name in values if values[name].boolean)]
    for word in words:
        name = word.split("=", 1)[0].removeprefix("--")
        if word.startswith("--") and name and not _OVERRIDE.match(word) and name not in known:
            shown = [f"--{name}" for name in ("config", *values, "help", "version")]
            raise UserError(f"unknown option --{name}{nearest(f'--{name}', shown)} (see nvit-jax run --help)")


def _check_processes(values: Any) -> None:
    given = (values.coordinator, values.processes, values.process_id, values.local_devices)
    if any(value is not None for value in given) and not values.distributed:
        raise UserError("--coordinator, --processes, --process_id and --local_devices go with --distributed")
    if values.coordinator is not None and not values.coordinator.rpartition(":")[2].isdecimal():
        raise UserError(f"--coordinator={values.coordinator}: give HOST:PORT, the same on every host")
    if values.local_devices is not None and not all(number.isdecimal() for number in values.local_devices):
        raise UserError(f"--local_devices={','.join(values.local_devices)}: give numbers, such as 0,1")


# ----------------------------------------------------------------------------------------------- overrides


def _apply(config: ConfigDict, words: Sequence[str], values: flags.FlagValues) -> None:
    """Parse flags and overrides; `values` and `config` hold them afterwards."""
    keys = flatten_config(config)
    for word in words:
        if _OVERRIDE.match(word):
            _check_key(_key(word), keys)
    unset = [word for word in words if _unsets(word)]
    words = [word for word in words if not _unsets(word)]  # ml_collections would read "None" as a value
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=["", *words])
        rest = values(["", *words])
    except Exception as error:  # ml_collections raises many kinds
        raise UserError(_of_key(words) or _said(error).removeprefix("flag ")) from error
    if len(rest) > 1:
        raise UserError(f"unexpected argument {rest[1]!r}; overrides look like --config.seed=1")
    for word in unset:
        _unset(config, _key(word))


def _key(word: str) -> str:
    return _OVERRIDE.sub("", word.split("=", 1)[0], count=1)


def _unsets(word: str) -> bool:
    return _OVERRIDE.match(word) is not None and word.endswith("=None")


def _check_key(key: str, keys: dict[str, Any]) -> None:
    """UserError, with the nearest one, for a key that the config does not have."""
    if key in keys or any(known.startswith(f"{key}.") for known in keys):
        return
    whole = [known for known in keys if known.endswith(f".{key}")]  # its section was forgotten
    near = whole if len(whole) == 1 else difflib.get_close_matches(key, keys, 1, 0.75)  # dotted names are all alike
    hint = f"; did you mean {near[0]!r}?" if near else "; nvit_jax/run/config.py lists all with their meaning"
    raise UserError(f"unknown config key {key!r}{hint}")


def _of_key(words: Sequence[str]) -> str:
    """What is wrong with the first override that cannot be read, "" when all of them can."""
    for word in words:
        key, equals, value = _key(word), *word.partition("=")[1:]
        if not (_OVERRIDE.match(word) and equals):
            continue
        shape, config = SHAPES.get(key), default_config()
        if shape is None:
            return f"--config.{key}={value}: it is a section; set its keys, as in --config.{_first_key(key)}=VALUE"
        try:
            config_flags.DEFINE_config_dict(
                "config", config, flag_values=(one := flags.FlagValues()), sys_argv=["", word]
            )
            one(["", word])
        except Exception:  # of many kinds
            return f"--config.{key}={value}: must be {shape.words}"
    return ""


def _first_key(section: str) -> str:
    return next(key for key in SHAPES if key.startswith(f"{section}."))


def _unset(config: ConfigDict, key: str) -> None:
    if flatten_config(default_config()).get(key, "") is not None:
        raise UserError(f"--config.{key}=None: it cannot be unset")
    *parents, last = key.split(".")
    node = config
    for parent in parents:
        node = node[parent]
    node[last] = None


def _said(error: Exception) -> str:
    """Of what absl and ml_collections say."""
    text = first_line(error).removeprefix("ERROR:: ")
    flag, _, rest = text.partition(": ('Non-boolean argument")
    return f"{flag}: give true or false" if rest else text

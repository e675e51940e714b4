"""nvit_jax: prune Vision Transformers with Hessian-aware saliency.

    python main.py --config CONFIG.py --workdir DIR [--stage STAGE] [--force] [--config.KEY=VALUE ...]

Stages, in order (all of config.stages without --stage):
  pretrain  train a dense ViT                    -> DIR/pretrain/model
  latency   measure this device                  -> DIR/latency/metrics.json
  prune     score, rank, mask, reshape           -> DIR/prune/model (compact), DIR/prune/masked
  finetune  distill from the unpruned model      -> DIR/finetune/model
  eval      accuracy, MACs, parameters, latency  -> DIR/eval/metrics.json, DIR/summary.json
  report    one page with the plots              -> DIR/report.html

A finished stage is left alone, a killed one resumes. --force starts one anew (with --stage) and marks the later
ones stale. --distributed calls jax.distributed.initialize() first (several hosts).
"""

import difflib
import pathlib
import sys


def main(argv: list[str]) -> int:
    """Exit code: 0 done, 2 a mistake of the user's (one line), 143 stopped by a signal after saving."""
    if "--help" in argv or "-h" in argv or len(argv) == 1:
        print(__doc__)
        return 0
    from nvit_jax.errors import UserError

    try:
        flags, config = _parse(argv)
        return _run(flags, config)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parse(argv: list[str]):  # type: ignore[no-untyped-def]
    """(flags, config). UserError for everything that absl and ml_collections do not accept."""
    from absl import flags
    from ml_collections import config_flags

    from nvit_jax.errors import UserError
    from nvit_jax.workdir import flatten_config

    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "", flag_values=values, sys_argv=argv)
    flags.DEFINE_string("workdir", None, "", flag_values=values)
    flags.DEFINE_string("stage", None, "", flag_values=values)
    flags.DEFINE_boolean("force", False, "", flag_values=values)
    flags.DEFINE_boolean("distributed", False, "", flag_values=values)
    path = next((a.split("=", 1)[1] for a in argv if a.startswith("--config=")), None)
    if path is None and "--config" in argv[:-1]:
        path = argv[argv.index("--config") + 1]
    if path is None:
        raise UserError("--config is missing; for example --config configs/demo.py")
    if not pathlib.Path(path.split(":")[0]).is_file():
        raise UserError(f"--config={path}: there is no such file")
    try:
        rest = values(argv)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, SyntaxError) as error:
        raise UserError(_explain(str(error), argv, path, flatten_config)) from error
    if len(rest) > 1:
        raise UserError(f"unexpected argument {rest[1]!r}; overrides look like --config.seed=1")
    if not values.workdir:
        raise UserError("--workdir is missing")
    return values, values.config


def _explain(message: str, argv: list[str], path: str, flatten_config) -> str:  # type: ignore[no-untyped-def]
    """One line for an error of absl or ml_collections, with the nearest key for a misspelt override."""
    import importlib.util

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
        keys = list(flatten_config(module.get_config()))
    except Exception as error:
        return f"--config={path}: get_config() fails: {type(error).__name__}: {error}"
    for argument in argv:
        key = argument.split("=", 1)[0].removeprefix("--config.")
        if argument.startswith("--config.") and key not in keys and f"no{key}" not in keys:
            near = difflib.get_close_matches(key, keys, 1, 0)
            return f"unknown config key {key!r}; did you mean {near[0]!r}?"
    return first


def _run(flags, config) -> int:  # type: ignore[no-untyped-def]
    from nvit_jax.config import check_config
    from nvit_jax.errors import UserError
    from nvit_jax.workdir import STAGES, STOP

    names = tuple(config.stages)
    if flags.stage is not None:
        if flags.stage not in STAGES:
            near = difflib.get_close_matches(flags.stage, STAGES, 1, 0)
            raise UserError(f"unknown stage {flags.stage!r}; did you mean {near[0]!r}? There are {', '.join(STAGES)}")
        names = (flags.stage,)
    check_config(config)
    import jax

    if flags.distributed:
        jax.distributed.initialize()
    from nvit_jax.distill import Stopped
    from nvit_jax.stages import run_stages

    with STOP.listen():
        try:
            run_stages(config, pathlib.Path(flags.workdir), names, force=flags.force)
        except Stopped as stopped:
            print(f"{stopped}; the same command resumes", file=sys.stderr)
            return 143
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))

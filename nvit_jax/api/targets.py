"""What a small model may cost, and which units may go: the arguments that `prune` and `rank` share."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nvit_jax.api.arguments import only_recipe
from nvit_jax.errors import UserError, check_choice, renamed
from nvit_jax.latency.sources import Milliseconds, check_latency, read_latency
from nvit_jax.model.dims import KINDS, ViTDims, count_macs
from nvit_jax.model.directory import Model
from nvit_jax.pruning.loop import Plan
from nvit_jax.pruning.ranking import Policy, Target, check_reachable, group_sizes, make_targets, smallest_dims
from nvit_jax.pruning.rules import ranker

# That the criterion obs removes where nothing else is said, and all criteria where embed channels are the features.
OBS_KINDS = ("head", "qk", "v", "mlp")
FLOORS = {"embed": 8, "head": 1, "qk": 4, "v": 4, "mlp": 8}
# The arguments' names -> those of ranking.make_targets.
NAMES = {
    "latency": "latency_ratio",
    "max_ms": "latency_ms",
    "macs": "macs_ratio",
    "max_macs": "macs",
    "params": "params_ratio",
    "max_params": "params",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What the small model may cost at most. Ratios in (0, 1] are relative to the model that is pruned."""

    macs: float | None = None
    params: float | None = None
    latency: float | None = None
    max_macs: float | None = None  # an image
    max_params: float | None = None
    max_ms: float | None = None  # for a batch of the latency table

    @property
    def need_latency(self) -> bool:
        return self.latency is not None or self.max_ms is not None

    def targets(self, dims: ViTDims, latency: Milliseconds | None) -> list[Target]:
        """Raises UserError for values that are none, and when there is no limit at all."""
        given = dataclasses.asdict(self)
        if all(value is None for value in given.values()):
            raise UserError(f"nothing is asked for: set at least one of {', '.join(given)}")
        for name, value in given.items():
            if value is not None and not (isinstance(value, int | float) and not isinstance(value, bool)):
                raise UserError(f"={value!r}: it must be a number", name)
        with renamed({ours: name for name, ours in NAMES.items()}):
            return make_targets({NAMES[name]: value for name, value in given.items()}, dims, latency)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """Which units may go, in which groups, by which rule."""

    rule: str | None = None  # None: "solve" for the criterion obs, else "per_cost"
    kinds: Sequence[str] | None = None  # None: all that the criterion has scores for; without a classifier not embed
    protect: Sequence[int] = ()  # blocks whose own units stay
    profile: str = "cpu"  # sizes of the groups: nvit cpu gpu tpu
    floors: Mapping[str, int] | None = None  # units that stay; 0 of head or mlp: whole parts may go
    align: str = "per_head"  # or "shared": one query/key and value index for all heads of a block (NViT)
    eta: float = 5e-4  # of the rules "eta" (per millisecond) and "nvit" (per second)

    def usual(self, criterion: str, dims: ViTDims) -> "Choice":
        """With what is not said as it goes with a criterion and a model."""
        obs = criterion == "obs"
        kinds = (OBS_KINDS if obs or dims.gives_channels else KINDS) if self.kinds is None else self.kinds
        return dataclasses.replace(self, rule=self.rule or ("solve" if obs else "per_cost"), kinds=kinds)

    def policy(self, latency: Milliseconds | None) -> Policy:
        """Raises UserError for names and numbers that are none. `usual` goes first."""
        assert self.rule is not None and self.kinds is not None
        check_choice("profile", self.profile, ("nvit", "cpu", "gpu", "tpu"))
        sizes = group_sizes(self.profile)
        if isinstance(self.kinds, str):
            raise UserError(f'={self.kinds!r}: give a tuple, such as ("{self.kinds}",)', "kinds")
        for block in self.protect:
            if not isinstance(block, int) or block < 0:
                raise UserError(f"={tuple(self.protect)}: must be numbers of blocks, from 0", "protect")
        with renamed({"protected": "protect"}):
            return Policy(
                sizes=sizes,
                # The released engine keeps one group of each.
                floors=sizes if self.rule == "nvit" else FLOORS | dict(self.floors or {}),
                kinds=tuple(self.kinds),
                protected=tuple(self.protect),
                align=self.align,
                rule=self.rule,
                eta=self.eta,
                latency=latency,
            )


def usual_criterion(method: str) -> str:
    """What scores where nothing is said: "obs" before compensation, "fisher" before training."""
    return "obs" if method == "one_shot" else "fisher"


def choice_of(
    function: Callable[..., Any],
    rule: str | Choice | None,
    kinds: Sequence[str] | None,
    protect: Sequence[int],
    profile: str,
    floors: Mapping[str, int] | None,
) -> Choice:
    """The Choice that arguments of `function` make. UserError when `rule` is one and another is given beside it."""
    if isinstance(rule, Choice):
        only_recipe(function, ("kinds", "protect", "profile", "floors"), (kinds, protect, profile, floors))
        return rule
    return Choice(rule=rule, kinds=kinds, protect=protect, profile=profile, floors=floors)


def check_without_latency(limits: Limits, choice: Choice, plan: Plan, dims: ViTDims) -> None:
    """UserError for all that can be told before a latency is measured, which takes minutes."""
    policy = choice.policy(count_macs)
    rest = dataclasses.replace(limits, latency=None, max_ms=None)
    if any(value is not None for value in dataclasses.asdict(rest).values()):
        reachable_targets(rest, policy, dims, None)
    else:
        smallest_dims(dims, policy)
    for name in ("latency", "max_ms"):
        value = getattr(limits, name)
        if value is not None:
            dataclasses.replace(Limits(), **{name: value}).targets(dims, count_macs)
    ranker(dims, policy, [], plan)


def find_latency(given: Any, model: Model, measure: Callable[[], Milliseconds] | None = None) -> Milliseconds | None:
    """The latency model of `latency_table=`: a table, an estimate, a path, or any function of dims.

    `measure` makes one where none is given and one is needed. Raises UserError when a table is of another model.
    """
    if given is None:
        return None if measure is None else measure()
    if isinstance(given, str | pathlib.Path):
        given = read_latency(given)
    if not callable(given):
        raise UserError(f" is a {type(given).__name__}; give a table, its path, or a function of dims", "latency_table")
    check_latency(given, model.dims, getattr(given, "batch", 0), getattr(given, "dtype", ""))
    found: Milliseconds = given
    return found


def reachable_targets(limits: Limits, policy: Policy, dims: ViTDims, latency: Milliseconds | None) -> list[Target]:
    """The targets; UserError that says the smallest reachable value when one lies below the floors."""
    targets = limits.targets(dims, latency)
    with renamed({ours: name for name, ours in NAMES.items()}):
        check_reachable(dims, policy, targets)
    return targets


def check_images(images: int | None) -> None:
    """UserError unless scores can come from so many images."""
    if images is not None and images < 1:
        raise UserError(f"={images}: it must be at least 1", "images")

"""The configuration: every key with its default and meaning. Configs in configs/ change a few of them.

Numbers that may be unset are placeholders: `--config.prune.target.macs_ratio=0.5` sets one, `=None` unsets it.
"""

import difflib
import itertools
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from nvit_jax.errors import UserError
from nvit_jax.formats.export import FORMATS
from nvit_jax.model.dims import KINDS
from nvit_jax.parallel import BACKENDS
from nvit_jax.pruning.loop import METHODS
from nvit_jax.pruning.ranking import ALIGNMENTS, PROFILES, RULES
from nvit_jax.pruning.saliency import CRITERIA, SCHEMES
from nvit_jax.pruning.scoring import LOSSES
from nvit_jax.pruning.sparsity import SPARSITY

STAGES = ("pretrain", "latency", "prune", "finetune", "eval", "export", "report", "preview")  # in order


def default_config() -> ConfigDict:
    """All keys. Every stage is handed only the sections it may read, see stages.SECTIONS."""
    c = ConfigDict()
    c.seed = 0
    c.stages = ("pretrain", "latency", "prune", "finetune", "eval", "report")  # what runs without --stage
    c.model = placeholder(str)  # a model directory to prune instead of the pretrain stage's
    c.parallel = "jit"  # or "pmap", "fsdp", see nvit_jax/parallel.py
    c.dtype = "float32"  # of compute in training and evaluation: "float32" or "bfloat16"; saliency is float32
    c.matmul_precision = placeholder(str)  # training: None is the device's default, else "float32", ...

    c.vit = vit = ConfigDict()  # the model that pretrain makes
    vit.preset = placeholder(str)  # "deit_tiny", ..., or None; the keys below override it
    for name in ("image", "patch", "channels", "classes", "embed", "depth", "heads", "mlp", "qk", "v"):
        vit[name] = placeholder(int)
    for name in ("registers", "pre_logits"):
        vit[name] = placeholder(int)
    for name in ("cls_token", "dist_token", "layer_scale", "norm_after_pool", "qkv_bias"):
        vit[name] = placeholder(bool)
    for name in ("positions", "pool", "mean_over", "activation"):
        vit[name] = placeholder(str)
    vit.norm_eps = placeholder(float)
    vit.init_std = 0.02  # of kernels and tokens (DeiT)
    vit.position_std = 0.02  # of position embeddings

    c.data = ConfigDict()
    c.data.name = "digits"  # or "npz", "folder", "tfds:SET" (tensorflow-datasets)
    c.data.path = placeholder(str)  # npz: the file; folder: ROOT of train/ and val/; tfds: its data_dir
    c.data.train = placeholder(str)  # to train and calibrate: DIR of DIR/class/image; a TFDS split ("train[:98%]")
    c.data.val = placeholder(str)  # for evaluation
    c.data.classes = placeholder(str)  # folder: a file with one class folder's name a line, in the order of the labels
    c.data.holdout = placeholder(float)  # folder: this part of data.train, by hash of the file name, is data.val

    c.data.workers = 0  # processes that read and augment images ahead of the device; 0: threads
    c.data.threads = placeholder(int)  # in each of them; None: its share of the cores
    c.data.max_bad_fraction = 0.01  # of a split's images that may be skipped as unreadable

    # Of training images in pretrain, prune and finetune. DeiT's: crop 0.08, rand_augment "rand-m9-mstd0.5-inc1",
    # erasing 0.25, mixup 0.8, cutmix 1.0, repeats 3, and smoothing 0.1 in the training's section.
    c.augment = ConfigDict()
    c.augment.crop = placeholder(float)  # random crops of this part of the area or more; None: images as evaluated
    c.augment.flip = 0.5
    c.augment.rand_augment = placeholder(str)
    c.augment.color_jitter = 0.0  # where there is no rand_augment (DeiT 0.4)
    c.augment.fast_decode = True  # JPEG by libjpeg-turbo and OpenCV, twice as fast; False: pixels are Pillow's
    c.augment.repeats = 1  # views of an image in a batch
    c.augment.erasing = 0.0
    c.augment.mixup = 0.0
    c.augment.cutmix = 0.0
    c.augment.switch = 0.5  # to cutmix, where both are on
    c.augment.mixup_shards = 1  # partners are found within this many equal parts of the batch; pmap: one a device

    c.pretrain = _training(epochs=100.0, learning_rate=1e-3)
    c.pretrain.start = placeholder(str)  # a model directory whose weights it starts from, instead of random ones of vit

    c.latency = ConfigDict()
    c.latency.table = placeholder(str)  # table.json of another run's latency stage, or the released NViT's, instead
    # Of a device that is not here: an estimate instead of a measurement, when tflops and gbs are set (roofline.py).
    c.latency.roofline = ConfigDict()
    c.latency.roofline.tflops = placeholder(float)  # peak in config.dtype, 10^12 operations a second
    c.latency.roofline.gbs = placeholder(float)  # memory bandwidth, 10^9 bytes a second
    c.latency.roofline.tile = 1  # widths are padded to a multiple of it (TPU: 128)
    c.latency.batch = 256  # images in the timed batch
    c.latency.widths = ConfigDict({"embed": 5, "heads": 4, "qk": 3, "v": 3, "mlp": 5})  # grid points of each axis
    c.latency.models = 7  # whole models of random widths that, with the dense one, the pieces are corrected by
    c.latency.repeats = 15  # timings of everything; the median counts

    c.prune = prune = ConfigDict()
    prune.criterion = "fisher"  # hvp obd fisher taylor hvp_joint magnitude random
    prune.mode = "gradual"  # one_shot gradual iterative
    prune.steps = 8  # prunings of "gradual"
    prune.interval = 100  # optimizer steps between prunings
    prune.groups_per_step = 2  # groups removed per pruning of "iterative"
    prune.ema = 0.0  # momentum of the scores from pruning to pruning (NViT 0.9)
    prune.score = score = ConfigDict()
    # kl (to the unpruned model), labels, mix (the training objective), drawn (labels from the unpruned model).
    score.loss = placeholder(str)  # None: kl for hvp, obd, hvp_joint; drawn for fisher; labels for taylor
    # taylor alone, with plain_first: from the gradients that the training steps since the last pruning take anyway, as
    # NViT; the other keys of this section have no part then
    score.from_training = False
    score.batch = 256
    score.batches = 1  # per pruning, and at most one pass over the train split
    score.scheme = "chunk"  # hvp, obd: probes confined to all, kind, block, part (kind in a block), chunk, unit (exact)
    score.chunk = 16  # units that are probed together by "chunk"
    score.probes = 1  # hvp, obd: probes per example and confinement
    score.remat = True  # recompute blocks in the backward pass: far less memory, about a third slower
    # per_cost: score / saving; solve: the least score for the target (allocation.py); eta: score - eta * ms saved;
    # nvit: the released engine's, eta per second (nvit.py)
    prune.rule = "per_cost"
    prune.eta = 5e-4
    prune.reset_scores = False  # forget the scores' average after the first pruning (NViT)
    prune.align = "per_head"  # or shared: one query/key and value index for all heads of a block (NViT)
    prune.profile = "cpu"  # group sizes: nvit cpu gpu tpu
    prune.kinds = KINDS  # what may be removed
    prune.protected = ()  # blocks whose units stay
    prune.floors = ConfigDict({"embed": 8, "head": 1, "qk": 4, "v": 4, "mlp": 8})
    prune.target = ConfigDict()  # every one that is set must hold
    for name in ("latency_ratio", "latency_ms", "macs_ratio", "macs", "params_ratio", "params"):
        prune.target[name] = placeholder(float)
    prune.batch = 64
    prune.accumulate = 1  # as in pretrain and finetune
    prune.remat = False
    prune.learning_rate = 1e-4
    prune.weight_decay = 0.05
    prune.clip_norm = placeholder(float)
    prune.drop_path = 0.0
    prune.label_weight = 1.0
    prune.kl_weight = 0.0  # NViT: 1e5, a mean over 1,000 classes; see losses.Objective
    prune.tau = 3.0
    prune.eval_images = 2000  # of the val split, evaluated after every pruning
    prune.teacher = placeholder(str)  # directory of another classifier, these three as in finetune
    prune.teacher_alpha = 0.0
    prune.teacher_tau = placeholder(float)
    # NViT: prune.interval steps before the first pruning, too, without KL; no drop path after it
    prune.plain_first = False
    prune.snapshots = ()  # latency ratios on the way down; the models go to W/prune/snapshots/<ratio>/
    prune.log_every = 20
    prune.save_every = 100

    c.finetune = _training(epochs=300.0, learning_rate=2e-4)
    c.finetune.kl_weight = 0.0
    c.finetune.tau = 20.0
    c.finetune.snapshot = placeholder(float)  # finetune this one of prune.snapshots instead of the last model
    # "magnitude" or "gradient": 2 of 4 weights go by this score and stay away, see sparsity.py
    c.finetune.sparsity = placeholder(str)
    c.finetune.from_scratch = False  # the pruned dims from random weights, drawn with:
    c.finetune.init_std = c.vit.get_ref("init_std")
    c.finetune.position_std = c.vit.get_ref("position_std")

    c.eval = ConfigDict()
    c.eval.batch = 256
    c.eval.split = "test"

    c.export = ConfigDict()
    c.export.formats = ("safetensors", "stablehlo")  # and "onnx", which needs the packages of the extra [onnx]
    c.export.dtypes = ("float32",)  # and "float16", "bfloat16": one file for each

    c.compare = ()  # criteria to run to the same targets, after the run itself, under W/compare/<criterion>/
    return c


def _training(*, epochs: float, learning_rate: float) -> ConfigDict:
    c = ConfigDict()
    c.epochs = epochs
    c.batch = 64
    c.accumulate = 1  # parts that a batch goes through the device in, for less memory
    c.remat = False  # compute blocks again in the backward pass: less memory, about a third slower
    c.learning_rate = learning_rate
    c.learning_rate_batch = placeholder(int)  # the rate is for this many images and scales with batch (DeiT: 512)
    c.warmup_epochs = 0.0
    c.final_learning_rate = 0.0
    c.weight_decay = 0.05
    c.clip_norm = placeholder(float)
    c.smoothing = 0.0
    c.drop_path = 0.0
    c.dropout = 0.0
    c.ema = 0.0  # decay of the averaged weights that become the model; 0: the weights themselves
    c.label_weight = 1.0
    c.teacher = placeholder(str)  # directory of a classifier to learn from, too (a RegNetY, or another ViT)
    c.teacher_alpha = 0.0  # its part of the label loss (DeiT, NViT 0.5)
    c.teacher_tau = placeholder(
        float
    )  # None: its answer is a label (hard distillation); else soft, at this temperature
    c.log_every = 20  # steps
    c.eval_every = 100  # steps, on the val split; a multiple of log_every
    c.save_every = 100  # steps
    c.keep = "last"  # or "best": the evaluated model with the highest val top-1 becomes the stage's model
    return c


def flatten_config(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"prune.target.macs_ratio": 0.5, ...} in JSON types."""
    out: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping) or hasattr(value, "items"):
            out |= flatten_config(value, f"{prefix}{name}.")
        else:
            out[f"{prefix}{name}"] = list(value) if isinstance(value, tuple) else value
    return out


def check_config(c: ConfigDict) -> None:
    """UserError for a value that no stage could work with. Called once, before anything runs."""

    def need(good: bool, key: str, value: Any, what: str) -> None:
        if not good:
            raise UserError(f"config.{key}={value!r}: {what}")

    known = flatten_config(default_config()).keys()
    for key in flatten_config(c):
        if key not in known:
            near = difflib.get_close_matches(key, known, 1, 0)[0]
            raise UserError(f"the config file sets {key!r}, which is no key; did you mean {near!r}?")
    if missing := sorted(known - flatten_config(c).keys()):
        raise UserError(f"the config file lacks {missing[0]!r}; start from nvit_jax.run.config.default_config()")
    for stage in c.stages:
        need(stage in STAGES, "stages", tuple(c.stages), f"unknown stage {stage!r}; there are {', '.join(STAGES)}")
    need(0 <= c.seed < 2**32, "seed", c.seed, "must be from 0 to 2**32 - 1")
    good = c.matmul_precision in (None, "default", "high", "highest", "bfloat16", "tensorfloat32", "float32")
    need(good, "matmul_precision", c.matmul_precision, "must be default, bfloat16, tensorfloat32 or float32")
    need(c.dtype in ("float32", "bfloat16"), "dtype", c.dtype, 'must be "float32" or "bfloat16"')
    need(c.parallel in BACKENDS, "parallel", c.parallel, f"must be one of {', '.join(BACKENDS)}")
    need(c.eval.split in ("train", "val", "test"), "eval.split", c.eval.split, "must be train, val or test")
    for section in ("pretrain", "prune", "finetune"):
        for key in ("batch", "log_every", "save_every"):
            need(c[section][key] > 0, f"{section}.{key}", c[section][key], "must be > 0")
    for section in ("pretrain", "finetune"):
        s = c[section]
        need(s.epochs > 0, f"{section}.epochs", s.epochs, "must be > 0")
        need(s.warmup_epochs >= 0, f"{section}.warmup_epochs", s.warmup_epochs, "must be >= 0")
        for key in ("ema", "dropout", "smoothing"):
            need(0 <= s[key] < 1, f"{section}.{key}", s[key], "must be in [0, 1)")
        scale = s.learning_rate_batch
        need(scale is None or scale > 0, f"{section}.learning_rate_batch", scale, "must be > 0")
        need(s.keep in ("last", "best"), f"{section}.keep", s.keep, "must be last or best")
        need(s.keep == "last" or s.eval_every > 0, f"{section}.keep", s.keep, f"needs {section}.eval_every > 0")
        need(s.eval_every % s.log_every == 0, f"{section}.eval_every", s.eval_every, "must be a multiple of log_every")
    for section in ("pretrain", "prune", "finetune"):
        for key in ("learning_rate", "weight_decay"):
            need(c[section][key] >= 0, f"{section}.{key}", c[section][key], "must be >= 0")
        need(0 <= c[section].drop_path < 1, f"{section}.drop_path", c[section].drop_path, "must be in [0, 1)")
        clip, parts, batch = c[section].clip_norm, c[section].accumulate, c[section].batch
        need(clip is None or clip > 0, f"{section}.clip_norm", clip, "must be > 0")
        need(parts >= 1, f"{section}.accumulate", parts, "must be >= 1")
        need(batch % parts == 0, f"{section}.accumulate", parts, f"does not divide batch={batch}")
    for section in ("pretrain", "prune", "finetune"):
        alpha, teacher, tau = c[section].teacher_alpha, c[section].teacher, c[section].teacher_tau
        need(0 <= alpha <= 1, f"{section}.teacher_alpha", alpha, "must be in [0, 1]")
        good = (alpha > 0) == bool(teacher)
        need(good, f"{section}.teacher_alpha", alpha, f"goes with config.{section}.teacher; set both or none")
        need(tau is None or tau > 0, f"{section}.teacher_tau", tau, "must be > 0")
    chosen = c.finetune.sparsity
    good = chosen is None or chosen in SPARSITY
    need(good, "finetune.sparsity", chosen, f"must be one of None, {', '.join(SPARSITY)}")
    good = chosen is None or not c.finetune.from_scratch
    need(good, "finetune.sparsity", chosen, "chooses among trained weights; it does not go with finetune.from_scratch")
    p, snapshots = c.prune, tuple(c.prune.snapshots)
    ratios = (1.0, *snapshots, p.target.latency_ratio or 0.0)
    good = all(isinstance(r, int | float) for r in ratios) and all(a > b for a, b in itertools.pairwise(ratios))
    need(good, "prune.snapshots", snapshots, "must decrease from below 1 to above target.latency_ratio")
    good = not snapshots or p.mode == "iterative"
    need(good, "prune.snapshots", snapshots, "need prune.mode=iterative, whose models lie close together")
    good = all(isinstance(block, int) and block >= 0 for block in p.protected)
    need(good, "prune.protected", tuple(p.protected), "must be numbers of blocks, from 0")
    need(0 <= p.ema < 1, "prune.ema", p.ema, "must be in [0, 1)")
    for key, least in (("interval", 0), ("steps", 1), ("groups_per_step", 1)):
        need(p[key] >= least, f"prune.{key}", p[key], f"must be >= {least}")
    for kind, floor in p.floors.items():
        need(floor >= 1, f"prune.floors.{kind}", floor, "must be >= 1")
    for key, value, choices in (
        ("criterion", p.criterion, CRITERIA),
        ("mode", p.mode, METHODS),
        ("rule", p.rule, RULES),
        ("align", p.align, ALIGNMENTS),
        ("profile", p.profile, PROFILES),
        ("score.loss", p.score.loss, (None, *(name for name in LOSSES if name != "own"))),
        ("score.scheme", p.score.scheme, SCHEMES),
    ):
        need(value in choices, f"prune.{key}", value, f"must be one of {', '.join(str(x) for x in choices)}")
    collects = p.score.from_training
    good = not collects or (p.criterion == "taylor" and p.plain_first and p.interval > 0 and p.mode != "one_shot")
    words = "needs prune.criterion=taylor, plain_first, an interval and a mode that trains: their steps are scored"
    need(good, "prune.score.from_training", collects, words)
    good = not collects or p.score.loss is None
    need(good, "prune.score.loss", p.score.loss, "does not go with score.from_training: the training loss it is")
    need(p.eta >= 0, "prune.eta", p.eta, "must be >= 0")
    good = p.rule != "nvit" or (p.align == "shared" and p.mode == "iterative")
    need(
        good,
        "prune.rule",
        p.rule,
        'needs prune.align="shared" and prune.mode="iterative", as the released engine works',
    )
    good = p.rule != "nvit" or (tuple(p.kinds) == KINDS and not p.protected)
    need(good, "prune.rule", p.rule, "removes every kind from every block; leave prune.kinds and protected as they are")
    good = p.rule != "solve" or p.mode != "iterative"
    need(good, "prune.rule", p.rule, "solves for a target; prune.mode=iterative goes a few groups at a time")
    for criterion in c.compare:
        need(criterion in CRITERIA, "compare", tuple(c.compare), f"{criterion!r} is not one of {', '.join(CRITERIA)}")
    for name, value in p.target.items():
        good = value is None or (0 < value <= 1 if name.endswith("_ratio") else value > 0)
        need(good, f"prune.target.{name}", value, "must be in (0, 1]" if name.endswith("_ratio") else "must be > 0")
    for key in ("batch", "batches", "chunk", "probes"):
        need(c.prune.score[key] > 0, f"prune.score.{key}", c.prune.score[key], "must be > 0")
    for key in ("batch", "repeats"):
        need(c.latency[key] > 0, f"latency.{key}", c.latency[key], "must be > 0")
    need(c.latency.models >= 0, "latency.models", c.latency.models, "must be >= 0")
    roofline = c.latency.roofline
    given = [value for value in (roofline.tflops, roofline.gbs) if value is not None]
    good = len(given) in (0, 2) and all(value > 0 for value in given) and roofline.tile >= 1
    need(good, "latency.roofline", roofline.to_dict(), "set tflops and gbs, both > 0, or none; tile >= 1")
    need(not (given and c.latency.table), "latency.table", c.latency.table, "it excludes latency.roofline")
    for axis, count in c.latency.widths.items():
        need(count >= 2, f"latency.widths.{axis}", count, "must be at least 2: the smallest width and the full one")
    holdout = c.data.holdout
    need(holdout is None or 0 < holdout < 1, "data.holdout", holdout, "must be between 0 and 1")
    need(c.data.workers >= 0, "data.workers", c.data.workers, "must be >= 0")
    need(c.data.threads is None or c.data.threads > 0, "data.threads", c.data.threads, "must be > 0")
    bad = c.data.max_bad_fraction
    need(0 <= bad < 1, "data.max_bad_fraction", bad, "must be in [0, 1)")
    a = c.augment
    need(a.crop is None or 0 < a.crop <= 1, "augment.crop", a.crop, "must be in (0, 1]")
    for key in ("flip", "erasing", "switch"):
        need(0 <= a[key] <= 1, f"augment.{key}", a[key], "must be in [0, 1]")
    for key in ("mixup", "cutmix", "color_jitter"):
        need(a[key] >= 0, f"augment.{key}", a[key], "must be >= 0")
    for key in ("repeats", "mixup_shards"):
        need(a[key] >= 1, f"augment.{key}", a[key], "must be >= 1")
    for section in ("pretrain", "prune", "finetune"):
        batch = c[section].batch
        good = batch % a.mixup_shards == 0
        need(good, "augment.mixup_shards", a.mixup_shards, f"does not divide {section}.batch={batch}")
    per_image = [key for key in ("rand_augment", "color_jitter") if a[key]]
    need(a.crop is not None or not per_image, "augment.crop", a.crop, f"augment.{' and '.join(per_image)} need it")
    need(c.prune.eval_images > 0, "prune.eval_images", c.prune.eval_images, "must be > 0")
    for name in c.export.formats:
        need(name in FORMATS, "export.formats", tuple(c.export.formats), f"{name!r} is not one of {', '.join(FORMATS)}")
    for name in c.export.dtypes:
        good = name in ("float32", "float16", "bfloat16")
        need(good, "export.dtypes", tuple(c.export.dtypes), f"{name!r} is not float32, float16 or bfloat16")
        good = name != "bfloat16" or "onnx" not in c.export.formats
        need(good, "export.dtypes", tuple(c.export.dtypes), "ONNX runtimes lack bfloat16; use float16")
    need(c.eval.batch > 0, "eval.batch", c.eval.batch, "must be > 0")
    need(
        c.prune.tau > 0 and c.finetune.tau > 0, "prune.tau, finetune.tau", (c.prune.tau, c.finetune.tau), "must be > 0"
    )

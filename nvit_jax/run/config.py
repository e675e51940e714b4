"""The configuration: every key with its default and meaning. Configs in configs/ change a few of them.

Numbers that may be unset are placeholders: `--config.prune.target.macs_ratio=0.5` sets one, `=None` unsets it.
"""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

STAGES = ("pretrain", "latency", "prune", "finetune", "eval", "export", "report", "preview")  # in order


def default_config() -> ConfigDict:
    """All keys. Every stage is handed only the sections it may read, see stages.SECTIONS."""
    c = ConfigDict()
    c.seed = 0  # of weights, batches, augmentation and probes
    c.stages = ("pretrain", "latency", "prune", "finetune", "eval", "report")  # what runs without --stage
    c.model = placeholder(str)  # a model directory to prune instead of the pretrain stage's
    c.parallel = "jit"  # or "pmap", "fsdp", see nvit_jax/parallel.py
    c.dtype = "float32"  # of compute in training and evaluation: "float32" or "bfloat16"; saliency is float32
    c.matmul_precision = placeholder(str)  # training: None is the device's default, else "float32", ...
    c.profile = 0  # pretrain, prune, finetune: trace so many training steps, into W/<stage>/profile/

    c.vit = vit = ConfigDict()  # the model that pretrain makes
    vit.preset = placeholder(str)  # "deit_tiny", ..., or None; the keys below override it
    vit.image = placeholder(object)  # side of the images, in pixels; of rectangles (height, width)
    vit.patch = placeholder(object)  # side of a patch, in pixels; the same
    vit.channels = placeholder(int)  # of the images: 3 for colour (the default), 1 for grey
    vit.classes = placeholder(int)  # outputs of the classifier
    vit.embed = placeholder(int)  # channels of the residual stream
    vit.depth = placeholder(int)  # blocks
    vit.heads = placeholder(int)  # attention heads of every block
    vit.mlp = placeholder(int)  # hidden neurons of every block's mlp
    vit.qk = placeholder(int)  # query/key dims of a head; None: embed / heads
    vit.v = placeholder(int)  # value dims of a head; None: embed / heads
    vit.registers = placeholder(int)  # register tokens behind the class tokens
    vit.pre_logits = placeholder(int)  # width of a tanh layer before the classifier; 0 for none
    vit.cls_token = placeholder(bool)  # with a class token
    vit.dist_token = placeholder(bool)  # with a distillation token, which a second classifier reads
    vit.layer_scale = placeholder(bool)  # with LayerScale
    vit.norm_after_pool = placeholder(bool)  # the final norm stands behind the pooling instead of before it
    vit.qkv_bias = placeholder(bool)  # with biases of queries, keys and values
    vit.positions = placeholder(str)  # position embeddings of "all" tokens, of "patches" only, or "none"
    vit.patch_bias = placeholder(bool)  # with a bias of the patch embedding
    vit.pre_norm = placeholder(bool)  # with a norm in front of the first block, as CLIP has it
    vit.pool = placeholder(str)  # the classifier reads "class" token, "mean", "class_mean", "max", "avgmax" or "map"
    vit.pool_heads = placeholder(int)  # map, attention pooling: its heads; None: those of a block
    vit.pool_mlp = placeholder(int)  # map: hidden neurons of its mlp; None: those of a block
    vit.mean_over = placeholder(str)  # tokens that are pooled: "patches" or "all"
    vit.activation = placeholder(str)  # of the mlp: "gelu" (exact), "gelu_tanh", "quick_gelu", "relu", "silu"
    vit.gated = placeholder(bool)  # the mlp's neurons are multiplied by gates; with "silu" that is SwiGLU
    vit.norm = placeholder(str)  # "layer" (LayerNorm, the default) or "rms" (RMSNorm without parameters)
    vit.norm_eps = placeholder(float)  # of every norm
    vit.qk_norm_count = placeholder(int)  # RMSNorm over a head's queries and keys; their dims; None or 0: none
    vit.rotary = placeholder(int)  # rotary positions: pairs of query/key dims of a head, even; None or 0: none
    vit.rotary_base = placeholder(float)  # of their frequencies; None: 100, as in DINOv3
    vit.rotary_grid = placeholder(int)  # patches are numbered as in a grid of this side, as in EVA-02; None or 0: not
    vit.relative = placeholder(bool)  # with a bias of the logits by how two patches lie, as in BEiT
    vit.proj_norm_count = placeholder(int)  # norm in front of attention's last layer; value dims of all heads; 0: none
    vit.fc2_norm_count = placeholder(int)  # norm in front of the mlp's last layer; its neurons; None or 0: none
    vit.init_std = 0.02  # of kernels and tokens (DeiT)
    vit.position_std = 0.02  # of position embeddings

    c.data = ConfigDict()
    c.data.name = "digits"  # or "npz", "folder", "tfds:SET" (tensorflow-datasets)
    c.data.path = placeholder(str)  # npz: the file; folder: ROOT of train/ and val/; tfds: its data_dir
    c.data.train = placeholder(str)  # to train and calibrate: DIR of DIR/class/image; a TFDS split ("train[:98%]")
    c.data.val = placeholder(str)  # for evaluation
    c.data.classes = placeholder(str)  # folder: a file with one class folder's name a line, in the order of the labels
    c.data.holdout = placeholder(float)  # folder, tfds: this part of data.train is data.val

    c.data.workers = 0  # processes that read and augment images ahead of the device; 0: threads
    c.data.threads = placeholder(int)  # in each of them; None: its share of the cores
    c.data.max_bad_fraction = 0.01  # of a split's images that may be skipped as unreadable

    # Of training images in pretrain, prune and finetune. DeiT's: crop 0.08, rand_augment "rand-m9-mstd0.5-inc1",
    # erasing 0.25, mixup 0.8, cutmix 1.0, repeats 3, and smoothing 0.1 in the training's section.
    c.augment = ConfigDict()
    c.augment.crop = placeholder(float)  # random crops of this part of the area or more; None: images as evaluated
    c.augment.flip = 0.5  # probability that a cropped image is mirrored
    c.augment.rand_augment = placeholder(str)  # random operations by timm's name, such as "rand-m9-mstd0.5-inc1"
    c.augment.color_jitter = 0.0  # where there is no rand_augment (DeiT 0.4)
    c.augment.fast_decode = True  # JPEG by libjpeg-turbo and OpenCV, twice as fast; False: pixels are Pillow's
    c.augment.repeats = 1  # views of an image in a batch
    c.augment.erasing = 0.0  # probability that a rectangle becomes noise
    c.augment.mixup = 0.0  # alpha of the Beta distribution that images are mixed by; 0: off
    c.augment.cutmix = 0.0  # the same for pasted rectangles; 0: off
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
    # obs fisher_set fisher hvp obd taylor hvp_joint magnitude random; None: the mode's usual
    prune.criterion = placeholder(str)
    prune.mode = "gradual"  # one_shot gradual iterative
    prune.steps = 8  # prunings of "gradual"
    prune.interval = 100  # optimizer steps between prunings
    prune.groups_per_step = 2  # groups removed per pruning of "iterative"
    prune.ema = 0.0  # momentum of the scores from pruning to pruning (NViT 0.9)
    prune.score = score = ConfigDict()
    # kl (to the unpruned model), labels, mix (the training objective), drawn (labels from the unpruned model), features
    # (their distance from the unpruned model's; models without a classifier have no other).
    score.loss = placeholder(str)  # None: kl for hvp, obd, hvp_joint; drawn for fisher, fisher_set; labels for taylor
    # taylor alone, with plain_first: from the gradients that the training steps since the last pruning take anyway, as
    # NViT; the other keys of this section have no part then
    score.from_training = False
    score.batch = 256  # images that are scored together
    score.batches = 1  # per pruning, and at most one pass over the train split
    score.scheme = "chunk"  # hvp, obd: probes confined to all, kind, block, part (kind in a block), chunk, unit (exact)
    score.chunk = 16  # units that are probed together by "chunk"
    score.probes = 1  # hvp, obd: probes per example and confinement
    score.remat = placeholder(bool)  # recompute blocks in the backward pass; None: where memory asks for it
    # per_cost: score / saving; solve: the least score for the target (pruning/allocation.py); eta: score - eta * ms
    # saved; nvit: the released engine's, eta per second (pruning/released.py)
    prune.rule = placeholder(str)
    prune.eta = 5e-4  # price of a saving: per millisecond for rule "eta", per second for "nvit"
    prune.reset_scores = False  # forget the scores' average after the first pruning (NViT)
    prune.align = "per_head"  # or shared: one query/key and value index for all heads of a block (NViT)
    prune.profile = "cpu"  # group sizes: nvit cpu gpu tpu
    prune.kinds = placeholder(tuple)  # what may be removed; None: all that the criterion has scores for
    prune.compensate = placeholder(bool)  # fit the weights that stay anew; None: with one_shot
    prune.protected = ()  # blocks whose units stay
    # Widths that stay in every block (embed: of the model). With 0 for head or mlp a block may lose that part whole.
    prune.floors = ConfigDict({"embed": 8, "head": 1, "qk": 4, "v": 4, "mlp": 8})
    prune.target = ConfigDict()  # every one that is set must hold
    for name in ("latency_ratio", "latency_ms", "macs_ratio", "macs", "params_ratio", "params"):
        prune.target[name] = placeholder(float)
    prune.batch = 64  # images of a training step between prunings
    prune.accumulate = placeholder(int)  # as in pretrain and finetune
    prune.remat = False  # as in pretrain
    prune.learning_rate = 1e-4  # constant between prunings
    prune.weight_decay = 0.05  # as in pretrain
    prune.clip_norm = placeholder(float)  # as in pretrain
    prune.drop_path = 0.0  # as in pretrain
    prune.label_weight = 1.0  # as in pretrain
    prune.kl_weight = 0.0  # NViT: 1e5, a mean over 1,000 classes; see losses.Objective
    prune.tau = 3.0  # temperature of the unpruned model's answers
    prune.eval_images = 2000  # of the val split, evaluated after every pruning
    prune.teacher = placeholder(str)  # directory of another classifier, these three as in finetune
    prune.teacher_alpha = 0.0  # as in finetune
    prune.teacher_tau = placeholder(float)  # as in finetune
    # NViT: prune.interval steps before the first pruning, too, without KL; no drop path after it
    prune.plain_first = False
    # Models of other sizes, in W/prune/snapshots/<ratio>/. iterative: latency ratios on the way down. one_shot: ratios
    # of what the one target limits, from the same calibration.
    prune.snapshots = ()
    prune.log_every = 20  # steps, as in pretrain
    prune.save_every = 100  # steps, as in pretrain

    c.finetune = _training(epochs=300.0, learning_rate=2e-4)
    c.finetune.kl_weight = 0.0  # of the KL divergence from the unpruned model's answers (NViT: 1e5)
    c.finetune.tau = 20.0  # temperature of those answers
    c.finetune.snapshot = placeholder(float)  # finetune this one of prune.snapshots instead of the last model
    # "magnitude" or "gradient": 2 of 4 weights go by this score and stay away, see sparsity.py
    c.finetune.sparsity = placeholder(str)
    c.finetune.from_scratch = False  # train the pruned dims from random weights
    c.finetune.init_std = c.vit.get_ref("init_std")  # of from_scratch
    c.finetune.position_std = c.vit.get_ref("position_std")  # of from_scratch

    c.eval = ConfigDict()
    c.eval.batch = 256  # images that are evaluated together
    c.eval.split = "test"  # that is evaluated: "train", "val" or "test"
    c.eval.neighbours = 20  # nearest ones that vote for the class of an image, where a model has no classifier
    c.eval.database = 10000  # images of the train split at most that neighbours are; to evaluate that split: its own

    c.export = ConfigDict()
    # and "onnx", which needs the packages of the extra [onnx], and "transformers", for models whose blocks are alike
    c.export.formats = ("safetensors", "stablehlo")
    c.export.dtypes = ("float32",)  # and "float16", "bfloat16": one file for each
    c.export.opset = 20  # of the ONNX file, 17 to 25; TensorRT 11 and onnxruntime read them all
    c.export.weights = "constants"  # inside of a StableHLO program, or "arguments" that it is called with

    c.compare = ()  # criteria to run to the same targets, after the run itself, under W/compare/<criterion>/
    return c


def _training(*, epochs: float, learning_rate: float) -> ConfigDict:
    c = ConfigDict()
    c.epochs = epochs  # passes over the training split
    c.batch = 64  # images of a step, over all devices
    c.accumulate = placeholder(int)  # parts that a batch goes through the device in; None: one, on a CPU small ones
    c.remat = False  # compute blocks again in the backward pass: less memory, about a third slower
    c.learning_rate = learning_rate  # the highest, after the warm-up
    c.learning_rate_batch = placeholder(int)  # the rate is for this many images and scales with batch (DeiT: 512)
    c.warmup_epochs = 0.0  # in which the learning rate rises from 0
    c.final_learning_rate = 0.0  # at the end of the cosine
    c.weight_decay = 0.05  # of kernels alone
    c.clip_norm = placeholder(float)  # bound of the gradient's norm; None: none
    c.smoothing = 0.0  # part of the label that is spread over all classes
    c.drop_path = 0.0  # probability that the last block is left out; it rises linearly from 0 at the first
    c.dropout = 0.0  # probability that an activation is set to 0
    c.ema = 0.0  # decay of the averaged weights that become the model; 0: the weights themselves
    c.label_weight = 1.0  # of the cross-entropy with the labels
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

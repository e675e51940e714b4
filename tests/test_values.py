"""Values that make no model, scores that say nothing: one line that names the first, and nothing silently wrong."""

import json
import os
import shutil

import jax
import numpy as np
import pytest
from conftest import PREPROCESSING, random_images, random_params, small_dims

import nvit_jax as nvit
from nvit_jax import files
from nvit_jax.errors import NotFinite, UserError
from nvit_jax.formats.weights import open_checkpoint
from nvit_jax.model import vit
from nvit_jax.model.dims import Units, ViTDims, count_macs
from nvit_jax.model.directory import Model, load_classifier, load_model, save_regnet
from nvit_jax.model.masks import full_masks
from nvit_jax.model.preprocessing import FILTERS, Preprocessing
from nvit_jax.model.regnet import RegNet, RegNetDims, regnet_shapes
from nvit_jax.model.reshape import reshape
from nvit_jax.pruning import allocation, ranking, released
from nvit_jax.pruning.loop import Plan
from nvit_jax.pruning.ranking import Policy, make_targets
from nvit_jax.run.config import default_config
from nvit_jax.run.configfile import load_config
from nvit_jax.run.validation import check_config

NAN, INF = float("nan"), float("inf")
DIMS = small_dims()
POLICY = Policy(sizes=ranking.group_sizes("cpu"), floors=dict.fromkeys(("embed", "head", "qk", "v", "mlp"), 1))


# ---------------------------------------------------------------------------------------------- model.json


DIMS_ROWS = [
    ({"norm_eps": NAN}, "dims: norm_eps=nan must be a number from 1e-20 to 1"),
    ({"norm_eps": -1e-6}, "dims: norm_eps=-1e-06 must be a number from 1e-20 to 1"),
    ({"norm_eps": 0}, "dims: norm_eps=0 must be a number from 1e-20 to 1"),
    ({"norm_eps": "1e-6"}, "dims: norm_eps='1e-6' must be a number"),
    ({"norm_eps": True}, "dims: norm_eps=True must be a number"),
    ({"qk_scale": NAN}, "dims: qk_scale=nan must be a number from 1e-06 to 1000"),
    ({"qk_scale": INF}, "dims: qk_scale=inf must be a number from 1e-06 to 1000"),
    ({"qk_scale": -0.5}, "dims: qk_scale=-0.5 must be a number from 1e-06 to 1000"),
    (
        {"qk_scale": 10**400},
        "dims: qk_scale=1000000000000000000000000000000000000... must be a number from 1e-06 to 1000",
    ),
    ({"qk_scale": None}, "dims: qk_scale=None must be a number"),
    ({"embed": True}, "dims: embed=True must be a whole number"),
    ({"embed": 8.0}, "dims: embed=8.0 must be a whole number"),
    ({"embed": "8"}, "dims: embed='8' must be a whole number"),
    ({"embed": None}, "dims: embed=None must be a whole number"),
    ({"embed": 0}, "dims: embed=0 is too small; it must be at least 1"),
    ({"embed": 10**9}, "dims: embed=1000000000 is too large; it must be at most 131,072"),
    ({"image": -8}, "dims: image=-8 is too small; it must be at least 1"),
    ({"image": 2**20}, "dims: image=1048576 is too large; it must be at most 16,384"),
    ({"image": 16384, "patch": 1}, "dims: 268,435,457 tokens are too many; at most 1,048,576 are possible"),
    ({"classes": -1}, "dims: classes=-1 is too small; it must be at least 0"),
    ({"classes": 2**31}, "dims: classes=2147483648 is too large; it must be at most 16,777,216"),
    ({"classes": 2**24, "embed": 2**16}, "dims: more than 68,719,476,736 parameters are too many"),
    ({"registers": 2**20}, "dims: registers=1048576 is too large; it must be at most 4,096"),
    ({"channels": 10**5}, "dims: channels=100000 is too large; it must be at most 1,024"),
    ({"heads": [2, True]}, "dims: heads[1]=True must be a whole number"),
    ({"heads": 2}, "dims: heads must hold one width for each block, of at most 1,000"),
    ({"heads": [2] * 1001}, "dims: heads must hold one width for each block, of at most 1,000"),
    ({"qk": [4, -4]}, "dims: qk[1]=-4 is too small; it must be at least 0"),
    ({"v": [4, 2.5]}, "dims: v[1]=2.5 must be a whole number"),
    ({"mlp": [12, 2**30]}, "dims: mlp[1]=1073741824 is too large; it must be at most 1,048,576"),
    ({"mlp": {"0": 12}}, "dims: mlp must hold one width for each block, of at most 1,000"),
    ({"cls_token": 1}, "dims: cls_token=1 must be true or false"),
    ({"layer_scale": "yes"}, "dims: layer_scale='yes' must be true or false"),
    ({"activation": ["gelu"]}, "dims: activation=('gelu',) is not one of gelu, gelu_tanh, quick_gelu, relu, silu"),
]


@pytest.mark.parametrize(("changes", "line"), DIMS_ROWS)
def test_dims_that_make_no_model(changes, line):
    with pytest.raises(UserError) as caught:
        ViTDims.from_json(DIMS.to_json() | changes)
    assert str(caught.value) == line


def test_numbers_of_numpy_become_pythons():
    found = ViTDims.from_json(
        DIMS.to_json() | {"embed": np.int64(8), "mlp": [np.int32(12)] * 2, "norm_eps": np.float32(1e-6)}
    )
    assert json.loads(json.dumps(found.to_json())) == found.to_json() and type(found.embed) is type(found.mlp[0]) is int


PREPROCESSING_ROWS = [
    ({"std": [0.5, 0.0, 0.5]}, "preprocessing: std[1]=0.0 must be a number from 1e-06 to 1e+06"),
    ({"std": [0.5, 0.5, NAN]}, "preprocessing: std[2]=nan must be a number from 1e-06 to 1e+06"),
    ({"std": [-0.5, 0.5, 0.5]}, "preprocessing: std[0]=-0.5 must be a number from 1e-06 to 1e+06"),
    ({"std": [0.5]}, "preprocessing: std=(0.5,) must hold one number for each channel"),
    ({"mean": []}, "preprocessing: mean=() must hold one number for each channel"),
    ({"mean": [INF, 0, 0]}, "preprocessing: mean[0]=inf must be a number from -1e+06 to 1e+06"),
    ({"mean": [1e300, 0, 0]}, "preprocessing: mean[0]=1e+300 must be a number from -1e+06 to 1e+06"),
    ({"mean": ["0.5", 0, 0]}, "preprocessing: mean[0]='0.5' must be a number"),
    ({"scale": 0}, "preprocessing: scale=0 must be a number from 1e-06 to 1e+09"),
    ({"scale": NAN}, "preprocessing: scale=nan must be a number from 1e-06 to 1e+09"),
    ({"scale": 1e-45}, "preprocessing: scale=1e-45 must be a number from 1e-06 to 1e+09"),
    ({"size": True}, "preprocessing: size=True must be a whole number"),
    ({"size": 0}, "preprocessing: size=0 is too small; it must be at least 1"),
    ({"size": 10**6}, "preprocessing: size=1000000 is too large; it must be at most 16,384"),
    ({"resize": 0}, "preprocessing: resize=0 is too small; it must be at least 1"),
    ({"resize": 20.5}, "preprocessing: resize=20.5 must be a whole number"),
    (
        {"interpolation": "cubic"},
        f"preprocessing: interpolation='cubic' is not one of {', '.join(FILTERS)}; did you mean 'bicubic'?",
    ),
    ({"crop_mode": "magic"}, "preprocessing: crop_mode='magic' is not one of center, squash, none"),
    ({"crop": 3}, "preprocessing: unknown field crop; did you mean 'crop_mode'?"),
]


@pytest.mark.parametrize(("changes", "line"), PREPROCESSING_ROWS)
def test_preprocessing_that_makes_no_images(changes, line):
    with pytest.raises(UserError) as caught:
        Preprocessing.from_json(PREPROCESSING | changes)
    assert str(caught.value) == line


REGNET_ROWS = [
    ({"squeeze": NAN}, "dims of a RegNet: squeeze=nan must be a number from 0.001 to 16"),
    ({"stem": 0}, "dims of a RegNet: stem=0 is too small; it must be at least 1"),
    ({"classes": True}, "dims of a RegNet: classes=True must be a whole number"),
    ({"widths": [16]}, "dims of a RegNet: depths=(1, 1) must hold one number for each of 1 to 16 stages"),
    ({"depths": [1, 10**6]}, "dims of a RegNet: depths[1]=1000000 is too large; it must be at most 256"),
    ({"widths": [16, 17]}, "dims of a RegNet: width 17 is not divisible by group=8"),
    ({"widths": 16}, "dims of a RegNet: widths=16 must hold one number for each of 1 to 16 stages"),
]
SMALL = RegNetDims(widths=(16, 24), depths=(1, 1), group=8, stem=8, classes=5)


@pytest.mark.parametrize(("changes", "line"), REGNET_ROWS)
def test_dims_that_make_no_regnet(changes, line):
    with pytest.raises(UserError) as caught:
        RegNetDims.from_json(SMALL.to_json() | changes)
    assert str(caught.value) == line


# ---------------------------------------------------------------------------------------- model directories


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The directory of a small model that knows its preprocessing."""
    place = tmp_path_factory.mktemp("values") / "model"
    info = {"preprocessing": PREPROCESSING | {"size": 8, "mean": [0.5], "std": [0.5]}}
    Model(DIMS, vit.init(DIMS, jax.random.key(0), std=0.3), info=info).save(place)
    return place


def changed(saved, place, **values):
    """A copy whose model.json says something else; None leaves a key out."""
    shutil.copytree(saved, place)
    facts = files.read_json(place / "model.json") | values
    (place / "model.json").write_text(json.dumps({k: v for k, v in facts.items() if v is not None}))
    return place


def test_the_line_of_a_file_names_it(saved, tmp_path):
    for number, (values, line) in enumerate(
        [
            (
                {"dims": DIMS.to_json() | {"qk_scale": NAN}},
                " is not a model of format 1: dims.qk_scale must be a finite number",
            ),
            (
                {"preprocessing": PREPROCESSING | {"std": [0, 1, 1]}},
                ": preprocessing: std[0]=0 must be a number from 1e-06 to 1e+06",
            ),
            (
                {"preprocessing": PREPROCESSING},
                ": preprocessing: it makes 16 pixels of 3 channels, the model takes 8 of 1",
            ),
        ]
    ):
        place = changed(saved, tmp_path / f"{number}", **values)
        with pytest.raises(UserError) as caught:
            load_model(place)
        assert str(caught.value) == f"{place / 'model.json'}{line}"


def test_what_lies_among_parameters_and_masks_is_never_waited_for(saved, tmp_path):
    """Pipes, devices, and arrays of masks that are none."""
    place = changed(saved, tmp_path / "odd")
    file = place / "params" / "_METADATA"
    content = file.read_bytes()
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(UserError, match="params is damaged: _METADATA in it is a named pipe, not a file$"):
        load_model(place)
    file.unlink()
    file.write_bytes(content)
    masked = changed(place, tmp_path / "masked", masked=True)
    full = full_masks(DIMS)._asdict()
    for arrays, words in (
        (full | {"more": np.ones(1)}, "it holds embed, head, qk, v, mlp, more; masks are embed, head, qk, v, mlp"),
        (full | {"mlp": full["mlp"].astype(complex)}, "mlp holds values other than 0 and 1"),
    ):
        np.savez(masked / "masks.npz", **arrays)
        with pytest.raises(UserError, match=f"masks.npz is missing or damaged: .*{words}$"):
            load_model(masked)


def test_damaged_parameters_are_found_by_their_checksum(saved, tmp_path):
    """Orbax has no checksum of its own: finite bytes that changed are read as they are."""
    place = changed(saved, tmp_path / "flipped")
    model = load_model(place)
    params = jax.tree.map(np.array, model.params)
    params["block_0"]["fc1"]["kernel"].view(np.uint8)[0, 0] ^= 1
    shutil.rmtree(place / "params")
    files.save_arrays(place / "params", params)
    line = f"{place / 'params'} is damaged: the checksum in model.json is another; make or copy it anew"
    with pytest.raises(UserError) as caught:
        load_model(place)
    assert str(caught.value) == line
    old = changed(place, tmp_path / "old", checksum=None)  # a directory from before there were checksums
    assert (load_model(old).params["block_0"]["fc1"]["kernel"] == params["block_0"]["fc1"]["kernel"]).all()
    assert "checksum" not in load_model(saved).info
    load_model(old).save(tmp_path / "again")
    assert files.read_json(tmp_path / "again" / "model.json")["checksum"] == files.checksum(params)


def test_flipped_bits_of_a_pth_are_found(tmp_path):
    """torch.load does not look at the checksums that torch.save has written."""
    torch = pytest.importorskip("torch")
    path = tmp_path / "x.pth"
    torch.save({"head.weight": torch.ones(64, 64)}, path)
    with open_checkpoint(path) as tensors:
        assert (tensors.read("head.weight") == 1).all()
    content = bytearray(path.read_bytes())
    at = content.index(np.ones(8, np.float32).tobytes())
    content[at + 100] ^= 4
    path.write_bytes(content)
    with pytest.raises(UserError) as caught, open_checkpoint(path):
        pass
    assert str(caught.value) == f"{path} is damaged: the checksum of x/data/0 in it is another; fetch the file again"


def test_a_regnet_has_a_checksum_too(tmp_path):
    params = jax.tree.map(lambda s: np.ones(s.shape, np.float32), regnet_shapes(SMALL))
    save_regnet(tmp_path / "R", RegNet(SMALL, params))
    facts = files.read_json(tmp_path / "R" / "model.json")
    (tmp_path / "R" / "model.json").write_text(json.dumps(facts | {"checksum": facts["checksum"] ^ 1}))
    with pytest.raises(UserError, match="is damaged: the checksum"):
        load_classifier(tmp_path / "R")


# ---------------------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("parallel", ["jit", "pmap"])
def test_evaluation_stops_at_logits_that_are_not_finite(saved, parallel):
    model = load_model(saved)
    images = random_images(DIMS, 23, dtype=np.float32)
    labels = np.zeros(23, np.int32)
    images[[14, 20]] = 3e38  # which overflows on its way; NaN is refused before
    with pytest.raises(UserError) as caught:
        nvit.evaluate(model, (images, labels), batch=8, parallel=parallel, progress=False)
    assert str(caught.value) == (
        "the logits of 1 of 8 images are not finite, image 14 (from 0) is the first; the weights or the preprocessing "
        "of this model are no good"
    )
    images[:] = 0
    assert nvit.evaluate(model, (images, labels), batch=8, parallel=parallel, progress=False)["images"] == 23


# -------------------------------------------------------------------------------------- weights and scores


def with_nan(model, path=("block_1", "fc2", "kernel")):
    params = jax.tree.map(np.array, model.params)
    params[path[0]][path[1]][path[2]][0, 0] = np.nan
    return Model(model.dims, params, info=model.info)


def test_weights_that_are_not_finite_are_named(saved):
    bad, images = with_nan(load_model(saved)), random_images(DIMS, 8, dtype=np.float32)
    scores = full_masks(DIMS)
    calls = {
        "saliency": lambda: nvit.saliency(bad, (images,), progress=False),
        "prune": lambda: nvit.prune(bad, (images,), macs=0.9, measure=None, progress=False),
        "rank": lambda: nvit.rank(scores, bad, macs=0.5),
        "finetune": lambda: nvit.finetune(bad, (images, np.zeros(8, np.int32)), progress=False),
    }
    for name, call in calls.items():
        with pytest.raises(UserError) as caught:
            call()
        line = "model: block_1/fc2/kernel holds values that are not finite (1 of 96)"
        assert str(caught.value) == line, name
    with pytest.raises(UserError, match="save_model: block_1/fc2/kernel holds values that are not finite"):
        bad.save("never")


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_scores_that_are_not_finite_are_named(saved, value):
    """Neither removed first nor ranked for ever."""
    masks = full_masks(DIMS)
    scores = full_masks(DIMS)
    scores.qk[1, 0, 3] = value
    targets = make_targets({"macs_ratio": 0.5}, DIMS, None)
    sizes = ranking.group_sizes("cpu")
    calls = [
        lambda: ranking.rank(scores, masks, DIMS, POLICY, targets),
        lambda: allocation.allocate(scores, masks, DIMS, POLICY, targets),
        lambda: released.rank(scores, masks, DIMS, sizes, targets, count_macs, eta=0.1, done=1, per_iteration=32),
        lambda: nvit.rank(scores, load_model(saved), macs=0.5),
        lambda: nvit.rank(scores, load_model(saved), macs=0.5, rule="solve"),
    ]
    for call in calls:
        with pytest.raises(NotFinite) as caught:
            call()
        line = "saliency: the score of block 1 head 0 qk 3 is not finite (1 qk unit(s) in all)"
        assert str(caught.value) == line


def test_costs_and_scores_beyond_what_can_be_reckoned():
    scores, masks = full_masks(DIMS), full_masks(DIMS)
    scores.mlp[0, 0] = 1e30
    scores = Units(*(s.astype(np.float64) ** 8 for s in scores))
    for call in (ranking.rank, allocation.allocate):
        with pytest.raises(UserError) as caught:
            call(scores, masks, DIMS, POLICY, make_targets({"macs_ratio": 0.5}, DIMS, None))
        assert str(caught.value) == "scores: a mlp unit has 1e+240; beyond 1e+200 sums of scores are not finite"
    for ms in (NAN, 0.0, -1.0, INF):
        with pytest.raises(UserError) as caught:
            make_targets({"latency_ratio": 0.5}, DIMS, lambda dims, ms=ms: ms)
        assert str(caught.value) == f"latency_ratio: the unpruned model costs {ms}, of which nothing can be saved"
    with pytest.raises(UserError, match="needs a latency model and eta >= 0"):
        Policy(sizes=POLICY.sizes, floors=POLICY.floors, rule="eta", eta=NAN, latency=count_macs)
    for options, line in (
        ({"tflops": 0.0}, "tflops=0.0 must be a number from 1e-09 to 1e+12"),
        ({"gbs": NAN}, "gbs=nan must be a number from 1e-09 to 1e+12"),
        ({"tile": 0}, "tile=0 is too small; it must be at least 1"),
    ):
        with pytest.raises(UserError) as caught:
            nvit.Roofline(**{"tflops": 1.0, "gbs": 1.0, "batch": 1, "itemsize": 4} | options)
        assert str(caught.value) == line


def test_scores_of_another_shape_are_refused():
    masks, targets = full_masks(DIMS), make_targets({"macs_ratio": 0.5}, DIMS, None)
    bad = full_masks(DIMS)._replace(mlp=np.ones((2, 13)))
    for call in (ranking.rank, allocation.allocate):
        with pytest.raises(UserError, match=r"scores: mlp has the shape \(2, 13\), the model \(2, 12\)"):
            call(bad, masks, DIMS, POLICY, targets)


# --------------------------------------------------------------------------------- scores that say nothing


def untrained():
    """After --classes: a classifier of zeros."""
    params = random_params(DIMS, dtype=np.float32)
    params["head"] = jax.tree.map(np.zeros_like, params["head"])
    return Model(DIMS, params)


def test_an_untrained_classifier_is_not_pruned():
    images = random_images(DIMS, 8, dtype=np.float32)
    tail = "have the score 0, which tells nothing; the classifier is all zeros, as a new one is: "
    tail += "train it first, by finetuning"
    for method, criterion, line in (
        ("gradual", "fisher", f"all 8 embed units {tail}"),
        ("one_shot", "obs", f"all 4 head units {tail}"),
    ):
        with pytest.raises(UserError) as caught:
            options = {"method": method, "criterion": criterion, "measure": None, "progress": False}
            nvit.prune(
                untrained(),
                (images, np.zeros(8, np.int32)),
                macs=0.9,
                floors=dict.fromkeys(POLICY.floors, 1),
                **options,
            )
        assert str(caught.value) == line, method
    with pytest.raises(UserError, match="all 8 embed units have the score 0"):
        nvit.saliency(untrained(), (images,), progress=False)
    nvit.saliency(untrained(), (images,), criterion="random", progress=False)
    nvit.saliency(untrained(), (images,), criterion="magnitude", progress=False)


def test_all_zero_scores_are_refused_and_ties_are_not():
    model = Model(DIMS, random_params(DIMS, dtype=np.float32))
    masks = full_masks(DIMS)
    with pytest.raises(UserError) as caught:
        nvit.rank(Units(*(0 * m for m in masks)), model, macs=0.9, floors=dict.fromkeys(POLICY.floors, 1))
    assert str(caught.value) == "scores: all are 0, which tells nothing; nvit.saliency gives scores of a trained model"
    assert nvit.rank(masks, model, macs=0.9, floors=dict.fromkeys(POLICY.floors, 1)).met


@pytest.mark.parametrize(
    ("limits", "line"),
    [
        ({"max_macs": 1e9}, "max_macs=1e+09 is more than the unpruned model's 5832: nothing would go; ask for less"),
        (
            {"max_params": 1e9},
            "max_params=1e+09 is more than the unpruned model's 1309: nothing would go; ask for less",
        ),
        (
            {"max_ms": 50.0, "latency_table": lambda dims: 40.0, "macs": 1.0},
            "max_ms=50 is more than the unpruned model's 40: nothing would go; ask for less",
        ),
    ],
)
def test_a_target_looser_than_the_model(limits, line):
    model = Model(DIMS, random_params(DIMS, dtype=np.float32))
    with pytest.raises(UserError) as caught:
        nvit.rank(full_masks(DIMS), model, **limits)
    assert str(caught.value) == line


# ------------------------------------------------------------------------------------ configs that do nothing


def test_plans_and_configs_that_do_nothing(tmp_path):
    for options, line in (
        ({"plain_first": True}, 'plain_first=True is about training, and "one_shot" trains nothing'),
        ({"warmup": 5}, 'warmup=5 is about training, and "one_shot" trains nothing'),
    ):
        with pytest.raises(UserError) as caught:
            Plan(**options)
        assert str(caught.value) == line
    for key, line in (
        (
            "stages",
            "config.stages=(): nothing to do; choose of pretrain, latency, prune, finetune, eval, export, report",
        ),
        (
            "export.formats",
            "config.export.formats=(): nothing to write; choose of safetensors, transformers, stablehlo, onnx",
        ),
    ):
        config = default_config()
        config.update_from_flattened_dict({key: ()})
        with pytest.raises(UserError) as caught:
            check_config(config)
        assert str(caught.value).startswith(line)


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("import sys\ndef get_config():\n    sys.exit(3)\n", "get_config() fails: it calls sys.exit(3)"),
        ("import sys\nsys.exit('no')\n", "cannot be imported: it calls sys.exit('no')"),
    ],
)
def test_configs_that_leave(tmp_path, content, line):
    place = tmp_path / "leaves.py"
    place.write_text(content)
    with pytest.raises(UserError) as caught:
        load_config(str(place))
    assert line in str(caught.value)


def test_an_unknown_variant_has_a_nearest_one():
    with pytest.raises(UserError) as caught:
        load_config("demo:fsat")
    assert (
        str(caught.value) == "--config=demo:fsat: unknown variant 'fsat'; did you mean 'fast'? (known: fast, gradual)"
    )


# --------------------------------------------------------------------------------- shapes, at trace time


def _without(params, block):
    return {name: value for name, value in params.items() if name != block}


def _ones(**shapes):
    return full_masks(DIMS)._replace(**{kind: np.ones(shape, np.float32) for kind, shape in shapes.items()})


def params_of(**changes):
    return random_params(small_dims(**changes))


FORWARD_ROWS = [
    ({"images": np.zeros((2, 4, 4, 1))}, "images have the shape (2, 4, 4, 1); the model takes [B, 8, 8, 1]"),
    ({"images": np.zeros((2, 8, 8, 3))}, "images have the shape (2, 8, 8, 3); the model takes [B, 8, 8, 1]"),
    ({"images": np.zeros((8, 8, 1))}, "images have the shape (8, 8, 1); the model takes [B, 8, 8, 1]"),
    ({"masks": _ones(embed=(1,))}, "masks: embed has the shape (1,), the model (8,)"),
    ({"masks": _ones(mlp=(1, 12))}, "masks: mlp has the shape (1, 12), the model (2, 12)"),
    ({"masks": _ones(head=(2, 1))}, "masks: head has the shape (2, 1), the model (2, 2)"),
    ({"masks": _ones(embed=(3, 8))}, "masks: embed has the shape (3, 8), the model (8,)"),
    (
        {"params": params_of(embed=16)},
        "params: block_0/fc1/kernel has the shape (16, 12), the dims ask for (8, 12)",
    ),
    ({"params": _without(random_params(DIMS), "block_1")}, "params: block_1 is missing; the dims have 2 blocks"),
    ({"params": params_of(depth=3)}, "params: block_2/fc1/bias is no parameter of these dims"),
    (
        {"params": random_params(small_dims(mlp=9))},
        "params: block_0/fc1/bias has the shape (9,), the dims ask for (12,)",
    ),
    (
        {"params": random_params(small_dims(classes=4))},
        "params: head/bias has the shape (4,), the dims ask for (5,)",
    ),
    (
        {"params": random_params(small_dims(image=12))},
        "params: positions has the shape (10, 8), the dims ask for (5, 8)",
    ),
]


@pytest.mark.parametrize(("changes", "line"), FORWARD_ROWS)
@pytest.mark.parametrize("traced", [False, True])
def test_forward_broadcasts_nothing(changes, line, traced):
    given = {"images": np.zeros((2, 8, 8, 1)), "masks": full_masks(DIMS), "params": random_params(DIMS)} | changes

    def forward(given):
        return vit.forward(DIMS, given["params"], given["images"], given["masks"])

    with pytest.raises(UserError) as caught:
        jax.eval_shape(forward, given) if traced else forward(given)
    assert str(caught.value) == line


@pytest.mark.parametrize(
    "masks",
    [full_masks(DIMS)._replace(embed=np.zeros(8)), full_masks(DIMS)._replace(embed=np.eye(2, 8, 1) * [[1], [0]])],
)
def test_masks_without_a_channel_are_refused(masks):
    params, images = random_params(DIMS, dtype=np.float32), np.zeros((2, 8, 8, 1), np.float32)
    for call in (
        lambda: vit.forward(DIMS, params, images, masks),
        lambda: Model(DIMS, params).apply(params, images, masks),
    ):
        with pytest.raises(UserError, match="^masks: embed keeps no channel$"):
            call()


def test_reshape_wants_the_parameters_of_its_dims():
    masks = full_masks(DIMS)
    for dims, line in (
        (small_dims(embed=16), "params: block_0/fc1/kernel has the shape (16, 12), the dims ask for (8, 12)"),
        (small_dims(depth=1), "params: block_1 is missing; the dims have 2 blocks"),
        (small_dims(qk=6), "params: block_0/k/bias has the shape (2, 6), the dims ask for (2, 4)"),
        (small_dims(layer_scale=True), "params: block_0/scale1 is no parameter of these dims"),
        (small_dims(dist_token=True, positions="patches"), "params: dist_token is no parameter of these dims"),
        (small_dims(pre_logits=7), "params: head/kernel has the shape (7, 5), the dims ask for (8, 5)"),
    ):
        with pytest.raises(UserError) as caught:
            reshape(random_params(dims), masks, DIMS)
        assert str(caught.value) == line

"""The library's front: names, models as arguments, what may be given as batches, and what a mistake says."""

import ast
import inspect
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from conftest import ENVIRONMENT
from PIL import Image

import nvit_jax as nvit
from nvit_jax.data.feed import make_feed
from nvit_jax.model.groups import flatten


@pytest.fixture(scope="module")
def digits():
    """128 raw images and labels."""
    images, labels = nvit.load_dataset("digits").split("train").read(slice(0, 128))
    return images, labels


def same(a: nvit.Model, b: nvit.Model) -> bool:
    ours, theirs = dict(flatten(a.params)), dict(flatten(b.params))
    assert ours.keys() == theirs.keys()
    return a.dims == b.dims and all(np.array_equal(ours[path], theirs[path]) for path in ours)


def quiet(function, *args, **kwargs):
    return function(*args, progress=False, **kwargs)


# ----------------------------------------------------------------------------------------------- names


def test_the_names_for_type_checkers_are_the_names_there_are():
    tree = ast.parse(pathlib.Path(nvit.__file__).read_text())
    static = {
        (node.module.removeprefix("nvit_jax."), alias.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("nvit_jax.")
        for alias in node.names
    }
    assert static == {(home, name) for home, names in nvit._HOMES.items() for name in names}
    assert set(nvit.__all__) == {name for _, name in static} | {"__version__"} == set(dir(nvit))
    for name in set(nvit.__all__) - {"__version__"}:
        value = getattr(nvit, name)
        assert inspect.getdoc(value), name
        if inspect.isfunction(value):
            assert all(p.annotation is not p.empty for p in inspect.signature(value).parameters.values()), name


def test_the_package_alone_imports_no_jax():
    code = "import sys, nvit_jax; assert not {'jax', 'numpy', 'flax'} & set(sys.modules); nvit_jax.prune; import jax"
    code += "; from jax._src import xla_bridge; assert not xla_bridge._backends, 'a device was opened'"
    subprocess.run([sys.executable, "-c", code], check=True, env=ENVIRONMENT)


def test_mistakes_are_value_errors_about_the_callers_argument(digits_model, digits):
    assert issubclass(nvit.UserError, ValueError)
    for arguments, words in (
        ({"mac": 0.5}, r"prune\(\) has no argument 'mac'; did you mean 'macs'\?"),
        ({}, "set at least one of macs, params, latency"),
        ({"macs": 2}, r"^macs=2: it must be in \(0, 1\]"),
        ({"macs": "half"}, "^macs='half': it must be a number"),
        ({"macs": 0.001}, "^macs=0.001 cannot be met: .* the smallest reachable is"),
        ({"max_params": 10}, "^max_params=10 cannot be met"),
        ({"macs": 0.5, "criterion": "fischer"}, "^criterion='fischer' is not one of .*; did you mean 'fisher'"),
        ({"macs": 0.5, "method": "one-shot"}, "^method='one-shot' .*; did you mean 'one_shot'"),
        ({"macs": 0.5, "rule": "costs"}, "^rule='costs' is not one of"),
        ({"macs": 0.5, "rule": "nvit"}, '^rule="nvit" needs a latency model'),
        ({"macs": 0.5, "kinds": ("mpl",)}, "^kinds: unknown kind 'mpl'"),
        ({"macs": 0.5, "kinds": "mlp"}, r"^kinds='mlp': give a tuple, such as \(\"mlp\",\)"),
        ({"macs": 0.5, "protect": (2,)}, "^protect: there is no block 2"),
        ({"macs": 0.5, "floors": {"mpl": 3}}, "^floors: unknown kind 'mpl'"),
        ({"macs": 0.5, "profile": "phone"}, "^profile='phone' is not one of"),
        ({"macs": 0.5, "images": 0}, "^images=0: it must be >= 1"),
        ({"latency": 0.5, "latency_table": "/nowhere.json"}, "/nowhere.json is missing"),
        ({"latency": 0.5, "latency_table": 3}, "^latency_table is a int"),
        ({"macs": 0.5, "rule": nvit.Choice(), "profile": "gpu"}, "^profile is given beside a recipe|^profile is given"),
    ):
        with pytest.raises(nvit.UserError, match=words):
            quiet(nvit.prune, digits_model, digits, **arguments)


def test_a_mistake_is_found_before_a_latency_is_measured(digits_model, digits, monkeypatch):
    monkeypatch.setattr("nvit_jax.api.prune.measure_latency", lambda *a, **k: pytest.fail("measured"))
    for arguments, words in (
        ({"latency": 1.5}, r"^latency=1.5: it must be in \(0, 1\]"),
        ({"latency": 0.5, "macs": 0.001}, "^macs=0.001 cannot be met"),
        ({"latency": 0.5, "kinds": ("mpl",)}, "^kinds: unknown kind 'mpl'"),
        ({"latency": 0.5, "protect": (5,)}, "^protect: there is no block 5"),
        ({"latency": 0.5, "rule": "solve", "method": "iterative"}, '^rule="solve" solves for a target'),
    ):
        with pytest.raises(nvit.UserError, match=words):
            quiet(nvit.prune, digits_model, digits, **arguments)


# ---------------------------------------------------------------------------------------------- models


def test_a_model_is_a_pytree(digits_model, digits):
    images = digits_model.preprocessing(digits[0][:4])
    traced = []

    @jax.jit
    def answers(model, images):
        traced.append(repr(model))
        return model(images).argmax(-1)

    doubled = jax.tree.map(lambda x: 2 * x, digits_model)
    assert isinstance(doubled, nvit.Model) and doubled.info == digits_model.info
    assert np.array_equal(answers(digits_model, images), digits_model(images).argmax(-1))
    answers(doubled, images)
    assert len(traced) == 1 and "Model(" in traced[0]  # other weights compile nothing
    gradient = jax.grad(lambda model: model(images).sum())(digits_model)
    assert gradient.params["head"]["bias"].shape == (10,)


def test_images_as_they_come(digits_model, digits, tmp_path):
    raw = digits[0][:3]
    normalised = digits_model.preprocessing(raw)
    expected = np.asarray(digits_model(normalised))
    for images in (raw, raw.transpose(0, 3, 1, 2), torch.from_numpy(raw), jnp.asarray(raw), raw.astype(np.int64)):
        np.testing.assert_array_equal(digits_model(images), expected)
    np.testing.assert_array_equal(digits_model(torch.from_numpy(normalised)), expected)
    with pytest.raises(nvit.UserError, match=r"images have the shape \(3, 8, 9, 1\); the model takes \[B, 8, 8, 1\]"):
        digits_model(np.zeros((3, 8, 9, 1)))
    Image.fromarray(raw[0, ..., 0]).save(tmp_path / "0.png")
    pictures = [Image.fromarray(raw[1, ..., 0]), raw[2], tmp_path / "0.png"]
    found = digits_model.preprocess(pictures)
    np.testing.assert_allclose(found, normalised[[1, 2, 0]], atol=1e-6)
    assert digits_model.preprocess(tmp_path / "0.png").shape == (1, 8, 8, 1)
    (tmp_path / "1.png").write_bytes(b"no image")
    for bad, words in ((tmp_path / "2.png", "cannot be read: No such file"), (tmp_path / "1.png", "1.png cannot be")):
        with pytest.raises(nvit.UserError, match=words):
            digits_model.preprocess([bad])
    unknown = nvit.Model(digits_model.dims, digits_model.params)
    with pytest.raises(nvit.UserError, match="does not know its preprocessing"):
        unknown(raw)


def test_a_model_in_words(digits_model):
    assert repr(digits_model).startswith("Model(2 blocks of embed 32, 8 x 8 x 1 -> 10 classes, 0.0182 M parameters")
    lines = digits_model.summary().splitlines()
    assert lines[1].split() == ["block", "heads", "query/key", "value", "mlp", "parameters", "MACs"]
    assert lines[3].split()[:5] == ["0", "2", "16", "16", "64"] and len(lines) == 5


def test_load_takes_directories_files_and_snapshot_folders(digits_model, tmp_path):
    digits_model.save(tmp_path / "model")
    assert same(nvit.load(tmp_path / "model"), digits_model)
    nvit.export(digits_model, tmp_path / "out", say=lambda line: None)
    file = tmp_path / "out" / "safetensors" / "model.safetensors"
    assert same(nvit.load(file), digits_model) and same(nvit.load(file.parent), digits_model)
    nvit.convert(file, tmp_path / "converted", say=lambda line: None)
    assert same(nvit.load_model(tmp_path / "converted"), digits_model)
    (tmp_path / "empty").mkdir()
    for path, words in (("nowhere", "no such file or directory"), ("empty", "is no model directory")):
        with pytest.raises(nvit.UserError, match=words):
            nvit.load(tmp_path / path)


# ---------------------------------------------------------------------------------------------- batches


class Loader:
    """Re-iterable, of torch tensors in PyTorch's order, without a length."""

    def __init__(self, images, labels, size):
        self.images, self.labels, self.size = images, labels, size

    def __iter__(self):
        for i in range(0, len(self.labels), self.size):
            images = torch.from_numpy(self.images[i : i + self.size].transpose(0, 3, 1, 2).copy())
            yield {"images": images, "labels": torch.from_numpy(self.labels[i : i + self.size])}


def test_what_may_be_given_as_batches(digits_model, digits):
    images, labels = digits
    normalised = digits_model.preprocessing(images)
    expected = quiet(nvit.evaluate, digits_model, (images, labels))
    assert expected["images"] == 128 and set(expected) == {"top1", "top5", "loss", "images"}
    pairs = [(normalised[i : i + 50], labels[i : i + 50]) for i in (0, 50, 100)]
    for given in ((normalised, labels), pairs, iter(pairs), Loader(images, labels, 40), [torch.from_numpy(images)]):
        if isinstance(given, list) and len(given) == 1:
            with pytest.raises(nvit.UserError, match="labels are needed"):
                quiet(nvit.evaluate, digits_model, given)
            continue
        found = quiet(nvit.evaluate, digits_model, given)
        assert found == pytest.approx(expected, abs=1e-6)
    data = nvit.load_dataset("digits")
    assert quiet(nvit.evaluate, digits_model, data)["images"] == 360
    assert quiet(nvit.evaluate, digits_model, data.split("val"))["images"] == 180


def test_batches_that_are_none(digits_model, digits):
    images, labels = digits
    for given, words in (
        (iter([(images, labels)]), "^batches: a generator can be gone through only once"),
        (5, "^batches is a int"),
        ("digits", "^batches is a str"),
        ({"image": images}, "^batches: a dict is one batch"),
        ((images, labels[:5]), r"'label' has the shape \(5,\); the batch has 128 images"),
        ((images[:, :4], labels), r"batches: images have the shape \(128, 4, 8, 1\)"),
        ((images, labels + 7), "labels go from 7 to 16; the model has 10 classes"),
        ((images, labels / 2), r"labels are float\d+ \(128,\); they must be integers"),
        ([{"picture": images}], "batch 0: images: a dict needs the key 'image'; it has 'picture'"),
        ([], "they are empty"),
        (images, "labels are needed"),
    ):
        with pytest.raises(nvit.UserError, match=words):
            quiet(nvit.prune, digits_model, given, macs=0.8, criterion="taylor", measure=None)


def test_a_loader_is_read_epoch_by_epoch(digits_model, digits):
    feed = make_feed(Loader(*digits, 48), digits_model.dims, digits_model.preprocessing)
    assert feed.steps(0) == 3
    from nvit_jax.data.feed import Draws
    from nvit_jax.parallel import Parallel

    reader = feed.reader(Draws(0, (0,), Parallel.create("jit")))
    sizes = [len(reader(step)["label"]) for step in range(4)]
    assert sizes == [48, 48, 32, 48]
    np.testing.assert_array_equal(reader(1)["label"], digits[1][48:96])  # back to an earlier step


# ------------------------------------------------------------------------------------------- functions


def test_prune_step_by_step_is_prune(digits_model, digits):
    found = quiet(nvit.prune, digits_model, digits, macs=0.6, criterion="fisher", compensate=False, measure=None)
    scores = quiet(nvit.saliency, digits_model, digits)
    ranking = nvit.rank(scores, digits_model, macs=0.6)
    for a, b in zip(ranking.masks, found.masks, strict=True):
        np.testing.assert_array_equal(a, b)
    assert same(nvit.reshape(digits_model, ranking.masks), found.model)
    assert found.record["macs_ratio"] <= 0.6 and found.record["asked"] == {"macs": 0.6}
    assert found.record["masked_vs_compact_max_abs_diff"] < 1e-4
    difference = np.asarray(found.masked(digits[0])) - np.asarray(found.model(digits[0]))
    assert np.abs(difference).max() < 1e-4
    with pytest.raises(nvit.UserError, match="scores: embed has the shape"):
        nvit.rank(scores._replace(embed=scores.embed[:3]), digits_model, macs=0.6)


def test_several_limits_hold_at_once(digits_model, digits):
    table = nvit.Roofline(tflops=0.1, gbs=10.0, batch=32, itemsize=4)
    limits = {"macs": 0.7, "max_params": 10_000, "latency": 0.8}
    found = quiet(nvit.prune, digits_model, digits, **limits, latency_table=table, rule="solve", measure=None)
    r = found.record
    assert r["macs_ratio"] <= 0.7 and r["predicted_latency_ratio"] <= 0.8 and r["latency_source"].startswith("estimate")
    assert sum(x.size for x in jax.tree.leaves(found.model.params)) <= 10_000
    mine = quiet(nvit.prune, digits_model, digits, latency=0.8, latency_table=lambda d: float(sum(d.mlp)), measure=None)
    assert sum(mine.model.dims.mlp) <= 0.8 * sum(digits_model.dims.mlp)


def test_second_order_needs_no_labels(digits_model, digits):
    images, labels = digits
    without = quiet(nvit.saliency, digits_model, images, criterion="hvp")
    with_labels = quiet(nvit.saliency, digits_model, (images, labels), criterion="hvp")
    np.testing.assert_array_equal(without.mlp, with_labels.mlp)
    with pytest.raises(nvit.UserError, match="^batches: there is no image to evaluate"):
        quiet(nvit.evaluate, digits_model, [])
    with pytest.raises(nvit.UserError, match="^model is a str; it must be a Model"):
        quiet(nvit.evaluate, "deit_tiny", digits)


def test_an_own_loss_needs_no_labels_and_decides(digits_model, digits):
    images = digits_model.preprocessing(digits[0])
    seen = []

    def loss(logits, batch):
        seen.append(sorted(batch))
        return (batch["weight"] * logits[:, 0]) ** 2

    batches = [{"image": images[:64], "weight": np.ones(64)}, {"image": images[64:], "weight": np.zeros(64)}]
    ours = quiet(nvit.saliency, digits_model, batches, loss=loss)
    assert seen[0] == ["image", "index", "weight"]
    only = quiet(nvit.saliency, digits_model, batches[:1], loss=loss)
    np.testing.assert_allclose(ours.mlp, only.mlp / 2, rtol=1e-5)  # the second batch weighs nothing
    with pytest.raises(nvit.UserError, match=r"loss returns the shape \(\); it must be \[B\]"):
        quiet(nvit.saliency, digits_model, batches, loss=lambda logits, batch: logits.sum())


def test_finetune_with_ones_own_optimizer_and_callback(digits_model, digits):
    lines = []
    trained = nvit.finetune(
        digits_model,
        digits,
        epochs=4,
        optimizer=optax.sgd(0.0),
        evaluate_on=digits,
        evaluate_every=0,
        progress=False,
        callback=lambda step, metrics: lines.append((step, metrics["loss"])),
    )
    assert same(trained, digits_model)  # a rate of 0 changes nothing
    assert [step for step, _ in lines] == [8] and trained.info["training"]["steps"] == 8
    better = quiet(nvit.finetune, digits_model, digits, teacher=digits_model, epochs=20, learning_rate=3e-3, ema=0.9)
    assert quiet(nvit.evaluate, better, digits)["loss"] < quiet(nvit.evaluate, digits_model, digits)["loss"]
    for arguments, words in (
        ({"epochs": 0.1}, "^epochs=0.1 is not one step"),
        ({"recipe": nvit.Recipe(), "epochs": 3}, "^epochs is given beside a recipe"),
        ({"keep": "best"}, '^keep="best" needs evaluate_on'),
        ({"keep": "worst"}, "^keep='worst' is not one of"),
        ({"ema": 1.0}, r"^ema=1.0: it must be in \[0, 1\)"),
        ({"augment": nvit.Augment(crop=0.1)}, "^augment.crop=0.1: images of 0..255 are needed"),
        ({"epoch": 3}, "has no argument 'epoch'; did you mean 'epochs'"),
        ({"epochs": "many"}, "^epochs='many': it must be a number"),
        ({"optimizer": 3}, "^optimizer is a int; it must be an optax optimizer"),
        ({"teacher": "deit"}, "^teacher is a str; it must be a Model"),
    ):
        with pytest.raises(nvit.UserError, match=words):
            quiet(nvit.finetune, digits_model, digits, **arguments)


def test_a_directory_saves_and_resumes(digits_model, digits, tmp_path):
    """Stopped after six of eight steps, then let go on: the same model, bit for bit, as without a stop."""
    recipe = nvit.Recipe(epochs=4, batch=64, save_every=2, log_every=2, evaluate_every=0, learning_rate=1e-3)
    whole = quiet(nvit.finetune, digits_model, digits, recipe=recipe)
    assert not list(tmp_path.iterdir())

    def stop(step, metrics):
        if step == 6:
            raise KeyboardInterrupt

    place = {"directory": tmp_path / "run"}
    with pytest.raises(KeyboardInterrupt):
        quiet(nvit.finetune, digits_model, digits, recipe=recipe, callback=stop, **place)
    assert (tmp_path / "run" / "state" / "4").is_dir()
    assert same(quiet(nvit.finetune, digits_model, digits, recipe=recipe, **place), whole)
    steps = [line.split(",")[0] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert steps == ['{"step": 2', '{"step": 4', '{"step": 6', '{"step": 8']
    assert same(quiet(nvit.finetune, digits_model, digits, recipe=recipe, **place), whole)  # finished before
    with pytest.raises(nvit.UserError, match="^directory=.* belongs to a finetune with another model or other arg"):
        quiet(nvit.finetune, digits_model, digits, epochs=1, **place)


def test_a_pruning_that_is_called_again_knows_its_history(digits_model, digits, tmp_path):
    how = {
        "macs": 0.6,
        "measure": None,
        "directory": tmp_path,
        "method": nvit.Plan(method="gradual", steps=2, interval=2),
    }
    first, again = (quiet(nvit.prune, digits_model, digits, **how) for _ in range(2))
    assert same(first.model, again.model) and first.record["history"] == again.record["history"]
    assert [line["pruning"] for line in again.record["history"]] == [1, 2]


def test_benchmark_times_in_turns(digits_model):
    found = nvit.benchmark([digits_model, digits_model.dims], batch=4, repeats=3)
    assert [set(one) for one in found] == [{"ms", "spread", "ratio"}] * 2
    assert found[0] == found[1] and found[0]["ratio"] == 1.0  # equal dims are measured once
    with pytest.raises(nvit.UserError, match="^batch=0: it must be >= 1"):
        nvit.benchmark([digits_model], batch=0)


def test_data_sets_that_are_none(tmp_path):
    for arguments, words in (
        (("digit",), "^name='digit' is not"),
        (("folder",), '^name="folder" needs path=ROOT with ROOT/train and ROOT/val, or train=DIR'),
        (("folder", str(tmp_path)), r"^train=.*train: there is no such directory"),
        (("npz", str(tmp_path / "x.npz")), "^path=.*x.npz: there is no such file"),
    ):
        with pytest.raises(nvit.UserError, match=words):
            nvit.load_dataset(*arguments)


def test_export_says_what_it_cannot(digits_model, tmp_path):
    for formats, words in (
        ((), "^formats: nothing to write"),
        ("onnx", r"^formats='onnx': give a tuple, such as \(\"onnx\",\)"),
        (("tensorrt",), "^formats='tensorrt' is not one of"),
    ):
        with pytest.raises(nvit.UserError, match=words):
            nvit.export(digits_model, tmp_path, formats)

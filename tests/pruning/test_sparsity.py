"""2:4 sparsity: which weights stay, that the others stay away in training, and what the exported files hold."""

import itertools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import pytest
from conftest import call, ragged, random_images, random_params, read, small_dims
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from nvit_jax import convert, load_model
from nvit_jax.formats import export, interchange
from nvit_jax.model import vit
from nvit_jax.model.directory import Model
from nvit_jax.model.groups import flatten
from nvit_jax.parallel import Parallel
from nvit_jax.pruning import sparsity
from nvit_jax.run import report
from nvit_jax.training import distill, optim
from nvit_jax.training.losses import Objective, objective_loss

DIMS = small_dims(embed=10, dist_token=True, mlp=14, pre_logits=6)  # no width but the heads' is a multiple of 4


def brute_force(row, n, m):
    """The best choice of each group, all of them tried: the first of the best in the order of the positions."""
    kept = []
    for start in range(0, len(row), m):
        group = row[start : start + m]
        choices = itertools.combinations(range(len(group)), min(n, len(group)))
        best = max(choices, key=lambda c: (sum(group[i] for i in c), [-i for i in c]))
        kept += [i in best for i in range(len(group))]
    return kept


def groups_of_4(matrix):
    """Non-zeros of 4 neighbours in a row, [outputs, inputs]; by another way than the module's."""
    return [int((matrix[:, i : i + 4] != 0).sum(1).max()) for i in range(0, matrix.shape[1], 4)]


def sparse_model(**changes) -> Model:
    model = ragged(**changes)
    params = sparsity.apply(model.params, sparsity.find_masks(model.params))
    return Model(model.dims, params, info=model.info | {"sparsity": "2:4"})


# ------------------------------------------------------------------------------------------------ the masks


@given(st.lists(st.integers(0, 3), min_size=1, max_size=11), st.integers(1, 5), st.integers(0, 5))
def test_masks_are_the_best_of_all_choices(row, m, n):
    """Few different scores, for ties; any width, for incomplete groups."""
    n = min(n, m)
    found = sparsity.keep_largest(np.array([row, row[::-1]], float), n, m)
    assert found.tolist() == [brute_force(row, n, m), brute_force(row[::-1], n, m)]


def test_ties_and_incomplete_groups():
    keep = lambda *row: sparsity.keep_largest(np.array([row], float))[0].astype(int).tolist()  # noqa: E731
    assert keep(1, 1, 1, 1) == [1, 1, 0, 0]
    assert keep(1, 2, 1, 1) == [1, 1, 0, 0]
    assert keep(0, 0, 0, 5, 3, 1, 2) == [1, 0, 0, 1, 1, 0, 1]
    assert keep(1, 2, 3, 4, 5) == [0, 0, 1, 1, 1]
    assert keep(0, 0) == [1, 1]


def test_linear_layers_and_no_others():
    masks = dict(flatten(sparsity.find_masks(random_params(DIMS))))
    linear = {path for path, mask in masks.items() if mask.ndim}
    assert linear == {
        f"block_{i}/{name}/kernel" for i in range(2) for name in ("q", "k", "v", "proj", "fc1", "fc2")
    } | {"pre_logits/kernel", "head/kernel", "head_dist/kernel"}
    assert all(mask for path, mask in masks.items() if path not in linear)


def test_a_group_is_four_neighbours_of_an_exported_row():
    """Masks taken in PyTorch's layout, tensor by tensor, are ours: the proj flattening and the fused qkv, too."""
    params = random_params(DIMS, dtype=np.float32)
    ours = interchange.to_torch(DIMS, sparsity.apply(params, sparsity.find_masks(params)))
    for name, dense in interchange.to_torch(DIMS, params).items():
        if dense.ndim == 2:
            kept = [brute_force(row, 2, 4) for row in np.abs(dense).tolist()]
            np.testing.assert_array_equal(ours[name], np.where(kept, dense, 0), err_msg=name)
        else:
            np.testing.assert_array_equal(ours[name], dense, err_msg=name)


def test_the_check_names_the_matrix():
    params = sparsity.apply(random_params(DIMS), sparsity.find_masks(random_params(DIMS)))
    assert sparsity.check(sparsity.matrices(params)) == 15
    assert sparsity.count_nonzero(params) == sum(int((leaf != 0).sum()) for leaf in jax.tree.leaves(params))
    params["block_1"]["proj"]["kernel"][:, :, 3] = 1
    with pytest.raises(RuntimeError, match="block_1/proj/kernel is not 2:4 sparse: 4 of 4"):
        sparsity.check(sparsity.matrices(params))
    assert sparsity.check(sparsity.matrices(params), 4, 4) == 15


# ------------------------------------------------------------------------------------------------- training


def batches(count, size=8):
    rng = np.random.default_rng(3)
    for number in range(count):
        yield {
            "image": random_images(DIMS, size, number, np.float32),
            "label": rng.integers(0, DIMS.classes, size).astype(np.int32),
            "index": np.arange(size, dtype=np.int32),
        }


MIX = Objective(label_weight=1.0, kl_weight=10.0, tau=2.0, kl_per_head=True)
BACKENDS = {"jit 1": ("jit", 1), "jit 4": ("jit", 4), "pmap 4": ("pmap", 4)}


def train(backend, optimizer, params, count, **options):
    parallel = Parallel.create(BACKENDS[backend][0], tuple(jax.devices()[: BACKENDS[backend][1]]))
    step = parallel.compile_training(distill.make_train_step(DIMS, optimizer, MIX, teacher_dims=DIMS, **options))
    state = parallel.place(distill.new_state(params, optimizer, 5, ema=bool(options)))
    teacher = parallel.place(random_params(DIMS, 1, np.float32))
    for batch in batches(count):
        state, _ = step(distill.Inputs(state, teacher), parallel.shard(batch))
    return jax.device_get(state)


@pytest.mark.parametrize("backend", ["jit 4", "pmap 4"])
def test_what_is_gone_stays_away(backend):
    """Through AdamW with weight decay and clipping, its moments, and the average; all that stays is trained."""
    dense = random_params(DIMS, dtype=np.float32)
    masks = sparsity.find_masks(dense)
    optimizer = sparsity.held(optim.adamw(1e-2, weight_decay=0.5, clip_norm=1.0), masks)
    start = sparsity.apply(dense, masks)
    state = train(backend, optimizer, start, 4, ema_decay=0.9, dropout=0.2, drop_path=0.1)
    held, inner = state.opt_state
    moments = [s for s in jax.tree.leaves(inner, is_leaf=lambda x: hasattr(x, "mu")) if hasattr(s, "mu")]
    for tree in (state.params, state.average, moments[0].mu, moments[0].nu):
        for (path, value), (_, mask) in zip(flatten(tree), flatten(masks), strict=True):
            assert not np.any(np.asarray(value)[np.broadcast_to(~mask, value.shape)]), path
    for (path, value), (_, before), (_, mask) in zip(*map(flatten, (state.params, start, masks)), strict=True):
        moved = value != before
        assert moved[np.broadcast_to(mask, value.shape)].mean() > 0.9, path
    assert sparsity.check(sparsity.matrices(state.average)) == 15
    for a, b in zip(jax.tree.leaves(held), jax.tree.leaves(masks), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_gradient_aware_score(backend):
    """w^2 times the mean over batches of the squared gradient, from gradients taken one by one."""
    params, teacher = (random_params(DIMS, seed, np.float32) for seed in (0, 1))

    @jax.jit
    def gradient(batch):
        batch = batch | {"teacher": vit.forward(DIMS, teacher, batch["image"])}
        loss = lambda p: objective_loss(MIX, vit.forward(DIMS, p, batch["image"]), batch)[0].mean()  # noqa: E731
        return jax.grad(loss)(jax.tree.map(jnp.asarray, params))

    squares = [jax.tree.map(lambda g: np.asarray(g, np.float64) ** 2, gradient(b)) for b in batches(3)]
    expected = jax.tree.map(lambda *s: np.mean(s, axis=0), *squares)
    state = train(backend, sparsity.sum_of_squares(), params, 3)
    found = jax.tree.map(lambda s: s / 3, state.opt_state)
    for (path, a), (_, b) in zip(flatten(found), flatten(expected), strict=True):
        # Twice the 1e-5 that sums in another order explain in a gradient, of the largest one in a tensor. The
        # keys' bias has none: it is left out, see test_parallel.close.
        if not path.endswith("k/bias"):
            np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * b.max(), err_msg=path)
    for (path, a), (_, b) in zip(flatten(state.params), flatten(params), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=path)
    masks = dict(flatten(sparsity.find_masks(params, expected)))
    for path, matrix in sparsity.matrices(params):
        squared = dict(sparsity.matrices(expected))[path]
        kept = [brute_force(row, 2, 4) for row in (matrix.astype(float) ** 2 * squared).tolist()]
        np.testing.assert_array_equal(dict(sparsity.matrices({"x": masks}))[f"x/{path}"], kept, err_msg=path)
    by_size = dict(flatten(sparsity.find_masks(params)))
    assert all((masks[path] != by_size[path]).any() for path, _ in sparsity.matrices(params))


# --------------------------------------------------------------------------------------------------- exports


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_matrix_of_the_exported_file(dtype, tmp_path):
    model, said = sparse_model(pre_logits=6), []
    (record,) = export.export_model(model, tmp_path / "export", ("safetensors",), (dtype,), said.append)
    assert record["sparsity"] == "2:4" and "2:4 in each of 11 matrices" in said[1] and "no multiple of 16" in said[1]
    tensors = load_file(tmp_path / record["path"])
    dense = export.export_model(ragged(pre_logits=6), tmp_path / "dense", ("safetensors",), (dtype,), said.append)[0]
    assert "sparsity" not in dense
    whole = load_file(tmp_path / dense["path"])
    linear = {name for name, tensor in tensors.items() if tensor.ndim == 2}
    expected = {f"blocks.{i}.{x}.weight" for i in range(2) for x in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}
    assert linear == expected | {"head.weight", "head_dist.weight", "pre_logits.fc.weight"}
    for name, tensor in tensors.items():
        if name in linear:
            assert max(groups_of_4(tensor)) == 2, name
            assert not np.signbit(tensor[tensor == 0].astype(np.float32)).any()  # zeros in every bit
            same = tensor != 0
            np.testing.assert_array_equal(tensor[same], whole[name][same], err_msg=name)
        else:
            np.testing.assert_array_equal(tensor, whole[name], err_msg=name)


def test_onnx_and_what_is_not_sparse(tmp_path):
    model, said = sparse_model(), []
    (record,) = export.export_model(model, tmp_path / "a", ("onnx",), ("float16",), said.append)
    assert record["sparsity"] == "2:4" and "2:4 in each of 10 matrices" in said[1]
    graph = onnx.load(tmp_path / record["path"]).graph
    zeros = sum(int((onnx.numpy_helper.to_array(t) == 0).sum()) for t in graph.initializer if len(t.dims) == 2)
    assert zeros >= sum(int((matrix == 0).sum()) for _, matrix in sparsity.matrices(model.params))
    model.params["block_0"]["v"]["kernel"][:, 1, 2] = 1
    for name, matrix in (("safetensors", "blocks.0.attn.qkv.weight"), ("onnx", "val_")):
        with pytest.raises(RuntimeError, match=f"{matrix}.* is not 2:4 sparse: 4 of 4"):
            export.export_model(model, tmp_path / "b", (name,), ("float32",), said.append)
        assert not (tmp_path / "b" / name).exists()


def test_an_export_comes_back_with_its_zeros(tmp_path):
    model = sparse_model()
    export.export_model(model, tmp_path, ("safetensors",), ("float32",), lambda text: None)
    convert(tmp_path / "safetensors" / "model.safetensors", tmp_path / "model")
    again = load_model(tmp_path / "model")
    assert again.info["sparsity"] == "2:4"
    for (path, a), (_, b) in zip(flatten(again.params), flatten(model.params), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=path)


# ----------------------------------------------------------------------------------------------------- a run


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def copy_of_pruned(finished, place, backend):
    """A run that is to be finetuned; what pruning did does not depend on the backend."""
    for stage in ("pretrain", "latency", "prune"):
        shutil.copytree(finished / stage, place / stage)
    record = read(place / "prune" / "stage.json")
    record["keys"]["parallel"] = backend
    (place / "prune" / "stage.json").write_text(json.dumps(record))
    return place


@pytest.fixture(scope="module", params=[("magnitude", "jit"), ("gradient", "pmap")], ids="-".join)
def sparse_run(request, finished, tmp_path_factory):
    """(workdir, arguments) of a finetuning with masks."""
    score, backend = request.param
    arguments = (f"--config.finetune.sparsity={score}", f"--config.parallel={backend}")
    place = copy_of_pruned(finished, tmp_path_factory.mktemp("sparse") / "W", backend)
    assert call("--workdir", place, *arguments, "--stage", "finetune") == 0
    return place, arguments


def test_a_resumed_run_is_the_same(sparse_run, finished, tmp_path, capsys, monkeypatch):
    """Bit for bit, with the masks of the saved state."""
    undisturbed, arguments = sparse_run
    place = copy_of_pruned(finished, tmp_path / "W", arguments[1].partition("=")[2])
    original = distill.fit

    def cut_short(state, step_fn, stream, until, *rest, **options):
        original(state, step_fn, stream, 10, *rest, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(distill, "fit", cut_short)
        assert call("--workdir", place, *arguments, "--stage", "finetune") == 130  # as shells count SIGINT
    assert "parameters stay, val top-1" in capsys.readouterr().out
    assert call("--workdir", place, *arguments, "--stage", "finetune") == 0
    told = capsys.readouterr().out
    assert "resumes at step 7" in told and "parameters stay" not in told
    one, other = (load_model(w / "finetune" / "model") for w in (undisturbed, place))
    for (path, a), (_, b) in zip(flatten(one.params), flatten(other.params), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=path)
    assert len({(w / "finetune" / "log.jsonl").read_text() for w in (undisturbed, place)}) == 1


@pytest.mark.parametrize("sparse_run", [("magnitude", "jit")], ids="-".join, indirect=True)
def test_a_sparse_run_is_counted_and_exported(sparse_run, capsys):
    place, arguments = sparse_run
    model = load_model(place / "finetune" / "model")
    assert model.info["sparsity"] == "2:4" and sparsity.check(sparsity.matrices(model.params)) == 13
    nonzero = sum(int(np.count_nonzero(leaf)) for leaf in jax.tree.leaves(model.params))
    assert read(place / "finetune" / "metrics.json")["nonzero_params"] == nonzero
    for stage in ("eval", "report", "export"):
        assert call("--workdir", place, *arguments, "--stage", stage) == 0
    summary = read(place / "summary.json")
    assert summary["finetuned"]["nonzero_params"] == nonzero < 0.6 * summary["finetuned"]["params"]
    assert "nonzero_params" not in summary["pruned"]
    cell = f"{nonzero:,} ({summary['dense']['params'] / nonzero:.1f}x)"
    assert cell in capsys.readouterr().out and cell in (place / "report.html").read_text()
    files = read(place / "export" / "metrics.json")["files"]
    assert [f.get("sparsity") for f in files] == ["2:4", None]


def test_the_table_without_a_sparse_model_has_no_column_for_it(finished):
    head, *rows = report.table(read(finished / "summary.json"))
    assert len(head) == 7 and all(len(row) == 7 for row in rows)
    assert "sparsity" not in load_model(finished / "finetune" / "model").info


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sparsity=random"], "config.finetune.sparsity='random': must be magnitude or gradient"),
        (["sparsity=magnitude", "from_scratch=True"], "does not go with finetune.from_scratch"),
    ],
)
def test_mistakes_are_one_line(tmp_path, capsys, arguments, words):
    assert call("--workdir", tmp_path / "W", *(f"--config.finetune.{a}" for a in arguments)) == 2
    error = capsys.readouterr().err.strip()
    assert words in error and len(error.splitlines()) == 1

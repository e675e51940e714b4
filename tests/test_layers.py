"""The architecture as a test: imports go one way, and conventions hold."""

import ast
import inspect
import pathlib

import nvit_jax

PACKAGE = pathlib.Path(nvit_jax.__file__).parent
ORDER = [  # lowest first; a module imports only from the lines above its own
    "errors torch_vit torch_regnet",
    "dims losses parallel config weights layouts images sources layers",
    "augment mixing data",
    "checkpoint groups pipeline evaluate roofline canonical positions",
    "workdir masks models teachers interchange sparsity",
    "report optim saliency ranking timing detect",
    "latency allocation api cli distill reshape",
    "nvit prune convert export",
    "stages.common",
    "stages.rules stages.scoring",
    "stages.export stages.measure stages.preview stages.prune stages.train",
    "stages",
]
LAYER = {name: i for i, names in enumerate(ORDER) for name in names.split()}


def test_no_logic_reads_the_wall_clock():
    """Clocks jump: durations come from the monotonic clock, and nothing is decided by a date."""
    for name, tree in modules():
        assert not {"time.time", "datetime", "datetime.datetime"} & set(imports(tree)), name
        calls = [ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)]
        assert not {"time.time", "time.time_ns", "datetime.now"} & set(calls), name


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
        yield name, ast.parse(path.read_text())


def imports(tree):
    """Full names of everything imported, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide layers"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_modules(tree):
    for name in imports(tree):
        rest = name.removeprefix("nvit_jax.") if name.startswith("nvit_jax.") else ""
        while rest and rest not in LAYER:
            rest = rest.rpartition(".")[0]
        if rest:
            yield rest


def test_imports_go_down_only():
    found = {name: tree for name, tree in modules() if name != "__init__"}
    assert set(found) == set(LAYER), "the layers of this test and the modules of the package differ"
    for name, tree in found.items():
        for other in own_modules(tree):
            assert LAYER[other] < LAYER[name], f"{name} (layer {LAYER[name]}) imports {other} (layer {LAYER[other]})"


def test_only_models_and_teachers_import_linen():
    found = [name for name, tree in modules() if any(i.startswith("flax") for i in imports(tree))]
    assert found == ["layers", "models", "teachers"]


def test_ranking_is_numpy_only():
    tree = dict(modules())["ranking"]
    assert not any(i.split(".")[0] in ("jax", "flax", "optax") for i in imports(tree))
    assert not any(i.split(".")[0] in ("jax", "flax", "optax") for i in imports(dict(modules())["nvit"]))


def test_functions_take_key():
    for name, tree in modules():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                arguments = [a.arg for a in node.args.args + node.args.kwonlyargs]
                assert "rng_key" not in arguments, f"{name}.{node.name}: say `key`, as JAX does"


def test_everything_exported_exists_and_is_documented():
    for name in nvit_jax.__all__:
        value = getattr(nvit_jax, name)
        assert name == "__version__" or inspect.getdoc(value), name

"""The architecture as a test: imports go one way, and conventions hold."""

import ast
import inspect
import pathlib

import nvit_jax

PACKAGE = pathlib.Path(nvit_jax.__file__).parent
# A module imports from its own wing and from those before it. The ground, five files, is open to everybody.
GROUND = ("errors", "paths", "schema", "parallel", "files")
WINGS = ("model", "training", "data", "latency", "pruning", "formats", "api", "run")


def modules():
    """(name, syntax tree) of every module: "model.dims"; a package's own file goes by the package's name."""
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        yield name.removesuffix(".__init__"), ast.parse(path.read_text())


def imports(tree):
    """Full names of everything imported, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide wings"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_modules(tree, known):
    """The modules of this package that are imported."""
    for name in imports(tree):
        rest = name.removeprefix("nvit_jax.") if name.startswith("nvit_jax.") else ""
        while rest and rest not in known:
            rest = rest.rpartition(".")[0]
        if rest:
            yield rest


def floor(name):
    """0 for the ground, then a number for each wing."""
    first = name.split(".")[0]
    return 0 if first in GROUND else 1 + WINGS.index(first)


def test_every_module_lies_in_a_wing_and_imports_go_down_only():
    found = {name: tree for name, tree in modules() if name != "__init__"}
    assert {name.split(".")[0] for name in found} == {*GROUND, *WINGS}
    for name, tree in found.items():
        for other in own_modules(tree, found):
            assert floor(other) <= floor(name), f"{name} imports {other}, which lies above it"


def test_no_module_imports_itself_by_a_detour():
    """Within a wing, too, imports go one way."""
    found = {name: tree for name, tree in modules() if name != "__init__"}
    edges = {name: set(own_modules(tree, found)) - {name} for name, tree in found.items()}
    done: set[str] = set()

    def visit(name, path):
        assert name not in path, " -> ".join([*path, name])
        if name not in done:
            for other in sorted(edges[name]):
                visit(other, [*path, name])
            done.add(name)

    for name in found:
        visit(name, [])


def test_no_logic_reads_the_wall_clock():
    """Clocks jump: durations come from the monotonic clock, and nothing is decided by a date."""
    for name, tree in modules():
        assert not {"time.time", "datetime", "datetime.datetime"} & set(imports(tree)), name
        calls = [ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)]
        assert not {"time.time", "time.time_ns", "datetime.now"} & set(calls), name


def test_only_the_models_import_linen():
    found = [name for name, tree in modules() if any(i.startswith("flax") for i in imports(tree))]
    assert found == ["model.layers", "model.regnet", "model.vit"]


def test_ranking_is_numpy_only():
    found = dict(modules())
    for name in ("ranking", "released", "allocation"):
        assert not any(i.split(".")[0] in ("jax", "flax", "optax") for i in imports(found[f"pruning.{name}"])), name


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

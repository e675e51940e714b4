"""What a stage promises: check, then begin, then swap; only one's own files; inputs count like keys; what is kept."""

import importlib.util
import json
import os
import pathlib
import shutil

import numpy as np
import pytest
from conftest import ROOT, call, random_params, read, small_dims

import nvit_jax
from nvit_jax import UserError
from nvit_jax.formats.convert import convert_checkpoint
from nvit_jax.formats.export import export_model
from nvit_jax.run import runner
from nvit_jax.run.config import STAGES
from nvit_jax.run.stages import measure
from nvit_jax.run.workdir import STOP, StageDir, recover

COMPARE = "--config.compare=('magnitude',)"
MADE = ("pretrain", "latency", "prune", "finetune", "eval", "report")  # by the fixture


@pytest.fixture
def workdir(finished, tmp_path) -> pathlib.Path:
    """A finished one of the test's own."""
    shutil.copytree(finished, tmp_path / "W", symlinks=True)
    return tmp_path / "W"


def snapshot(root: pathlib.Path) -> dict[str, bytes | str]:
    """Every file and link with its content, every empty directory."""
    found: dict[str, bytes | str] = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if path.is_symlink():
            found[name] = str(path.readlink())
        elif path.is_file():
            found[name] = path.read_bytes()
        elif not any(path.iterdir()):
            found[name] = "empty directory"
    return found


def refused(capsys, *arguments, words: str, **options) -> None:
    """One line with these words, exit code 2."""
    capsys.readouterr()
    assert call(*arguments, **options) == 2
    error = capsys.readouterr().err.strip()
    assert words in error and error.startswith("error: ") and len(error.splitlines()) == 1, error


@pytest.fixture
def quick(monkeypatch, finished):
    """Stages that copy what the real ones have made; `quick` tells who worked, in order. One in `fails` fails."""
    worked: list[str] = []
    fails: set[str] = set()

    def work(run):
        name, source = run.stage.name, finished / run.stage.name
        compared = run.workdir.parent.name == "compare"
        worked.append(f"compare/{run.workdir.name}/{name}" if compared else name)
        if name in ("pretrain", "prune", "finetune"):
            (run.stage.path / "log.jsonl").write_text("{}\n")
        if name in fails:
            raise UserError(f"{name} fails")
        if source.is_dir():
            ignore = shutil.ignore_patterns("stage.json", "metrics.json")
            shutil.copytree(source, run.stage.path, ignore=ignore, dirs_exist_ok=True)
        if name in ("report", "preview"):
            (run.workdir / f"{name}.html").write_text("<title>nvit_jax</title>")
        metrics = source / "metrics.json"
        return (read(metrics) if metrics.exists() else {}) | {"made": len(worked)}

    for name in STAGES:
        monkeypatch.setitem(runner.FUNCTIONS, name, work)
    work.worked, work.fails = worked, fails
    return work


# ----------------------------------------------------------------------------------- check, then begin, then swap

MISTAKES = [
    (["--config.data.name=imagenet"], 'is not "digits"'),
    (["--config.prune.target.macs_ratio=0.01"], "smallest reachable is"),
    (["--config.prune.target.macs_ratio=None"], "set at least one of"),
    (["--config.prune.floors.embed=32", "--config.prune.target.params_ratio=0.3"], "smallest reachable is"),
    (["--config.prune.kinds=('heads',)"], "unknown kind 'heads'"),
    (["--config.prune.protected=(7,)"], "there is no block 7"),
    (["--config.prune.criterion=fisher", "--config.prune.score.loss=kl"], "where the KL has no gradient"),
    ([COMPARE.replace("magnitude", "fisher"), "--config.prune.score.loss=kl"], "where the KL has no gradient"),
    (["--config.prune.score.batch=4096"], "larger than the split"),
    (["--config.finetune.batch=6"], "does not divide over 4 devices"),
    (["--config.finetune.epochs=0.001"], "is not one step"),
    (["--config.finetune.teacher=/nowhere", "--config.finetune.teacher_alpha=0.5"], "it does not exist"),
    (["--config.finetune.snapshot=0.5"], "finetune.snapshot=0.5"),
    (["--config.pretrain.start=/nowhere"], "it does not exist"),
    (["--config.model=/nowhere"], "it does not exist"),
    (["--config.latency.table=/nowhere/table.json"], "is missing"),
    (["--config.vit.classes=5"], "the model has 5 classes, the data 10"),
    (["--config.augment.crop=0.5"], "images of 0..255 are needed"),
    (["--config.stages=()"], "config.stages=()"),
    (["--stage=export", "--config.export.formats=()"], "nothing to write"),
    (["--config.parallel=pmap", "--config.augment.mixup=0.8"], "pmap mixes within devices"),
]


@pytest.mark.parametrize(("arguments", "words"), MISTAKES)
def test_forced_mistakes_leave_everything_as_it_was(finished, tmp_path, capsys, quick, arguments, words):
    shutil.copytree(finished, tmp_path / "W", symlinks=True)
    before = snapshot(tmp_path / "W")
    refused(capsys, "--workdir", tmp_path / "W", "--force", *arguments, words=words)
    assert snapshot(tmp_path / "W") == before and not quick.worked


def test_a_damaged_teacher_or_table_is_found_before_the_first_stage(finished, workdir, capsys, tmp_path, quick):
    teacher = tmp_path / "teacher"
    shutil.copytree(finished / "pretrain" / "model", teacher)
    for file in (teacher / "params").rglob("*"):
        if file.is_file() and file.stat().st_size > 1000:
            file.write_bytes(file.read_bytes()[:100])
    keys = (f"--config.finetune.teacher={teacher}", "--config.finetune.teacher_alpha=0.5")
    before = snapshot(workdir)
    refused(capsys, "--workdir", workdir, "--force", *keys, words="is damaged")
    (tmp_path / "table.json").write_text("{}")
    key = f"--config.latency.table={tmp_path / 'table.json'}"
    refused(capsys, "--workdir", workdir, "--force", "--stage=prune", key, words="is not what a latency stage writes")
    assert snapshot(workdir) == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config.stages=('pretrain','eval')", "--config.data.name=folder", "FOLDER"], "the data has no test split"),
        (["--config.stages=('pretrain','export')", "--config.export.formats=('onnx',)"], "needs pip install"),
        (["--config.stages=('pretrain','prune')", "--config.prune.target.params_ratio=0.01"], "smallest reachable is"),
        (["--config.stages=('pretrain','prune')", "--config.prune.target.latency_ratio=0.5"], "needs a latency model"),
        (["--config.stages=('pretrain','finetune')"], "run --stage prune first"),
        (["--config.stages=('pretrain','report')"], "run --stage eval first"),
        (["--config.stages=('preview','pretrain')", "--config.pretrain.batch=4096"], "larger than the split"),
    ],
)
def test_a_mistake_in_the_last_stage_is_found_before_the_first(tmp_path, capsys, quick, monkeypatch, arguments, words):
    from PIL import Image

    for split in ("train", "val"):
        for number in range(70):
            place = tmp_path / "images" / split / f"class{number % 2}" / f"{number}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((8, 8, 3), number, np.uint8)).save(place)
    folder = [f"--config.data.path={tmp_path / 'images'}", "--config.vit.classes=2", "--config.vit.channels=3"]
    arguments = [a for argument in arguments for a in (folder if argument == "FOLDER" else [argument])]
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else find(name))
    refused(capsys, "--workdir", tmp_path / "W", *arguments, words=words)
    assert [path.name for path in (tmp_path / "W").iterdir()] == [".lock"] and not quick.worked


def test_a_config_without_a_target_evaluates_nothing(finished, tmp_path, capsys, quick):
    keys = (f"--config.model={finished / 'pretrain' / 'model'}", "--config.data.name=digits")
    checkpoint = str(ROOT / "configs" / "checkpoint.py")
    refused(capsys, "--workdir", tmp_path / "W", *keys, config=checkpoint, words="set at least one of")
    assert not quick.worked and not (tmp_path / "W" / "eval").exists()


def test_changed_keys_of_the_last_stage_are_refused_before_the_first(workdir, capsys, quick):
    before = snapshot(workdir)
    keys = ("--config.stages=('preview','finetune')", "--config.finetune.epochs=3")
    refused(capsys, "--workdir", workdir, *keys, words="finetune.epochs: 2.0 -> 3.0")
    assert snapshot(workdir) == before and not quick.worked


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_is_done_anew_beside_the_old_one(workdir, capsys, quick, name):
    """Which stays as it is when the new one fails, and until it is whole; only then later stages are stale."""
    command = ("--workdir", workdir, "--stage", name)
    assert call(*command) == 0  # export and preview, for the first time
    before = snapshot(workdir)
    later = [s for s in STAGES[STAGES.index(name) + 1 :] if (workdir / s).exists()]
    quick.fails.add(name)
    refused(capsys, *command, "--force", words=f"{name} fails")
    after = snapshot(workdir)
    assert {k: v for k, v in after.items() if not k.startswith(".new/")} == before
    assert read(workdir / ".new" / name / "stage.json")["status"] == "running"
    assert all(read(workdir / s / "stage.json")["status"] == "done" for s in (name, *later))
    quick.fails.clear()
    old = read(workdir / name / "stage.json")["id"]
    assert call(*command, "--force") == 0
    assert not (workdir / ".new").exists() and not (workdir / ".old").exists()
    record = read(workdir / name / "stage.json")
    assert record["id"] != old and record["status"] == "done"
    assert all(read(workdir / s / "stage.json")["status"] == "stale" for s in later)


def test_what_was_begun_anew_goes_on_without_force(workdir, capsys, quick):
    """And with it begins once more; with the old keys the old one counts, and the new one waits."""
    command = ("--workdir", workdir, "--stage=pretrain")
    quick.fails.add("pretrain")
    refused(capsys, *command, "--force", "--config.pretrain.epochs=3", words="pretrain fails")
    state = workdir / ".new" / "pretrain" / "state" / "7"
    state.mkdir(parents=True)
    (state / "x").write_text("saved")
    begun = read(workdir / ".new" / "pretrain" / "stage.json")["id"]
    assert call(*command) == 0
    out = capsys.readouterr().out
    assert "finished before" in out and "waits in" in out
    refused(
        capsys,
        *command,
        "--config.pretrain.epochs=4",
        words="begun with other config keys (pretrain.epochs: 3.0 -> 4.0)",
    )
    refused(capsys, *command, "--config.pretrain.epochs=3", words="pretrain fails")
    assert read(workdir / ".new" / "pretrain" / "stage.json")["id"] == begun and (state / "x").exists()
    refused(capsys, *command, "--force", "--config.pretrain.epochs=3", words="pretrain fails")
    assert read(workdir / ".new" / "pretrain" / "stage.json")["id"] != begun and not state.exists()
    quick.fails.clear()
    assert read(workdir / "config.json")["config"]["pretrain.epochs"] == 2  # of the one that stands
    assert call(*command, "--config.pretrain.epochs=3") == 0
    assert read(workdir / "pretrain" / "stage.json")["keys"]["pretrain.epochs"] == 3
    assert read(workdir / "config.json")["config"]["pretrain.epochs"] == 3
    assert not (workdir / ".new").exists()


@pytest.mark.parametrize("killed_after", range(4))
def test_a_kill_while_the_new_one_takes_its_place(workdir, quick, monkeypatch, killed_after):
    """After the new one is done, after each of the two renames, and while the old one is cleared away."""
    (workdir / "prune" / "notes.txt").write_text("mine")
    moved, replace = [], os.replace

    class Killed(BaseException):
        pass

    def dies(source, target):
        if pathlib.Path(source).name in ("prune", "notes.txt"):
            if len(moved) == killed_after:
                raise Killed
            moved.append(source)
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dies)
        if killed_after < 3:
            with pytest.raises(Killed):
                call("--workdir", workdir, "--stage=prune", "--force")
        else:
            assert call("--workdir", workdir, "--stage=prune", "--force") == 0
    recover([workdir])
    assert read(workdir / "prune" / "metrics.json")["made"] == 1
    assert (workdir / "prune" / "notes.txt").read_text() == "mine"
    assert read(workdir / "finetune" / "stage.json")["status"] == "stale"
    assert nvit_jax.load_model(workdir / "prune" / "model").dims
    assert not (workdir / ".new").exists() and not (workdir / ".old").exists()


def test_a_linked_stage_is_not_done_anew(workdir, capsys, quick):
    """It belongs to another workdir."""
    before = snapshot(workdir)
    place = workdir / "compare" / "magnitude"
    refused(capsys, "--workdir", place, "--stage=pretrain", "--force", words="is a link to")
    assert snapshot(workdir) == before


# ------------------------------------------------------------------------------------------ only one's own files


def test_every_file_of_a_stage_is_declared(finished):
    """What is not would be taken for the user's."""
    for place in [finished / name for name in MADE] + [finished / "compare" / "magnitude" / "prune"]:
        there = {str(file.relative_to(place)) for file in place.rglob("*") if file.is_file()}
        assert there - {"stage.json"} == set(read(place / "stage.json")["files"]), place


def test_files_of_the_user_survive_every_command(workdir, capsys, quick):
    """In each stage's directory, inside of a model, in a directory of its own; with --force, and when a stage fails."""
    mine = {}
    call("--workdir", workdir, "--config.stages=('export','preview')")
    for name in STAGES:
        for file in ("notes.txt", "mine/deep/notes.txt", "model/notes.txt", "tensorboard/notes.txt", "log.jsonl.kept"):
            if (workdir / name / file).parent.exists() or file.startswith("mine"):
                mine[f"{name}/{file}"] = f"{name} {file}"
    (workdir / "prune" / "link").symlink_to(workdir / "pretrain" / "model")
    for file, text in mine.items():
        (workdir / file).parent.mkdir(parents=True, exist_ok=True)
        (workdir / file).write_text(text)

    def there() -> bool:
        assert {file: (workdir / file).read_text() for file in mine} == mine
        return (workdir / "prune" / "link").is_symlink()

    everything = f"--config.stages={STAGES}"
    for arguments in (
        [],
        ["--force"],
        [COMPARE],
        ["--force", COMPARE],
        [everything, "--force"],
        ["--stage=eval", "--force"],
    ):
        assert call("--workdir", workdir, *arguments) == 0 and there()
    for name in STAGES:
        quick.fails.add(name)
        refused(capsys, "--workdir", workdir, "--stage", name, "--force", words=f"{name} fails")
        assert there()
        refused(capsys, "--workdir", workdir, "--stage", name, "--force", words=f"{name} fails")
        quick.fails.clear()
        assert call("--workdir", workdir, "--stage", name, "--force") == 0 and there()


def test_files_of_the_user_survive_a_first_run(tmp_path, capsys, quick):
    for name in STAGES:
        (tmp_path / name).mkdir()
        (tmp_path / name / "notes.txt").write_text(name)
    quick.fails.add("pretrain")
    for arguments in ([], ["--force"]):
        refused(capsys, "--workdir", tmp_path, *arguments, words="pretrain fails")
    quick.fails.clear()
    assert call("--workdir", tmp_path, f"--config.stages={STAGES}") == 0
    assert all((tmp_path / name / "notes.txt").read_text() == name for name in STAGES)


@pytest.mark.parametrize("force", [[], ["--force"]])
def test_what_no_stage_has_written_is_not_replaced(workdir, capsys, quick, force):
    """A missing stage.json is no licence to delete a model; nor is a page of another's, or another's stage.json."""
    (workdir / "pretrain" / "stage.json").unlink()
    before = snapshot(workdir)
    refused(capsys, "--workdir", workdir, "--stage=pretrain", *force, words="which this stage did not write")
    (workdir / "eval" / "stage.json").write_text("{}")
    refused(capsys, "--workdir", workdir, "--stage=eval", *force, words="is not what a stage writes")
    (workdir / "eval" / "stage.json").write_bytes(before["eval/stage.json"])
    assert snapshot(workdir) == before
    for name in ("preview.html", "summary.json", "config.json"):
        other = workdir.parent / f"of {name}"
        other.mkdir()
        (other / name).write_text('{"mine": 1}')
        stage = "preview" if name == "preview.html" else "eval"
        model = f"--config.model={workdir / 'finetune' / 'model'}"
        refused(capsys, "--workdir", other, "--stage", stage, model, *force, words=f"{name} was not written by this")
        assert (other / name).read_text() == '{"mine": 1}'
    assert not quick.worked


def test_a_file_that_took_an_own_name_is_kept_beside(workdir, quick):
    record = read(workdir / "eval" / "stage.json")
    record["files"] = [file for file in record["files"] if file != "scores.json"]  # as if the user had put it there
    (workdir / "eval" / "stage.json").write_text(json.dumps(record))
    (workdir / "eval" / "scores.json").write_text("mine")
    assert call("--workdir", workdir, "--stage=eval", "--force") == 0
    assert (workdir / "eval" / "scores.json.kept").read_text() == "mine"
    assert (workdir / "eval" / "scores.json").read_text() != "mine"


def test_a_workdir_of_before_there_was_a_list(workdir, quick):
    """Of 0.6.0: what a stage would write counts as its own."""
    for name in MADE:
        record = read(workdir / name / "stage.json")
        del record["files"]
        (workdir / name / "stage.json").write_text(json.dumps(record))
    (workdir / "prune" / "notes.txt").write_text("mine")
    (workdir / "prune" / "model" / "notes.txt").write_text("mine")
    assert call("--workdir", workdir) == 0 and not quick.worked
    assert call("--workdir", workdir, "--stage=prune", "--force") == 0
    assert (workdir / "prune" / "notes.txt").exists() and (workdir / "prune" / "model" / "notes.txt").exists()
    assert not list(workdir.rglob("*.kept*")) and "files" in read(workdir / "prune" / "stage.json")


# ------------------------------------------------------------------------------------------- inputs like keys


def of_files(tmp_path, finished) -> dict[str, tuple[str, pathlib.Path, str]]:
    """{key: (stage that reads it, its own copy, a file of it)}"""
    (tmp_path / "classes.tsv").write_text("\n".join(f"{i}" for i in range(10)))
    shutil.copytree(finished / "pretrain" / "model", tmp_path / "model")
    shutil.copytree(finished / "pretrain" / "model", tmp_path / "teacher")
    shutil.copyfile(finished / "latency" / "table.json", tmp_path / "table.json")
    return {
        "data.classes": ("pretrain", tmp_path / "classes.tsv", ""),
        "pretrain.start": ("pretrain", tmp_path / "model", "model.json"),
        "latency.table": ("prune", tmp_path / "table.json", ""),
        "prune.teacher": ("prune", tmp_path / "teacher", "model.json"),
        "finetune.teacher": ("finetune", tmp_path / "teacher", "model.json"),
    }


@pytest.mark.parametrize("was", ["begun", "finished"])
@pytest.mark.parametrize(
    "key", ["data.classes", "pretrain.start", "latency.table", "prune.teacher", "finetune.teacher"]
)
def test_a_changed_file_is_refused_by_name(finished, workdir, tmp_path, capsys, quick, monkeypatch, key, was):
    """Another spelling of its path is not, nor is a copy of it, nor what else lies in a model directory."""
    name, path, inner = of_files(tmp_path, finished)[key]
    alpha = [f"--config.{key}_alpha=0.5"] if key.endswith("teacher") else []

    def command(given) -> list[str]:
        return ["--workdir", str(workdir), "--stage", name, f"--config.{key}={given}", *alpha]

    if was == "begun":
        quick.fails.add(name)
        shutil.rmtree(workdir / name)
        refused(capsys, *command(path), words=f"{name} fails")
        (workdir / name / "state" / "7").mkdir(parents=True)
        (workdir / name / "state" / "7" / "x").write_text("saved")
    else:
        assert call(*command(path), "--force") == 0
    copy = path.with_name(f"copy_of_{path.name}")
    shutil.copytree(path, copy) if path.is_dir() else shutil.copyfile(path, copy)
    if inner:
        (path / "notes.txt").write_text("mine")
    monkeypatch.chdir(tmp_path)
    for given in (path, copy, f"./{path.name}"):
        quick.worked.clear()
        assert call(*command(given)) == (2 if was == "begun" else 0)
        assert quick.worked == ([name] if was == "begun" else [])
    file = path / inner if inner else path
    file.write_text(file.read_text().replace("1", "1 ", 1) if not inner else file.read_text() + "\n")
    before = snapshot(workdir)
    words = f"config.{key}: the content of {path} has changed since this stage was {was}"
    refused(capsys, *command(path), words=words)
    assert snapshot(workdir) == before
    quick.fails.clear()
    assert call(*command(path), "--force") == 0
    assert not (workdir / name / "state").exists()


def test_an_earlier_stage_done_anew_is_said_in_a_line(workdir, capsys, quick):
    """Its successors are done anew: finished ones, stale ones, begun ones."""
    (workdir / "finetune" / "stage.json").write_text(
        json.dumps(read(workdir / "finetune" / "stage.json") | {"status": "running"})
    )
    (workdir / "finetune" / "state" / "7").mkdir(parents=True)
    (workdir / "finetune" / "state" / "7" / "x").write_text("saved")
    assert call("--workdir", workdir, "--stage=prune", "--force") == 0
    assert (workdir / "finetune" / "state" / "7" / "x").exists()
    assert call("--workdir", workdir) == 0
    out = capsys.readouterr().out
    assert "[finetune] begun anew, since prune changed" in out and "[eval] done anew, since" in out
    assert quick.worked == ["prune", "finetune", "eval", "report"]
    assert not (workdir / "finetune" / "state").exists()
    for name, status in (("prune", "done"), ("finetune", "done"), ("eval", "done")):
        assert read(workdir / name / "stage.json")["status"] == status


# --------------------------------------------------------------------------------------------- what is kept


def test_an_interrupted_eval_keeps_its_scores(finished, workdir, tmp_path, capsys, monkeypatch):
    """Those of earlier ones, too, and those of a redo for a new model; --force finds all anew."""
    evaluate, seen = measure.evaluate, []

    def counted(model, *arguments, **options):
        seen.append(model)
        if len(seen) == stop_at:
            STOP.received = True
        return evaluate(model, *arguments, **options)

    monkeypatch.setattr(measure, "evaluate", counted)
    command = ("--workdir", workdir, "--stage=eval")
    shutil.rmtree(workdir / "eval")
    stop_at = 2
    assert call(*command) == 143
    scores = read(workdir / "eval" / "scores.json")
    assert list(scores) == ["dense"] and len(seen) == 2
    stop_at, before = 0, len(seen)
    assert call(*command) == 0 and len(seen) == before + 2
    known = read(workdir / "eval" / "scores.json")
    assert list(known) == ["dense", "pruned", "finetuned"] and known["dense"] == scores["dense"]
    # A new model: the scores of the others hold; an interrupted redo leaves the old evaluation as it is.
    record = read(workdir / "finetune" / "stage.json")
    (workdir / "finetune" / "stage.json").write_text(json.dumps(record | {"id": "another"}))
    old, stop_at, before = snapshot(workdir / "eval"), len(seen) + 1, len(seen)
    assert call(*command) == 143 and len(seen) == before + 1
    assert snapshot(workdir / "eval") == old
    assert set(read(workdir / ".new" / "eval" / "scores.json")) == {"dense", "pruned", "finetuned"}
    stop_at, before = 0, len(seen)
    assert call(*command) == 0 and len(seen) == before + 1
    assert "done anew, since finetune changed" in capsys.readouterr().out
    before = len(seen)
    assert call(*command, "--force") == 0 and len(seen) == before + 3


def test_compare_runs_once_and_before_the_report(workdir, quick):
    stages = "--config.stages=('eval','prune','eval','finetune','eval','report')"
    assert call("--workdir", workdir, COMPARE, stages, "--force") == 0
    assert quick.worked[:5] == ["eval", "prune", "eval", "finetune", "eval"]
    assert quick.worked[5:] == [*(f"compare/magnitude/{name}" for name in ("prune", "finetune", "eval")), "report"]
    quick.worked.clear()
    assert call("--workdir", workdir, COMPARE, "--stage=report", "--force") == 0 and quick.worked == ["report"]
    quick.worked.clear()
    assert call("--workdir", workdir, COMPARE, "--stage=eval", "--force") == 0 and quick.worked == ["eval"]


def test_a_stage_begun_with_nothing_to_go_on_from_begins_again(tmp_path):
    """Silently, with other keys and inputs, too; what was logged goes."""
    keys = {"pretrain.epochs": 1.0}
    stage = StageDir(tmp_path, "pretrain")
    assert stage.begin(keys, {}, force=False)
    stage.log(1, {"loss": 1.0})
    stage.close()
    first = stage.id()
    again = StageDir(tmp_path, "pretrain")
    assert again.begin({"pretrain.epochs": 2.0}, {"data.classes": "x"}, force=False)
    assert not (tmp_path / "pretrain" / "log.jsonl").exists() and again.id() != first
    (tmp_path / "pretrain" / "state" / "5").mkdir(parents=True)
    (tmp_path / "pretrain" / "state" / "5" / "x").write_text("saved")
    with pytest.raises(UserError, match="begun with other config keys"):
        StageDir(tmp_path, "pretrain").begin(keys, {"data.classes": "x"}, force=False)
    assert StageDir(tmp_path, "pretrain").begin(keys, {"data.classes": "x"}, force=True)
    assert not (tmp_path / "pretrain" / "state").exists()


# --------------------------------------------------------------------------------------------- model directories


def a_model(seed: int) -> nvit_jax.Model:
    dims = small_dims()
    return nvit_jax.Model(dims, random_params(dims, seed, np.float32))


def test_save_model_replaces_models_alone(tmp_path):
    place = tmp_path / "model"
    nvit_jax.save_model(place, a_model(1))
    (place / "notes.txt").write_text("mine")
    (place / "mine").mkdir()
    (place / "mine" / "deep.txt").write_text("mine")
    nvit_jax.save_model(place, a_model(2))
    assert (place / "notes.txt").read_text() == (place / "mine" / "deep.txt").read_text() == "mine"
    new = a_model(2).params["block_0"]["fc1"]["kernel"]
    np.testing.assert_array_equal(nvit_jax.load_model(place).params["block_0"]["fc1"]["kernel"], new)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    # Not a directory of other things, not a file; an empty directory is fine, and a link to a model leads there.
    (tmp_path / "thesis").mkdir()
    nvit_jax.save_model(tmp_path / "thesis", a_model(1))
    shutil.rmtree(tmp_path / "thesis")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for path, words in ((tmp_path / "thesis", "chapter1.tex"), (tmp_path / "file", "is a file")):
        with pytest.raises(UserError, match=words) as caught:
            nvit_jax.save_model(path, a_model(1))
        assert len(str(caught.value).splitlines()) == 1
    assert (tmp_path / "thesis" / "chapter1.tex").read_text() == (tmp_path / "file").read_text() == "mine"
    (tmp_path / "link").symlink_to(place)
    nvit_jax.save_model(tmp_path / "link", a_model(3))
    assert (tmp_path / "link").is_symlink() and (place / "notes.txt").exists()


def test_convert_overwrites_models_alone(finished, tmp_path):
    model = nvit_jax.load_model(finished / "finetune" / "model")
    export_model(model, tmp_path, ("safetensors",), ("float32",), lambda text: None)
    source = tmp_path / "safetensors" / "model.safetensors"
    content = source.read_bytes()
    silent = {"say": lambda text: None}
    for out, words in ((source.parent, "holds README.md"), (source, "is a file"), (tmp_path, "safetensors")):
        with pytest.raises(UserError, match=words):
            convert_checkpoint(source, out, overwrite=True, **silent)
    out = tmp_path / "out"
    convert_checkpoint(source, out, **silent)
    with pytest.raises(UserError, match="--overwrite replaces it"):
        convert_checkpoint(source, out, **silent)
    inside = out / "model.safetensors"  # the source in the directory that is replaced
    shutil.copyfile(source, inside)
    convert_checkpoint(inside, out, overwrite=True, **silent)
    assert inside.read_bytes() == source.read_bytes() == content
    assert nvit_jax.load_model(out).dims == model.dims

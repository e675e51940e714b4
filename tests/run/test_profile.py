"""--config.profile=STEPS: a trace of some training steps."""

import gzip
import json

import jax
import jax.numpy as jnp
from conftest import call, read

from nvit_jax.training.trace import Trace


def test_a_stage_traces_so_many_steps_and_no_more(tmp_path, capsys):
    words = ["--workdir", tmp_path / "W", "--stage", "pretrain", "--config.pretrain.epochs=0.5"]
    assert call(*words, "--config.profile=2") == 0
    assert "[pretrain] trace of the training steps: " in capsys.readouterr().out
    place = tmp_path / "W" / "pretrain"
    (trace,) = (place / "profile").rglob("perfetto_trace.json.gz")
    assert list((place / "profile").rglob("*.xplane.pb"))  # what TensorBoard reads
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    steps = {event["args"]["step_num"] for event in events if "step_num" in event.get("args", {})}
    assert {int(step) for step in steps} == {3, 4}
    assert str(trace.relative_to(place)) in read(place / "stage.json")["files"]
    assert call(*words) == 0  # how a stage is watched does not make it another one
    assert "finished before" in capsys.readouterr().out


def test_a_loop_that_ends_early_leaves_what_was_traced(tmp_path):
    step, x = jax.jit(lambda x: x + 1), jnp.zeros(3)
    trace = Trace(tmp_path, 100)
    assert not any(trace.step(step(x)) for _ in range(4))
    assert trace.close() and list(tmp_path.rglob("perfetto_trace.json.gz"))
    assert not trace.close() and not Trace(tmp_path, 1).close()  # nothing was begun

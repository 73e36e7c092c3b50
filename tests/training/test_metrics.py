"""What a run writes: one step late, whole after a kill, and not past a divergence."""

import json
import logging
import sys
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event, SessionLog

from jaxgen.training import metrics
from jaxgen.training.lines import Means, keep_until
from jaxgen.training.metrics import TIMES, Diverged, Log, Profiler
from jaxgen.types import UserError

H100 = SimpleNamespace(device_kind="NVIDIA H100 80GB HBM3")


def open_log(folder, total=20, first=0, **options: Any):
    quiet: dict[str, Any] = {"tensorboard": False, "progress": False, "devices": jax.devices()[:1]}
    return Log(
        folder,
        total,
        first,
        **{"batch_size": 4, "flops": 10**9, "needed": 8 * 10**8} | quiet | options,
    )


def loss(step):
    return 1 / 3 + np.sin(step)


def run(folder, first, last, resumed=None, **options):
    """Steps first + 1 to last, and what a checkpoint would keep of the log."""
    with open_log(folder, first=first, resumed=resumed, every=5, **options) as log:
        for step in range(first + 1, last + 1):
            # A scalar that not every step has, and one that is no mean.
            some = {"some": step / 7} if step % 3 == 0 else {}
            log.add(step, {"loss": loss(step), "learning_rate": step / 10} | some)
        with log.paused():
            return json.loads(json.dumps(log.state()))


def read(folder):
    return [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]


def untimed(folder):
    return [{k: v for k, v in values.items() if k not in TIMES} for values in read(folder)]


class Recorded:
    """A value on a device, which notes when it is read."""

    def __init__(self, step, events):
        self.step, self.events = step, events

    def __array__(self, dtype=None, copy=None):
        self.events.append(f"read {self.step}")
        return np.array(0.5, np.float32)


def test_metrics_are_read_one_step_late(tmp_path):
    events = []
    with open_log(tmp_path) as log:
        for step in range(1, 4):
            events.append(f"start {step}")
            log.add(step, {"loss": Recorded(step, events)})
        log.flush()
        events.append("checkpoint 3")
        log.flush()  # nothing is read twice
    assert events == [
        *("start 1", "start 2", "read 1", "start 3", "read 2", "read 3"),
        "checkpoint 3",
    ]


def test_a_line_holds_the_means_since_the_last_one(tmp_path):
    run(tmp_path, 0, 20)
    lines = untimed(tmp_path)
    assert [values["step"] for values in lines] == [5, 10, 15, 20]
    assert lines[1]["loss"] == pytest.approx(np.mean([loss(i) for i in range(6, 11)]))
    assert lines[1]["some"] == pytest.approx(np.mean([6, 9]) / 7)  # of the steps that had it
    assert lines[1]["learning_rate"] == 1.0


def test_the_last_step_is_in_the_file_whatever_the_interval(tmp_path):
    with open_log(tmp_path, total=7, every=5) as log:
        for step in range(1, 8):
            log.add(step, {"loss": loss(step)})
    assert [values["step"] for values in read(tmp_path)] == [5, 7]


@pytest.mark.parametrize("saved", [5, 7, 10, 13])
@pytest.mark.parametrize("torn", ["", '{"step": 15, "lo', '{"step"', "\0\0\0", "é".encode()[:1]])
def test_a_resumed_run_leaves_the_file_of_an_uninterrupted_one(tmp_path, saved, torn):
    run(tmp_path / "whole", 0, 20)
    state = run(tmp_path / "killed", 0, saved)
    run(tmp_path / "killed", saved, 14, state)  # further, but killed before another checkpoint
    with (tmp_path / "killed" / "metrics.jsonl").open("ab") as file:
        file.write(torn if isinstance(torn, bytes) else torn.encode())
    run(tmp_path / "killed", saved, 20, state)
    assert untimed(tmp_path / "killed") == untimed(tmp_path / "whole")
    assert [p.name for p in (tmp_path / "killed").iterdir()] == ["metrics.jsonl"]


def test_a_whole_line_without_its_end_is_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 5}\n[]\n12\n{"step": "x"}\n\n{"step": 10}')
    keep_until(path, 10)
    assert path.read_text() == '{"step": 5}\n{"step": 10}\n'


def test_a_failed_rewrite_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 5}\n{"step": 10}\n')

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(UserError, match=r"cannot write to .*: No space left on device"):
        open_log(tmp_path, first=5)
    assert path.read_text() == '{"step": 5}\n{"step": 10}\n'
    assert len([*tmp_path.iterdir()]) == 1


def test_sums_pass_through_json_to_the_bit():
    rng = np.random.default_rng(0)
    whole, parts = Means({}), Means({})
    for value in rng.standard_normal(100):
        whole.add({"loss": value})
        parts.add({"loss": value})
        parts = Means(json.loads(json.dumps(parts.state())))
    assert whole.take() == parts.take()


@pytest.mark.parametrize("writes", [True, False])
@pytest.mark.parametrize("name", ["loss", "grad_norm"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_divergence_names_its_step_in_every_process(tmp_path, writes, name, value):
    log = open_log(tmp_path, writes=writes, every=1)
    good = {"loss": jnp.float32(1), "grad_norm": jnp.float32(1)}
    for step in range(1, 13):
        log.add(step, good if step < 12 else good | {name: jnp.float32(value)})
    with pytest.raises(Diverged, match=f"{name} is {value} at step 12; the last good") as caught:
        log.flush()
    assert (caught.value.step, caught.value.name) == (12, name)
    assert "\n" not in str(caught.value)
    log.close()  # which raises no second time
    if writes:
        assert [values["step"] for values in read(tmp_path)] == [*range(1, 12)]


def test_a_divergence_is_seen_before_a_checkpoint(tmp_path):
    log, saved = open_log(tmp_path), False
    log.add(1, {"loss": jnp.float32(jnp.nan)})
    with pytest.raises(Diverged), log.paused():
        saved = True
    assert not saved


def test_an_error_is_not_hidden_by_what_is_pending(tmp_path):
    def stopped():
        with open_log(tmp_path) as log:
            log.add(1, {"loss": jnp.float32(jnp.nan)})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()


def test_another_metric_may_be_infinite_and_the_file_stays_json(tmp_path):
    with open_log(tmp_path, every=1) as log:
        log.add(1, {"loss": 1.0, "psnr": jnp.float32(jnp.inf), "low": jnp.bfloat16(0.5)})
    assert read(tmp_path) == [{"step": 1, "loss": 1.0, "psnr": None, "low": 0.5}]


@pytest.mark.parametrize(
    ("devices", "mfu"), [([H100], True), ([H100, *jax.devices()[:1]], False)], ids=str
)
def test_speed_leaves_out_the_first_step_and_pauses(tmp_path, monkeypatch, devices, mfu):
    clock = iter([100.0, 101.0, 200.0, 204.0])  # first step read; pause begins, ends; line written
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(clock))
    with open_log(tmp_path, total=3, devices=devices) as log:
        for step in range(1, 4):
            log.add(step, {"loss": 1.0})
            if step == 2:
                with log.paused():
                    pass
    (line,) = read(tmp_path)
    # Steps 2 and 3 of 4 images each, in 104 - 99 seconds.
    assert line["images_per_second"] == pytest.approx(2 * 4 / 5)
    assert line["flops_per_second"] == pytest.approx(2e9 / 5)
    assert ("mfu" in line) == mfu
    if mfu:
        assert line["mfu"] == pytest.approx(0.8 * 2e9 / 5 / 989e12)


def events_in(folder):
    """The events of every file, in the order they were begun."""
    for path in sorted(folder.glob("*tfevents*"), key=lambda p: p.stat().st_mtime_ns):
        data = path.read_bytes()
        while data:  # length, its checksum, the event, its checksum
            length = int.from_bytes(data[:8], "little")
            yield Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]


def test_tensorboard_holds_the_same_and_the_samples(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8)
    with open_log(tmp_path, tensorboard=True, every=5) as log:
        for step in range(1, 11):
            log.add(step, {"loss": loss(step)})
        log.images(10, "samples", picture)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "samples/00000010.png")), picture)

    values = [(e.step, v) for e in events_in(tmp_path / "tensorboard") for v in e.summary.value]
    scalars = {step: v.simple_value for step, v in values if v.tag == "loss"}
    assert scalars == pytest.approx({line["step"]: line["loss"] for line in read(tmp_path)})
    ((step, shown),) = [(step, v.image) for step, v in values if v.tag == "samples"]
    assert (step, shown.height, shown.width) == (10, 6, 9)
    assert shown.encoded_image_string.startswith(b"\x89PNG")


def test_tensorboard_forgets_what_came_after_the_checkpoint(tmp_path):
    for first in (0, 5):
        run(tmp_path, first, 10, tensorboard=True)
    files = [*(tmp_path / "tensorboard").iterdir()]
    assert len(files) == 2  # though both are of one second
    starts = [e.step for e in events_in(tmp_path / "tensorboard") if e.HasField("session_log")]
    assert sorted(starts) == [1, 6]
    assert SessionLog.START == 1  # which makes TensorBoard drop events from that step on


def test_without_tensorboardx_there_is_one_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with caplog.at_level(logging.WARNING):
        run(tmp_path, 0, 10, tensorboard=True)
    assert [record.name for record in caplog.records] == ["jaxgen.training.board"]
    assert len(read(tmp_path)) == 2


def test_other_processes_write_nothing(tmp_path):
    with open_log(tmp_path / "log", writes=False, tensorboard=True, progress=True, every=1) as log:
        log.add(1, {"loss": 1.0})
        log.images(1, "samples", np.zeros((4, 4, 3), np.uint8))
    assert not (tmp_path / "log").exists()


def test_a_folder_that_cannot_be_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write to .*file"):
        open_log(tmp_path / "file")


def test_the_bar_shows_loss_speed_and_time_left(tmp_path, capsys):
    with open_log(tmp_path, total=20, first=10, progress=True, every=5) as log:
        for step in range(11, 21):
            log.add(step, {"loss": 0.25})
    said = capsys.readouterr().err
    assert "loss=0.25" in said
    assert "images/s=" in said
    assert "20/20" in said


def test_the_profiler_traces_the_steps_it_was_asked_for(tmp_path, monkeypatch):
    events: list[object] = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda path: events.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: events.append("stop"))
    for first, count, begin in ((3, 2, 1), (0, 0, 1), (3, 2, 4), (5, 9, 1)):
        profiler = Profiler(tmp_path, first, count)
        for step in range(begin, 7):
            profiler.before(step, jnp.zeros(()))
            events.append(step)
        profiler.stop()
        profiler.stop()
        events.append("|")
    assert events == [
        *(1, 2, "start", 3, 4, "stop", 5, 6, "|"),
        *(1, 2, 3, 4, 5, 6, "|"),
        *("start", 4, "stop", 5, 6, "|"),
        *(1, 2, 3, 4, "start", 5, 6, "stop", "|"),
    ]


def test_a_trace_is_written(tmp_path):
    profiler = Profiler(tmp_path, 1, 1)
    profiler.before(1)
    done = jax.jit(lambda x: x @ x)(jnp.ones((8, 8)))
    profiler.before(2, done)
    assert [*tmp_path.glob("profile/**/*.xplane.pb")]

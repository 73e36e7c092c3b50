"""Checkpoints are whole or not there, whatever becomes of the disk, the process or the files."""

import errno
import os
import resource
import shutil
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxgen import sharding
from jaxgen.training import checkpoint
from jaxgen.training.checkpoint import Checkpoints
from jaxgen.types import UserError

FULL = 20_000  # bytes that a file may have on the disk that is full; a state has more


def state(step):
    """Of several arrays: where one cannot be written, others cannot either."""
    keys = jax.random.split(jax.random.key(step), 8)
    arrays = {str(i): jax.random.normal(key, (128, 128)) for i, key in enumerate(keys)}
    return {"step": jnp.int32(step), "learned": {"a": arrays}, "averaged": {}}


def like(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def record(step):
    return {"recipe": {"seed": step}, "log": {"loss": [0.1, 3]}, "data": {"sources": [1, 2]}}


def save(folder, *steps, keep=2):
    with Checkpoints(folder, keep) as checkpoints:
        for step in steps:
            checkpoints.save(step, state(step), record(step))


def assert_whole(folder, step):
    checkpoints = Checkpoints(folder, 2)
    assert checkpoints.record(step) == record(step)
    restored, expected = checkpoints.restore(step, like(state(step))), state(step)
    assert jax.tree.structure(restored) == jax.tree.structure(expected)
    for one, two in zip(jax.tree.leaves(restored), jax.tree.leaves(expected)):
        np.testing.assert_array_equal(one, two)


def names(folder):
    return sorted(p.name for p in folder.iterdir())


@pytest.fixture
def disk():
    """A disk that can be full: no file takes more than so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size or before[0], before[1]))

    yield limit
    limit(None)


def test_what_is_saved_is_read_and_the_last_are_kept(tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    assert Checkpoints(folder, 2).latest is None
    assert not folder.exists()  # who only looks makes nothing
    save(folder, 1, 2, 3)
    assert names(folder) == ["2", "3"]
    assert Checkpoints(folder, 2).latest == 3
    assert_whole(folder, 2)
    assert_whole(folder, 3)


def test_a_state_is_read_on_another_mesh(tmp_path):
    save(tmp_path, 1)
    where = NamedSharding(sharding.training_mesh(2, 4, 1), PartitionSpec("fsdp", "data"))
    wanted = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where if x.ndim else None),
        state(1),
    )
    restored = Checkpoints(tmp_path, 2).restore(1, wanted)
    assert restored["learned"]["a"]["0"].sharding == where
    np.testing.assert_array_equal(restored["learned"]["a"]["0"], state(1)["learned"]["a"]["0"])


def save_more(folder, keep, disk, told):
    """Saves where the disk is full."""
    with Checkpoints(folder, keep) as checkpoints:
        disk(FULL)
        checkpoints.save(2, state(2), record(2))
        if told == "at the next save":
            checkpoints.save(3, state(3), record(3))
        while told == "at a look":
            checkpoints.look()
            time.sleep(0.01)
        if told == "after another error":
            raise UserError("the loss is nan")


@pytest.mark.parametrize("keep", [1, 2])
@pytest.mark.parametrize("told", ["at the next save", "at a look", "at the end"])
def test_a_full_disk_is_told_and_loses_nothing(tmp_path, disk, keep, told, capfd):
    save(tmp_path, 1, keep=keep)
    with pytest.raises(UserError) as error:
        save_more(tmp_path, keep, disk, told)
    reason = "File too large; the checkpoint of step 1 is whole"
    assert str(error.value) == f"cannot save step 2 in {tmp_path}: {reason}"
    assert names(tmp_path) == ["1"]  # no half of one takes the room that there is not
    assert_whole(tmp_path, 1)
    assert capfd.readouterr().err == ""  # of eight arrays that failed

    disk(None)
    save(tmp_path, 2, 3, keep=2)
    assert_whole(tmp_path, 3)


def test_another_error_is_told_before_a_full_disk(tmp_path, disk, caplog):
    with pytest.raises(UserError, match="the loss is nan"):
        save_more(tmp_path, 2, disk, "after another error")
    assert "cannot save step 2" in caplog.text
    assert names(tmp_path) == []


def test_an_error_on_the_way_waits_for_what_is_being_written(tmp_path, disk):
    with pytest.raises(UserError, match="the loss is nan"):
        save_more(tmp_path, 2, lambda size: None, "after another error")
    assert_whole(tmp_path, 2)


@pytest.mark.parametrize("told", ["at the next save", "at the end"])
def test_nothing_is_left_running(tmp_path, disk, told):
    before = set(threading.enumerate())
    with pytest.raises(UserError):
        save_more(tmp_path, 2, disk, told)
    deadline = time.monotonic() + 10
    while set(threading.enumerate()) - before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert set(threading.enumerate()) <= before


def test_tensorstore_s_number_of_an_error_is_found():
    long = ValueError(
        'RESOURCE_EXHAUSTED: Error writing "a/0" in OCDBT database at local file "/run/2/": '
        "Failed to write 397713 bytes to file 4: No space left on device [os_error_code='28']"
    )
    assert checkpoint.code(long) == errno.ENOSPC
    assert checkpoint.code(OSError(errno.EACCES, "no")) == errno.EACCES
    assert checkpoint.code(ValueError("Error while serializing: I/O error (os error 27)")) == 27
    assert checkpoint.code(ValueError("RESOURCE_EXHAUSTED: Out of memory")) is None


def test_a_folder_is_held_by_one_run(tmp_path):
    code = "import sys; from jaxgen import locks; from pathlib import Path\n"
    code += "locks.hold(Path(sys.argv[1]), 'folder'); print('held', flush=True); sys.stdin.read()"
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert other.stdout.readline() == b"held\n"
    with pytest.raises(UserError, match="another run is writing to"):
        save(tmp_path, 1)
    assert names(tmp_path) == []
    other.kill()
    other.communicate()
    save(tmp_path, 1)
    save(tmp_path, 2)  # and is let go


def test_what_a_killed_run_left_is_no_checkpoint(tmp_path):
    save(tmp_path, 1)
    shutil.copytree(tmp_path / "1", tmp_path / "2.orbax-checkpoint-tmp")
    assert Checkpoints(tmp_path, 2).latest == 1
    save(tmp_path, 2)
    assert names(tmp_path) == ["1", "2"]


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot (read|write) .*file/checkpoints: Not a directory"):
        save(tmp_path / "file" / "checkpoints", 1)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    save(folder, 1, 2)
    return folder


def damaged(two, folder):
    shutil.copytree(two, folder, dirs_exist_ok=True)
    return folder / "2"


DAMAGE = {
    "cut": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: os.truncate(path, 0),
    "gone": lambda path: path.unlink(),
}


@pytest.mark.parametrize("harm", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_checkpoint_is_refused_or_whole(two, tmp_path, harm):
    refused = []
    for name in sorted(p.relative_to(two / "2") for p in (two / "2").rglob("*") if p.is_file()):
        folder = damaged(two, tmp_path / str(name).replace("/", "_"))
        harm(folder / name)
        try:
            assert_whole(folder.parent, 2)
        except UserError as error:
            refused.append((folder, str(error)))
    assert len(refused) >= 4
    why = "a file in it is damaged or missing; remove it to go on from step 1"
    assert [said for _, said in refused] == [
        f"cannot read {folder}: {why}" for folder, _ in refused
    ]


def test_the_only_checkpoint_damaged_one_begins_anew(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "1" / "record" / "metadata").unlink()
    with pytest.raises(UserError, match="remove it to begin anew"):
        Checkpoints(tmp_path, 2).record(1)


def test_nobody_is_told_to_remove_what_another_program_made(tmp_path):
    (tmp_path / "500").mkdir()
    (tmp_path / "500" / "model.safetensors").write_bytes(b"precious")
    with pytest.raises(UserError, match=r"500: it is of another program; name another folder"):
        Checkpoints(tmp_path, 2).record(500)


@pytest.mark.parametrize("change", ["shape", "more", "fewer"])
def test_a_state_of_another_model_is_told_from_damage(two, change):
    wanted = state(2)
    arrays = wanted["learned"]["a"]
    if change == "fewer":
        del arrays["0"]
    else:
        arrays["0" if change == "shape" else "new"] = jnp.zeros((3, 3))
    with pytest.raises(UserError, match="it is of another model; undo the change, or name another"):
        Checkpoints(two, 2).restore(2, like(wanted))


def test_memory_that_runs_out_is_no_damage(two, monkeypatch):
    def restore(*_, **__):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes")

    monkeypatch.setattr(checkpoint.ocp.Checkpointer, "restore", restore)
    with pytest.raises(RuntimeError, match="Out of memory"):
        Checkpoints(two, 2).restore(2, like(state(2)))


@pytest.mark.parametrize("processes", [1, 2])
def test_of_several_processes_none_is_told_to_remove_a_checkpoint(two, monkeypatch, processes):
    def restore(*_, **__):
        raise ValueError("a barrier timed out\nand more of it")

    monkeypatch.setattr(checkpoint.ocp.Checkpointer, "restore", restore)
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    with pytest.raises(UserError) as error:
        Checkpoints(two, 2).record(2)
    damaged = "a file in it is damaged or missing; remove it to go on from step 1"
    why = {1: damaged, 2: "a barrier timed out"}[processes]
    assert str(error.value) == f"cannot read {two / '2'}: {why}"


def test_a_file_that_may_not_be_read_is_no_damage(two, monkeypatch):
    def restore(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", "metadata")

    monkeypatch.setattr(checkpoint.ocp.Checkpointer, "restore", restore)
    with pytest.raises(UserError, match=r"cannot read .*/2: Permission denied$"):
        Checkpoints(two, 2).record(2)

import collections
import dataclasses
import itertools
import json
import logging
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import grain
import numpy as np
import pytest
from PIL import Image

from jaxgen.data import examples, order, pipeline, tally
from jaxgen.data.examples import BadExample
from jaxgen.data.pipeline import Images, Loader
from jaxgen.data.sources import write_records
from jaxgen.types import UserError
from tests.data.folders import pixels, write_folder, write_metadata


def number(example, rng):
    """What most tests finish with: the picture's number, and a draw of the example's generator."""
    return {"n": np.int64(example["n"]), "noise": rng.random(3)}


def picture(example, rng):
    return number(example, rng) | {"image": example["image"]}


def refuse_odd(example, rng):
    if example["n"] % 2:
        raise BadExample("", "its number is odd")
    return number(example, rng)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """37 pictures of 48x48."""
    return write_folder(tmp_path_factory.mktemp("data") / "photos", 37)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """40 pictures: 16 wide, 14 square, 10 upright."""
    sizes = [(96, 60)] * 16 + [(64, 64)] * 14 + [(48, 80)] * 10
    path = tmp_path_factory.mktemp("data") / "shapes"
    return write_folder(path, 40, lambda i: sizes[i])


def settings(source, **changes):
    return dataclasses.replace(Images(source=source, size=32, bad_share=0.5, threads=2), **changes)


def take(count, data, batch_size=4, seed=0, finish=number, **options):
    loader = Loader(data, finish, batch_size, seed, **options)
    try:
        return [next(loader) for _ in range(count)]
    finally:
        loader.close()


def numbers(batches):
    return np.concatenate([batch["n"] for batch in batches]).tolist()


def assert_same(actual, expected):
    for one, other in itertools.zip_longest(actual, expected):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])
            assert one[name].dtype == other[name].dtype


def spoil(folder, *names):
    """Damages pictures of a folder in the ways that pictures are damaged."""
    for name, how in zip(names, itertools.cycle(("cut", "text", "lost", "tiny"))):
        path = folder / name
        if how == "cut":
            path.write_bytes(path.read_bytes()[:100])
        elif how == "text":
            path.write_text("no picture")
        elif how == "lost":
            path.unlink()
        else:
            Image.fromarray(pixels(0, 15, 40)).save(path)


def test_every_epoch_is_another_permutation(photos):
    seen = numbers(take(37, settings(photos)))  # 148 examples are 4 epochs
    epochs = [tuple(seen[i : i + 37]) for i in range(0, 148, 37)]
    assert all(sorted(epoch) == list(range(37)) for epoch in epochs)
    assert len(set(epochs)) == 4
    assert list(range(37)) not in map(list, epochs)


def test_the_order_is_that_of_the_seed_alone(photos):
    first, again, other = (numbers(take(10, settings(photos), seed=s)) for s in (5, 5, 6))
    assert first == again != other
    assert numbers(take(20, settings(photos), seed=6))[37:74] != first[:37]  # nor its next epoch


def test_without_shuffling_the_order_is_that_of_the_source(photos):
    seen = numbers(take(20, settings(photos, shuffle=False)))
    assert seen == [i % 37 for i in range(80)]


@pytest.mark.parametrize("buckets", [False, True])
@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_one_order(shapes, processes, buckets):
    data = settings(shapes, size=64, bucket_step=16, buckets=buckets, crop="random", flip=True)
    whole = take(6, data, 8, finish=picture)
    parts = [
        take(6, data, 8, finish=picture, rows=range(p, 8, processes)) for p in range(processes)
    ]
    joined = [
        {name: np.stack([part[n][name] for part in parts], 1) for name in whole[n]}
        for n in range(6)
    ]
    joined = [{k: v.reshape(-1, *v.shape[2:]) for k, v in batch.items()} for batch in joined]
    assert_same(joined, whole)


@pytest.mark.parametrize("buckets", [False, True])
def test_workers_and_threads_change_nothing(shapes, buckets):
    data = settings(shapes, size=64, bucket_step=16, buckets=buckets, crop="random", flip=True)
    alone = take(7, dataclasses.replace(data, threads=0), finish=picture, start=3)
    for workers, threads in ((0, 5), (2, 1)):
        other = dataclasses.replace(data, workers=workers, threads=threads)
        assert_same(take(7, other, finish=picture, start=3), alone)


@pytest.mark.parametrize("buckets", [False, True])
def test_a_run_resumed_at_any_batch_sees_what_the_uninterrupted_one_would(shapes, buckets):
    data = settings(shapes, size=64, bucket_step=16, buckets=buckets, crop="random")
    whole = take(30, data, finish=picture)
    loader = Loader(data, picture, 4, 0)
    for _ in range(7):
        next(loader)
    loader.close()
    assert loader.next_batch == 7  # not what was read ahead
    for start in (7, 1, 19):
        assert_same(take(5, data, finish=picture, start=start), whole[start : start + 5])


def test_a_far_batch_is_found_at_once(photos):
    (batch,) = take(1, settings(photos), start=10**12)
    place = (4 * 10**12 + np.arange(4)) % 2**32
    np.testing.assert_array_equal(batch["place"], place)


def test_places_number_the_rows_of_all_processes(photos):
    for rows in ([0, 1, 2], [3, 4, 5], [0, 2, 5]):
        batches = take(3, settings(photos), 6, start=5, rows=rows)
        for n, batch in enumerate(batches, 5):
            assert batch["place"].dtype == np.uint32
            assert batch["place"].tolist() == [6 * n + row for row in rows]


def test_each_example_has_noise_of_its_own(photos):
    batches = take(37, settings(photos))
    noise = np.concatenate([batch["noise"] for batch in batches])
    assert len(np.unique(noise)) == 148 * 3  # in other epochs too
    assert abs(noise.mean() - 0.5) < 0.06  # 4.4 sigma
    assert abs(np.corrcoef(noise[:-1, 0], noise[1:, 0])[0, 1]) < 0.35


def test_sources_are_mixed_in_shares_of_their_weights(tmp_path):
    first = write_folder(tmp_path / "a", 7)
    second = write_folder(tmp_path / "b", 11, more=lambda i: {"n": 100 + i})
    data = settings(((first, 3.0), (second, 1.0)))
    seen = numbers(take(80, data))
    for end in (20, 100, 320):
        assert abs(sum(n < 100 for n in seen[:end]) - 0.75 * end) <= 1
    for low, length in ((0, 7), (100, 11)):  # and each is still permuted epoch by epoch
        own = [n - low for n in seen if low <= n < low + 100]
        for i in range(0, len(own) - length, length):
            assert sorted(own[i : i + length]) == list(range(length))
    assert numbers(take(2, data, start=50)) == seen[200:208]


@pytest.mark.parametrize(
    "weights", [(3.0, 1.0), (0.7, 0.3), (1, 1.004), (1, 2, 4), (0.15, 1.0, 0.333), (1e-9, 1.0)]
)
def test_the_shares_of_a_mixture_are_those_of_its_weights(weights):
    turn = order.turns(weights)
    for first in (0, 10**15):
        given = collections.Counter(turn(k)[0] for k in range(first, first + 3000))
        for source, weight in enumerate(weights):
            assert abs(given[source] - 3000 * weight / sum(weights)) <= 2
    far = [turn(k) for k in range(10**12, 10**12 + 40)]
    for source, weight in enumerate(weights):  # no drift, and no turn is left out or given twice
        mine = [t for s, t in far if s == source]
        assert mine == list(range(mine[0], mine[0] + len(mine))) if mine else True
        assert all(abs(t - 10**12 * weight / sum(weights)) < 50 for t in mine)


@pytest.mark.parametrize("weights", [(3.0, 1.0), (1, 2, 4), (5, 1, 1, 3)])
def test_mixtures_keep_the_order_that_grain_gives_them(weights):
    parts = [
        grain.MapDataset.range(1 << 40).map(lambda t, s=s: (s, t)) for s in range(len(weights))
    ]
    theirs, turn = grain.MapDataset.mix(parts, list(weights)), order.turns(weights)
    assert all(turn(k) == theirs[k] for k in (*range(200), *range(10**9, 10**9 + 200)))


def test_equal_sources_are_not_in_step(tmp_path):
    parts = tuple((write_folder(tmp_path / name, 20), 1.0) for name in "ab")
    seen = numbers(take(10, settings(parts)))
    assert seen[::2] != seen[1::2]


def test_bad_pictures_are_replaced_counted_and_named(tmp_path, caplog):
    ref = write_folder(tmp_path / "f", 37)
    whole = numbers(take(19, settings(ref)))
    spoilt = [3, 8, 20, 21]
    spoil(tmp_path / "f", *(f"{i:03d}.png" for i in spoilt))
    loader = Loader(settings(ref), number, 4, 0)
    with caplog.at_level(logging.WARNING):
        seen = numbers([next(loader) for _ in range(19)])
    loader.close()
    for was, now in zip(whole, seen):  # no other place is moved
        assert now == was or was in spoilt
        assert now not in spoilt
    reasons = {name[-7:-4]: reason for name, reason in loader.skipped.items()}
    assert reasons.keys() == {"003", "008", "020", "021"}
    assert "none of PNG" in reasons["008"]
    assert reasons["020"] == "no such file"
    assert reasons["021"] == "15x40 is below least_side 16"
    messages = [record.message for record in caplog.records]
    assert sorted(messages) == sorted(f"skipped {k}: {v}" for k, v in loader.skipped.items())


def test_workers_report_what_they_skip(tmp_path):
    ref = write_folder(tmp_path / "f", 10)
    spoil(tmp_path / "f", "002.png")
    loader = Loader(settings(ref, workers=2), number, 5, 0)
    seen = numbers([next(loader) for _ in range(2)])
    loader.close()
    assert [name[-7:] for name in loader.skipped] == ["002.png"]
    assert set(range(10)) - set(seen) == {2}


KILLED = """
import os, signal, sys
from jaxgen.data.pipeline import Images, Loader
from tests.data.test_pipeline import number
if __name__ == "__main__":
    next(Loader(Images(sys.argv[1], size=32, workers=2), number, 4, 0))
    print("began", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_do_not_outlive_the_process_they_serve(photos, tmp_path):
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    command = [sys.executable, str(script), photos]
    path = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    # It returns when the last that holds the pipe is gone: a worker would hold it for ever.
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=path)
    assert (done.stdout, done.returncode) == ("began\n", -signal.SIGKILL)


SIGNALLED = """
import os, signal, sys, time
from jaxgen.data.pipeline import Images, Loader
from tests.data.test_pipeline import number
if __name__ == "__main__":
    loader = Loader(Images(sys.argv[1], size=32, workers=2, threads=1), number, 4, 0)
    next(loader)
    signal.signal(signal.SIGTERM, lambda *_: print("caught", flush=True))
    os.killpg(0, signal.SIGTERM)
    time.sleep(0.5)
    for _ in range(20):
        next(loader)
    loader.close()
    print("read on", flush=True)
"""


def test_a_signal_to_all_processes_of_a_job_leaves_its_workers_alive(photos, tmp_path):
    script = tmp_path / "signalled.py"
    script.write_text(SIGNALLED)
    done = subprocess.run(
        [sys.executable, str(script), photos],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=60,
        start_new_session=True,
    )
    assert (done.stdout, done.returncode) == ("caught\nread on\n", 0), done.stderr


def test_a_worker_that_dies_is_told_of_in_one_line(photos):
    loader = Loader(settings(photos, workers=1), number, 4, 0)
    next(loader)
    (worker,) = multiprocessing.active_children()
    worker.kill()
    with pytest.raises(UserError, match=r"a process that reads data was ended from outside"):
        collections.deque(itertools.islice(loader, 100), maxlen=0)
    with pytest.raises(StopIteration):
        next(loader)


@pytest.mark.parametrize("buckets", [False, True])
def test_the_pieces_that_batches_are_read_in_change_nothing(shapes, monkeypatch, buckets):
    data = settings(shapes, size=64, bucket_step=16, buckets=buckets, crop="random")
    whole = take(5, data, 8, finish=picture, start=3)
    for size in (1, 3):
        monkeypatch.setattr(pipeline, "PIECE", size)
        assert_same(take(5, data, 8, finish=picture, start=3), whole)


@pytest.mark.parametrize("threads", [1, 4])
def test_no_more_is_read_ahead_than_a_batch_and_a_piece_for_each_thread(photos, threads):
    read, before = [], -1

    def counted(example, rng):
        read.append(example["n"])
        return number(example, rng)

    loader = Loader(settings(photos, threads=threads), counted, 64, 0)
    next(loader)
    while before != len(read):
        before = len(read)
        time.sleep(0.2)
    loader.close()
    assert 2 * 64 <= len(read) <= 2 * 64 + (threads + 1) * pipeline.PIECE


def test_replacements_are_one_order_however_it_is_shared(tmp_path):
    ref = write_folder(tmp_path / "f", 20)
    spoil(tmp_path / "f", *(f"{i:03d}.png" for i in range(5, 14)))
    data = settings(ref, bad_share=1.0)
    whole = take(10, data)
    assert set(numbers(whole)) == set(range(20)) - set(range(5, 14))
    for process in range(2):
        mine = [2 * process, 2 * process + 1]
        for actual, expected in zip(take(3, data, start=4, rows=mine), whole[4:7]):
            np.testing.assert_array_equal(actual["n"], expected["n"][mine])
            np.testing.assert_array_equal(actual["noise"], expected["noise"][mine])


def test_neighbours_lost_together_are_replaced_by_examples_far_away():
    draw = order.Draw(0, range(1000), 500, (32, 32))
    tried = draw.candidates()
    assert tried[0] == 500
    assert len(set(tried)) == order.TRIES
    assert sum(400 <= i < 600 for i in tried) <= 5  # a fifth is lost, not most of the tries
    for n in range(1, 17):  # of few, every one is tried
        tried = order.Draw(0, range(n), n // 2, (32, 32)).candidates()
        assert sorted(tried) == list(range(n))


def test_a_single_good_picture_is_found(tmp_path):
    ref = write_folder(tmp_path / "f", 6)
    spoil(tmp_path / "f", *(f"{i:03d}.png" for i in (0, 1, 2, 3, 5)))
    assert set(numbers(take(5, settings(ref, bad_share=1.0)))) == {4}


def test_a_source_all_bad_stops_the_run_with_the_first_reason(tmp_path):
    ref = write_folder(tmp_path / "f", 20)
    for path in (tmp_path / "f").glob("*.png"):
        path.unlink()
    for workers in (0, 1):
        with pytest.raises(UserError, match=r"16 examples in a row are bad; .*\.png: no such file"):
            take(1, settings(ref, bad_share=1.0, workers=workers))


def test_more_than_the_set_share_of_bad_pictures_stops_the_run(tmp_path):
    ref = write_folder(tmp_path / "f", 50)
    spoil(tmp_path / "f", "007.png", "030.png")  # 4 %
    assert len(take(40, settings(ref, bad_share=0.05), 16)) == 40
    loader = Loader(settings(ref, bad_share=0.03), number, 16, 0)
    with pytest.raises(UserError, match=r"31 of \d+ examples are bad, more than bad_share 0.03"):
        collections.deque(itertools.islice(loader, 100), maxlen=0)
    assert loader._tally.seen < 1000
    with pytest.raises(StopIteration):
        next(loader)


def test_a_task_may_refuse_examples(photos):
    loader = Loader(settings(photos, bad_share=1.0), refuse_odd, 4, 0)
    assert not any(n % 2 for n in numbers([next(loader) for _ in range(10)]))
    assert set(loader.skipped.values()) == {"its number is odd"}
    loader.close()


def test_a_bug_in_a_task_is_not_taken_for_a_bad_example(photos):
    def broken(example, rng):
        return {"x": np.zeros(3) + np.zeros(4)}

    with pytest.raises(ValueError, match="could not be broadcast"):
        take(1, settings(photos), finish=broken)


@pytest.mark.parametrize("batch_size", [4, 8])
def test_batches_of_buckets_have_one_size_and_crop_little(shapes, batch_size):
    data = settings(shapes, size=64, bucket_step=16, buckets=True)
    expected = {(48, 80): range(16), (64, 64): range(16, 30), (80, 48): range(30, 40)}
    per_epoch = {size: len(group) // batch_size for size, group in expected.items()}
    epochs = 3
    batches = take(epochs * sum(per_epoch.values()), data, batch_size, finish=picture)
    sizes = collections.Counter(batch["image"].shape[1:3] for batch in batches)
    assert sizes == {size: epochs * count for size, count in per_epoch.items()}
    for batch in batches:
        assert batch["image"].shape == (batch_size, *batch["image"].shape[1:3], 3)
        assert set(batch["n"]) <= set(expected[batch["image"].shape[1:3]])


def test_batches_of_buckets_are_mixed_in_shares_of_the_weights(shapes, photos):
    data = settings(((shapes, 1.0), (photos, 3.0)), size=48, bucket_step=16, buckets=True)
    batches = take(40, data, finish=picture)
    squares = sum(batch["image"].shape[1:3] == (48, 48) for batch in batches)
    assert 30 <= squares < 40  # all photos are square, and some of the shapes
    assert take(2, data, start=30)[0]["n"].tolist() == batches[30]["n"].tolist()


def test_buckets_visit_every_picture_within_few_epochs_and_none_twice_in_one(shapes):
    data = settings(shapes, size=64, bucket_step=16, buckets=True)
    per_epoch = 16 // 8 + 14 // 8 + 10 // 8
    batches = take(12 * per_epoch, data, 8)
    epochs = [batches[i : i + per_epoch] for i in range(0, len(batches), per_epoch)]
    kinds = set()
    for epoch in epochs:
        seen = numbers(epoch)
        assert len(seen) == len(set(seen)) == 32  # two, one and one batches of 8
        starts = [0 if n < 16 else 16 if n < 30 else 30 for n in (b["n"][0] for b in epoch)]
        assert sorted(starts) == [0, 0, 16, 30]
        kinds.add(tuple(starts))
    assert len(kinds) > 1  # batches of the buckets are shuffled
    assert set(numbers(batches)) == set(range(40))


def test_pictures_are_not_blown_up_beyond_twice_their_size(tmp_path, caplog):
    sizes = [(64, 64), (31, 200), (32, 32), (200, 31)]
    ref = write_folder(tmp_path / "f", 8, lambda i: sizes[i % 4])
    for buckets in (False, True):
        data = settings(ref, size=64, bucket_step=16, buckets=buckets, bad_share=1.0)
        assert set(numbers(take(8, data, 2))) == {0, 2, 4, 6}
        small = dataclasses.replace(data, least_side=1)
        assert set(numbers(take(12, small, 2))) == set(range(8))


def test_pictures_of_rare_shapes_join_the_nearest_bucket(shapes):
    data = settings(shapes, size=64, bucket_step=16, buckets=True)
    batches = take(20, data, 12, finish=picture)  # ten are upright: no batch
    sizes = {tuple(batch["image"].shape[1:3]) for batch in batches}
    assert sizes == {(48, 80), (64, 64)}
    assert set(numbers(batches)) == set(range(40))
    for batch in batches:
        assert (batch["n"] < 16).all() == (batch["image"].shape[1] == 48)


def test_buckets_that_fill_no_batch_are_refused(shapes):
    data = settings(shapes, size=64, bucket_step=16, buckets=True)
    with pytest.raises(UserError, match="no bucket fills a batch of 17: the largest has 16"):
        Loader(data, number, 17, 0)


def test_buckets_take_sizes_from_the_metadata_where_they_are_there(tmp_path):
    ref = write_folder(tmp_path / "f", 4, more=lambda i: {"width": 160, "height": 96})
    for path in (tmp_path / "f").glob("*.png"):
        path.rename(path.with_suffix(".gone"))
    loader = Loader(settings(ref, size=64, bucket_step=16, buckets=True), number, 4, 0)
    loader.close()
    assert not loader.skipped


def test_captions_are_dropped_after_flips_are_decided_and_at_the_set_share(tmp_path):
    path = tmp_path / "f"
    ref = write_folder(path, 1)
    write_metadata(path, [{"file_name": "000.png", "text": "left", "n": 0}])

    def text(example, rng):
        same = np.array_equal(example["image"], pixels(0))
        return {"dropped": np.bool_(example["caption"] == ""), "same": np.bool_(same)}

    data = settings(ref, size=48, flip=True, caption_dropout=0.3)
    batches = take(10, data, 40, finish=text)
    assert 80 < sum(b["dropped"].sum() for b in batches) < 160
    assert all(b["same"].all() for b in batches)


def test_unshuffled_buckets_leave_out_others_each_epoch(photos):
    data = settings(photos, bucket_step=16, buckets=True, shuffle=False)
    seen = numbers(take(37, data))  # nine batches of four an epoch, and one is left over
    assert seen == [i % 37 for i in range(148)]


def test_a_picture_whose_header_fails_makes_other_data(tmp_path):
    def shapes():
        loader = Loader(settings(ref, bucket_step=16, buckets=True), number, 4, 0)
        loader.close()
        return loader.fingerprint()["sources"][0].pop("shapes")

    ref = write_folder(tmp_path / "f", 40)
    before = shapes()
    assert shapes() == before
    content = (tmp_path / "f" / "017.png").read_bytes()
    (tmp_path / "f" / "017.png").unlink()
    assert shapes() != before
    (tmp_path / "f" / "017.png").write_bytes(content)
    assert shapes() == before


@pytest.mark.parametrize("buckets", [False, True])
def test_bad_examples_are_counted_over_the_whole_of_a_resumed_run(tmp_path, buckets):
    ref = write_folder(tmp_path / "f", 20)
    spoil(tmp_path / "f", "002.png", "007.png")
    data = settings(ref, bad_share=1.0, buckets=buckets, bucket_step=16)
    loader, counts = Loader(data, number, 4, 0), []
    for _ in range(12):
        counts.append(loader.bad)
        next(loader)
    loader.close()
    assert counts[-1] > 1
    resumed = Loader(data, number, 4, 0, start=6, bad=counts[6])
    for n in range(6, 12):
        assert resumed.bad == counts[n]
        next(resumed)
    resumed.close()


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), MemoryError()], ids=str)
def test_a_machine_that_fails_is_waited_for_and_then_stops_the_run(photos, monkeypatch, error):
    monkeypatch.setattr(examples, "PAUSES", (0, 0))
    left, decode = [], examples.decode

    def fails(*arguments):
        with examples.guard("photo.png"):
            if left:
                left.pop()
                raise error
        return decode(*arguments)

    whole = take(3, settings(photos))
    monkeypatch.setattr(examples, "decode", fails)
    left[:] = [1, 1]
    loader = Loader(settings(photos, threads=0), number, 4, 0)
    assert_same([next(loader) for _ in range(3)], whole)
    assert not loader.skipped
    left[:] = [1, 1, 1]
    with pytest.raises(UserError, match=r"^cannot read photo.png: (\[Errno 5\] Input|MemoryError)"):
        next(loader)


def test_records_are_a_source_of_training(tmp_path):
    write_records(tmp_path / "r", [{"image": pixels(i), "text": "", "n": i} for i in range(12)], 3)
    data = settings(f"{tmp_path}/r")
    assert sorted(numbers(take(3, data))) == list(range(12))


def test_a_fingerprint_survives_json_and_tells_orders_apart(photos):
    def fingerprint(seed=0, batch_size=4, **changes):
        loader = Loader(settings(photos, **changes), number, batch_size, seed)
        loader.close()
        return loader.fingerprint()

    assert json.loads(json.dumps(fingerprint())) == fingerprint()
    assert fingerprint(workers=1, threads=3) == fingerprint()
    others = [fingerprint(seed=1), fingerprint(batch_size=8), fingerprint(shuffle=False)]
    assert fingerprint() not in others


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": 0}, "size = 0"),
        ({"caption_dropout": 1.5}, "caption_dropout = 1.5"),
        ({"bad_share": float("nan")}, "bad_share = nan"),
        ({"workers": -1}, "workers = -1"),
        ({"source": (("a", 1.0), ("b", 0.0))}, "the weight 0.0 of b"),
        ({"source": ()}, "no source"),
        ({"buckets": True, "size": 500}, "size 500 is not divisible by bucket_step 64"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(changes, message):
    with pytest.raises(UserError, match=re.escape(message)):
        Loader(Images(**changes), number, 4, 0)


@pytest.mark.parametrize(("batch_size", "seed"), [(0, 0), (4, -1), (4, 1 << 63)])
def test_an_empty_batch_and_a_bad_seed_are_refused(photos, batch_size, seed):
    with pytest.raises(UserError, match=r"is not a whole number from 1|is not from 0"):
        Loader(settings(photos), number, batch_size, seed)


def test_missing_grain_is_said_in_one_line(photos, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "grain", None)
    with pytest.raises(UserError, match=r"pip install 'jaxgen\[data\]'"):
        Loader(settings(photos), number, 4, 0)


def test_the_log_names_at_most_so_many(tmp_path, monkeypatch):
    monkeypatch.setattr(tally, "MOST_NAMED", 2)
    ref = write_folder(tmp_path / "f", 12)
    spoil(tmp_path / "f", *(f"{i:03d}.png" for i in range(5)))
    loader = Loader(settings(ref, bad_share=1.0), number, 12, 0)
    next(loader)
    loader.close()
    assert len(loader.skipped) == 2
    assert loader.bad >= 5

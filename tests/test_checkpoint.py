"""States are written whole or not at all, and nothing but a whole state of this very run is ever continued."""

import os
import pickle
import random
import resource
import signal
import zipfile
from concurrent.futures import Future

import numpy as np
import pytest
import torch
from test_loop import interrupt_at, states
from toy import damaged_copies, same_weights, toy_model, toy_run, toy_sequences, toy_train

from common.tensor_files import named_tensors
from training.checkpoint import (
    BEFORE,
    CheckpointError,
    check_parts,
    list_states,
    random_state,
    read_newest_state,
    read_state,
    set_random_state,
    state_path,
    to_cpu,
    write_state,
)
from training.loop import add_gradients
from training.losses import next_token_loss
from training.optim import make_optimizer
from training.stats import StepStats
from training.updater import Updater

DIRECTORY = "checkpoints/toy_16"


class Bomb:
    """Unpickling this creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.system, (f"touch {self.path}",))


def shapes():
    return {name: tensor.shape for name, tensor in toy_model().state_dict().items()}


def toy_updater(seed: int = 0) -> Updater:
    model = toy_model(seed)
    return Updater(toy_run(), model, make_optimizer(model, 1e-3, 0.1))


def fits(state) -> None:
    check_parts(state, {"epoch": 0, "next_batch": 0})
    toy_updater().check_state(state["updater"])


# Reading


def bad_files(good: bytes, folder) -> dict[str, bytes]:
    """60 files that are no state: torn, damaged, foreign, hostile."""
    rng = np.random.default_rng(0)
    files = {f"torn to {share:.0%}": good[: int(len(good) * share)] for share in np.linspace(0, 0.99, 15)}
    with zipfile.ZipFile(_save(folder, good)) as archive:  # flip bytes inside the tensors, where torch.load is blind
        blocks = [i for i in archive.infolist() if "/data/" in i.filename and i.file_size > 500]
    for i in range(12):
        block = blocks[i % len(blocks)]
        place = good.index(block.filename.encode()) + len(block.filename) + 70 + int(rng.integers(300))
        damaged = bytearray(good)
        damaged[place] ^= 1 << int(rng.integers(8))
        files[f"flipped bit {i}"] = bytes(damaged)
    files |= {f"garbage {i}": rng.bytes(int(rng.integers(1, 5000))) for i in range(8)}
    files |= {f"zip garbage {i}": b"PK\x03\x04" + rng.bytes(int(rng.integers(1, 5000))) for i in range(4)}
    state = torch.load(_save(folder, good), weights_only=True)
    updater, optimizer = state["updater"], state["updater"]["optimizer"]
    other_optimizer = {"state": {0: {"momentum": torch.zeros(1)}}, "param_groups": []}
    foreign = {
        "weights": updater["model"],
        "list": [1, 2, 3],
        "tensor": torch.zeros(3),
        "number": 7,
        "nothing": {},
        "older format": {**state, "format": 1},
        "half of the format before": {**state, "format": BEFORE},
        "upstream resume": {"model": updater["model"], "optimizer": {}, "epoch": 1, "step": 5, "world_size": 1},
        "without updater": {k: v for k, v in state.items() if k != "updater"},
        "updater of numbers": {**state, "updater": 3},
        "without optimizer": {**state, "updater": {k: v for k, v in updater.items() if k != "optimizer"}},
        "other model": {**state, "updater": {**updater, "model": toy_model(dim=32).state_dict()}},
        "model of numbers": {**state, "updater": {**updater, "model": {name: 1.0 for name in updater["model"]}}},
        "odd progress": {**state, "progress": {"place": 3}},
        "odd source": {**state, "source": {"prompts": 3}},
        "source of numbers": {**state, "source": 3},
        "odd random": {**state, "random": ["x"]},
        "odd identity": {**state, "identity": 5},
        "odd optimizer": {**state, "updater": {**updater, "optimizer": other_optimizer}},
        "another optimizer": {**state, "updater": {**updater, "kind": "Lion", "optimizer": optimizer}},
    }
    for name, value in foreign.items():
        torch.save(value, folder / "foreign")
        files[f"foreign: {name}"] = (folder / "foreign").read_bytes()
    bombs = {"whole": Bomb(folder / "boom"), "inside": {**state, "run_name": Bomb(folder / "boom")}}
    for name, value in bombs.items():
        torch.save(value, folder / "bomb")
        files[f"bomb: {name}"] = (folder / "bomb").read_bytes()
    files["bomb: bare pickle"] = pickle.dumps(Bomb(folder / "boom"))
    return files


def _save(folder, content: bytes):
    (folder / "state").write_bytes(content)
    return folder / "state"


def test_no_bad_file_is_loaded_and_every_one_is_told(trained, tmp_path):
    _, good = trained
    files = bad_files(good, tmp_path)
    assert len(files) >= 50
    directory = tmp_path / "states"
    directory.mkdir()
    older, newer = (state_path(directory, step) for step in (4, 8))
    older.write_bytes(good)
    for name, content in files.items():
        newer.write_bytes(content)
        told = []
        state = read_newest_state(directory, fits, told.append)
        assert len(told) == 1 and newer.name in told[0] and len(told[0]) > len(str(newer)) + 30, name
        assert state["format"] == torch.load(older, weights_only=True)["format"], "the one before is used"
    assert not (tmp_path / "boom").exists(), "a file was executed"
    newer.write_bytes(good)
    assert read_newest_state(directory, fits, pytest.fail)["progress"]["step"] in (7, 8)


def test_damage_anywhere_is_found_or_harmless(trained, tmp_path):
    """The file is refused, or what it gives is the original."""
    _, good = trained
    original = read_state(_save(tmp_path, good))
    for copy in damaged_copies(good, 200):
        try:
            state = read_state(_save(tmp_path, copy))
        except CheckpointError:
            continue
        assert (
            same_weights(state["updater"]["model"], original["updater"]["model"])
            and state["progress"] == original["progress"]
        )


@pytest.mark.parametrize("part", ["model", "optimizer"])
def test_a_state_that_is_no_numbers_is_refused(trained, tmp_path, part):
    state = read_state(_save(tmp_path, trained[1]))
    name, tensor = next(iter(named_tensors({"updater": {part: state["updater"][part]}})))
    tensor.view(-1)[0] = float("nan")
    torch.save(state, tmp_path / "state")
    with pytest.raises(CheckpointError, match=f"it holds NaN or infinity in . tensors, first {name}"):
        read_state(tmp_path / "state")


def test_resume_uses_the_state_before_a_torn_one(trained, tmp_path, capsys):
    _, good = trained
    straight = toy_train(tmp_path / "straight", "--save_interval", "4")
    with pytest.raises(SystemExit):
        toy_train(tmp_path / "torn", "--save_interval", "4", loss_fn=interrupt_at(7))
    newest = states(tmp_path / "torn")[0]
    newest.write_bytes(good[:5000])
    model = toy_train(tmp_path / "torn", "--save_interval", "4", "--resume")
    out = capsys.readouterr().out
    assert f"{newest} is not used: it is cut off" in out and "after step 4" in out
    assert same_weights(model.state_dict(), straight.state_dict())


# Writing


def test_leftovers_of_killed_writers_are_removed(tmp_path):
    leftovers = [tmp_path / ".toy_16.pth.77.tmp", tmp_path / DIRECTORY / ".step_000000004.pt.77.tmp"]
    leftovers[1].parent.mkdir(parents=True)
    for path in leftovers:
        path.write_bytes(b"half")
    toy_train(tmp_path, "--max_steps", "2")
    assert not any(path.exists() for path in leftovers)


@pytest.fixture
def small_files_only():
    """limit(bytes): no file may become larger, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


class Immediately:
    """An executor without a thread: whether a write meets the full disk must not depend on its speed."""

    def __init__(self, max_workers):
        pass

    def submit(self, function, *args) -> Future:
        future = Future()
        future.set_result(function(*args))
        return future

    def shutdown(self):
        pass


def test_a_full_disk_is_told_and_the_run_goes_on(tmp_path, capsys, small_files_only, monkeypatch):
    monkeypatch.setattr("training.saver.ThreadPoolExecutor", Immediately)
    names = set(shapes())

    def is_saved() -> bool:
        """The weights of the save before are whole."""
        return set(torch.load(tmp_path / "toy_16.pth", weights_only=True)) == names

    def fills_up(model, batch):
        fills_up.calls += torch.is_grad_enabled()
        if fills_up.calls in (10, 30):
            assert is_saved()
            small_files_only(10_000 if fills_up.calls == 10 else resource.RLIM_INFINITY)
        if fills_up.calls == 29:
            assert [read_state(path)["progress"]["step"] for path in states(tmp_path)] == [8]
            assert is_saved()
        return next_token_loss(model, batch)

    fills_up.calls = 0
    straight = toy_train(tmp_path / "straight")
    try:
        model = toy_train(tmp_path, "--save_interval", "8", loss_fn=fills_up)
    finally:
        small_files_only(resource.RLIM_INFINITY)
    out = capsys.readouterr().out
    assert out.count("!!! NOT SAVED at step") == 2 and "MB are free" in out and "A save takes 0.1 MB" in out
    assert same_weights(model.state_dict(), straight.state_dict())
    assert is_saved() and not list(tmp_path.rglob("*.tmp"))


def test_a_run_whose_end_is_not_saved_fails(tmp_path, small_files_only, monkeypatch):
    monkeypatch.setattr("sys.argv", ["train_toy.py"])
    small_files_only(10_000)
    try:
        with pytest.raises(SystemExit, match="not saved: .Errno 27. File too large(.|\n)*start it again(.|\n)*toy.py$"):
            toy_train(tmp_path, "--max_steps", "3")  # --resume would find nothing
    finally:
        small_files_only(resource.RLIM_INFINITY)  # before pytest writes on: its own output may be a file


def test_an_unwritable_folder_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["train_toy.py"])
    (tmp_path / "checkpoints").write_text("a file where a folder should be")
    with pytest.raises(SystemExit, match="not saved"):
        toy_train(tmp_path, "--max_steps", "2")


# Parts


def test_random_state_continues_all_generators():
    device = torch.device("cpu")

    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    state = random_state(device)
    first = draw()
    set_random_state(state, device)
    assert draw() == first


def test_a_copy_is_independent_and_keeps_shared_tensors_shared():
    tensor = torch.ones(3)
    copy = to_cpu({"a": tensor, "b": [tensor, (tensor[:2], 5)]})
    tensor.zero_()
    assert copy["a"].sum() == 3 and copy["b"][0] is copy["a"] and copy["b"][1][0].sum() == 2


def write_step(directory, step: int) -> None:
    write_state(directory, {"progress": {"step": step}})


def test_the_newest_states_are_kept_in_the_order_of_their_steps(tmp_path):
    for step in (9, 10, 1000, 999_999_999, 10**9):  # as numbers, not as text
        write_step(tmp_path, step)
        assert list_states(tmp_path)[0] == state_path(tmp_path, step)
    assert [path.name for path in list_states(tmp_path)] == ["step_1000000000.pt", "step_999999999.pt"]


def test_a_state_of_a_later_step_than_the_one_written_is_of_a_course_that_was_left(tmp_path):
    """It was damaged, or counted in the smaller steps of fewer processes; it must not be taken for the newest."""
    for step in (100, 200):
        write_step(tmp_path, step)
    for step in (110, 120):
        write_step(tmp_path, step)
        assert list_states(tmp_path)[0] == state_path(tmp_path, step)
    assert list_states(tmp_path) == [state_path(tmp_path, step) for step in (120, 110)]


def test_a_state_of_the_format_before_is_continued_exactly(trained, tmp_path):
    """Its only source was a plan of the data, its only optimizer AdamW, and one counter served all parameters."""
    straight = toy_train(tmp_path / "straight", "--save_interval", "4")
    state = read_state(_save(tmp_path, trained[1]))
    updater, place = state.pop("updater"), state.pop("source")
    counter = next(iter(updater["optimizer"]["state"].values()))["step"]
    for entry in updater["optimizer"]["state"].values():
        entry["step"] = counter
    old = {**state, **updater, "format": BEFORE, "progress": {**state["progress"], **place}}
    del old["kind"]
    directory = tmp_path / "old" / DIRECTORY
    directory.mkdir(parents=True)
    torch.save(old, directory / f"epoch_0000_batch_{place['next_batch']:09d}.pt")
    model = toy_train(tmp_path / "old", "--save_interval", "4", "--resume")
    assert same_weights(model.state_dict(), straight.state_dict())
    assert all(path.name.startswith("step_") for path in list_states(directory))


def test_loading_a_state_restores_the_optimizer_exactly():
    a, b, stats = toy_updater(), toy_updater(seed=1), StepStats(toy_run())
    for seed in (1, 2):
        if seed == 2:
            b.load_state(to_cpu(a.state()))
        for updater in (a, b)[:seed]:
            batch = toy_sequences().collate(np.arange(4))
            stats.begin()
            add_gradients(toy_run(), updater, next_token_loss, [batch], stats)
            updater.step(stats, lr=1e-2)
    assert same_weights(a.state()["model"], b.state()["model"])

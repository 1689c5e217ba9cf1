"""Checkpoints: atomic files, refusals by name, signals, what is kept."""

from __future__ import annotations

import dataclasses
import logging
import os
import signal
import threading

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ntkgp.checkpoint import (
    FORMAT,
    SCHEMA,
    Checkpoint,
    CheckpointMismatch,
    UnreadableFile,
    moved_to,
    plain,
    read_file,
    running,
    write_file,
)
from ntkgp.fingerprint import digest


@dataclasses.dataclass
class Pair:
    a: torch.Tensor
    b: int


def fill(folder, states, scores=None, **options):
    with Checkpoint(folder, every=0, **options).run(data=1) as run:
        for i, state in enumerate(states):
            run.offer(lambda state=state: state, None if scores is None else scores[i])


def state_in(folder, data=1):
    with Checkpoint(folder).run(data=data) as run:
        return run.state


# --- digests ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ([1, 23], [12, 3]),
        (["ab", "c"], ["a", "bc"]),
        ([[1], 2], [[1, 2]]),
        ({1: 0}, {"1": 0}),
        (1, 1.0),
        (0, False),
        (torch.zeros(2, 3), torch.zeros(3, 2)),
        (torch.zeros(2), torch.zeros(2, dtype=torch.float64)),
        (torch.tensor([0.0]), torch.tensor([-0.0])),
        (Pair(torch.ones(1), 1), Pair(torch.ones(1), 2)),
        (nn.Linear(1, 1), nn.Linear(1, 1)),
        (torch.float32, torch.float64),
    ],
)
def test_different_values_have_different_digests(a, b):
    assert digest(a) != digest(b)


def test_equal_values_have_equal_digests():
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    assert digest(x[:, ::2]) == digest(x[:, ::2].contiguous())
    assert digest({"a": x, "b": None}) == digest({"b": None, "a": x.clone()})
    assert digest((x, 1)) == digest([x, 1])
    assert digest(torch.zeros(0, 3)) == digest(torch.zeros(0, 3))


def test_a_shuffling_loader_has_the_digest_of_its_rows():
    x, y = torch.arange(10.0).unsqueeze(-1), torch.arange(10.0)

    def loader(x, y, **options):
        return DataLoader(TensorDataset(x, y), batch_size=3, **options)

    state = torch.get_rng_state()
    assert digest(loader(x, y, shuffle=True)) == digest(loader(x, y, shuffle=True))
    assert torch.equal(torch.get_rng_state(), state)
    assert digest(loader(x, y, shuffle=True)) != digest(loader(x, y))
    assert digest(loader(x, y)) != digest(loader(x, y + 1e-6))
    assert digest(TensorDataset(x, y)) != digest(TensorDataset(x + 1e-6, y))


# --- states and files -------------------------------------------------------------------------------


def test_a_state_comes_back_as_it_was(tmp_path):
    optimizer = torch.optim.Adam(net := nn.Linear(2, 1).parameters(), lr=0.1)
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    optimizer.step()
    state = {
        "optimizer": optimizer.state_dict(), "generator": torch.Generator().manual_seed(3).get_state(), "none": None,
        "pair": (1, [2.5, "text", True]), "half": torch.ones(3, dtype=torch.bfloat16), "int": torch.arange(3),
    }  # fmt: skip
    fill(tmp_path, [state])
    found = state_in(tmp_path)
    assert digest(found) == digest(plain(state))
    assert isinstance(found["pair"], tuple)
    torch.optim.Adam([nn.Parameter(torch.zeros(1, 2)), nn.Parameter(torch.zeros(1))]).load_state_dict(
        found["optimizer"]
    )
    del net


def test_files_load_with_weights_only_and_hold_no_more_than_the_view(tmp_path):
    fill(tmp_path, [{"view": torch.zeros(100_000)[:2]}])
    (file,) = Checkpoint(tmp_path).files()
    assert torch.load(file, weights_only=True)["state"]["view"].tolist() == [0.0, 0.0]
    assert file.stat().st_size < 20_000


def test_the_order_in_memory_comes_back(tmp_path):
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    fill(tmp_path, [{"transposed": x.mT, "slice": x[:, 1:3], "wide": torch.zeros(1).expand(5)}])
    found = state_in(tmp_path)
    assert found["transposed"].stride() == x.mT.stride()
    assert torch.equal(found["transposed"], x.mT)
    assert torch.equal(found["slice"], x[:, 1:3])
    assert found["wide"].untyped_storage().nbytes() == 20


def test_states_are_copies_without_graph():
    x = torch.ones(2, requires_grad=True)
    found = plain({"x": x, "y": (2 * x).sum()})
    assert not found["y"].requires_grad
    with torch.no_grad():
        x.zero_()
    assert found["x"].tolist() == [1.0, 1.0]
    assert moved_to(found, "meta")["x"].device.type == "meta"


@pytest.mark.parametrize(
    ("state", "match"),
    [
        ({"a": {"b": [0, object()]}}, r"state\['a'\]\['b'\]\[1\].*object"),
        ({"a": lambda: 0}, r"state\['a'\]"),
        ({(1, 2): 0}, "keys of type str or int"),
        ({"a": torch.nn.Linear(1, 1)}, "Linear"),
    ],
)
def test_other_things_than_plain_ones_are_refused_by_where_they_are(state, match, tmp_path):
    with Checkpoint(tmp_path).run() as run, pytest.raises(TypeError, match=match):
        run.save(state)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_file_and_no_part(tmp_path, monkeypatch):
    path = tmp_path / "a.ckpt"
    write_file(path, {"state": 1})
    before = path.read_bytes()
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_file(path, {"state": 2})
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["a.ckpt"]


def test_file_and_folder_are_synchronised_before_and_after_the_rename(tmp_path, monkeypatch):
    done, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda f: (done.append("dir" if os.path.isdir(f"/proc/self/fd/{f}") else "file")
                                                if os.path.exists("/proc/self/fd") else None, fsync(f)))  # fmt: skip
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append("replace"), replace(a, b)))
    write_file(tmp_path / "a.ckpt", {"state": 1})
    assert [step for step in done if step] == ["file", "replace", "dir"]


@pytest.mark.parametrize("damage", ["truncated", "empty", "flipped", "garbage", "foreign", "schema", "changed"])
def test_a_broken_file_is_refused_and_the_one_before_it_used(damage, tmp_path, caplog):
    fill(tmp_path, [{"step": i, "x": torch.full((1000,), float(i))} for i in range(3)])
    older, newest = Checkpoint(tmp_path).files()
    content = newest.read_bytes()
    if damage == "truncated":
        newest.write_bytes(content[: len(content) // 2])
    elif damage == "empty":
        newest.write_bytes(b"")
    elif damage == "flipped":
        at = content.index(torch.full((1000,), 2.0).numpy().tobytes())
        newest.write_bytes(content[: at + 5] + bytes([content[at + 5] ^ 1]) + content[at + 6 :])
    elif damage == "garbage":
        newest.write_bytes(b"garbage" * 100)
    elif damage == "foreign":
        torch.save({"state": {"step": 9}}, newest)
    else:
        found = torch.load(newest, weights_only=True)
        found["schema" if damage == "schema" else "state"] = SCHEMA + 1 if damage == "schema" else {"step": 9}
        torch.save(found, newest)
    broken = newest.read_bytes()
    with caplog.at_level(logging.WARNING, "ntkgp"):
        assert state_in(tmp_path)["step"] == 1
    assert newest.name in caplog.text
    fill(tmp_path, [{"step": i} for i in (5, 6, 7)])
    # Nothing is lost: the broken file is where it was, and neither counts nor is written over.
    assert newest.read_bytes() == broken
    assert state_in(tmp_path) == {"step": 7}
    assert not older.exists()
    assert len(Checkpoint(tmp_path).files()) == 3


def test_if_all_are_broken_the_run_starts_anew(tmp_path):
    fill(tmp_path, [{"step": 1}, {"step": 2}])
    for file in Checkpoint(tmp_path).files():
        file.write_bytes(b"x")
    assert state_in(tmp_path) is None


def test_parts_of_killed_writes_are_cleared_and_other_files_are_not(tmp_path):
    (tmp_path / "00000009.ckpt.123.part").write_bytes(b"x")
    (tmp_path / "notes.txt").write_text("mine")
    fill(tmp_path, [{"step": 1}])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["00000001.ckpt", "notes.txt"]


def test_read_file_says_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_file(tmp_path / "none", FORMAT, SCHEMA)
    state = {"a": 1}
    path = tmp_path / "a.ckpt"
    write_file(path, {"format": "other", "schema": SCHEMA, "state": state, "digest": digest(state)})
    with pytest.raises(UnreadableFile, match="expected a file of the kind"):
        read_file(path, FORMAT, SCHEMA)
    assert read_file(path, "other", SCHEMA)["state"] == state


# --- what is kept, and when -------------------------------------------------------------------------


def test_the_last_two_and_the_best_are_kept(tmp_path):
    fill(tmp_path, [{"step": i} for i in range(6)], [0.0, 3.0, 1.0, float("nan"), 2.0, 2.5])
    steps = [torch.load(file, weights_only=True)["state"]["step"] for file in Checkpoint(tmp_path).files()]
    assert steps == [1, 4, 5]
    assert Checkpoint(tmp_path).best() == {"step": 1}
    fill(tmp_path, [{"step": 6}], [3.5])
    assert Checkpoint(tmp_path).best() == {"step": 6}
    assert len(Checkpoint(tmp_path).files()) == 2
    fill(tmp_path / "one", [{"step": i} for i in range(4)], keep_last=1)
    assert len(Checkpoint(tmp_path / "one").files()) == 1
    assert Checkpoint(tmp_path / "one").best() is None
    assert Checkpoint(tmp_path / "missing").best() is None


def test_states_are_written_by_the_clock(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("ntkgp.checkpoint.time.monotonic", lambda: now[0])
    made = []
    with Checkpoint(tmp_path, every=10).run() as run:
        for _ in range(25):
            now[0] += 1.0
            run.offer(lambda: made.append(now[0]) or {"at": now[0]})
    assert made == [110.0, 120.0]


def test_without_a_checkpoint_nothing_is_made():
    def refuse():
        raise AssertionError

    handler = signal.getsignal(signal.SIGTERM)
    with running(None, refuse) as run:
        assert run.state is None
        assert not run.offer(refuse)
        run.save({"a": object()})
        assert signal.getsignal(signal.SIGTERM) is handler


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"every": -1}, "every"),
        ({"every": "1"}, "every"),
        ({"keep_last": 0}, "keep_last"),
        ({"keep_last": True}, "keep"),
    ],
)
def test_bad_arguments(arguments, match, tmp_path):
    with pytest.raises(ValueError, match=match):
        Checkpoint(tmp_path, **arguments)


def test_a_file_is_no_folder_and_a_number_no_checkpoint(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="file"):
        Checkpoint(tmp_path / "file")
    with pytest.raises(TypeError, match="checkpoint: expected a path"):
        Checkpoint.of(3)
    checkpoint = Checkpoint(tmp_path, every=3, keep_last=4)
    assert Checkpoint.of(checkpoint) is checkpoint
    assert (checkpoint.part("a").every, checkpoint.part("a").path) == (3, tmp_path / "a")


# --- refusals by name -------------------------------------------------------------------------------


def test_another_run_is_refused_by_what_differs(tmp_path):
    x, theta = torch.ones(3), torch.zeros(2)
    checkpoint = Checkpoint(tmp_path, every=0)
    configuration = {"rate": 0.1, "landmarks": x}
    with checkpoint.run(network=theta, data=x, configuration=configuration) as run:
        run.save({"step": 1})

    def refused(match, **changes):
        arguments = {"network": theta, "data": x, "configuration": configuration, **changes}
        with pytest.raises(CheckpointMismatch, match=match), checkpoint.run(**arguments):
            raise AssertionError

    refused("different: network. Give", network=theta + 1)
    refused("different: data. Give", data=x + 1)
    refused(r"different: rate \(0.1 there, 0.2 here\)", configuration={**configuration, "rate": 0.2})
    refused("different: landmarks. Give", configuration={**configuration, "landmarks": 2 * x})
    refused(r"different: seed \(None there, 1 here\)", configuration={**configuration, "seed": 1})
    refused("different: rate .*, data, network", network=1, data=2, configuration={**configuration, "rate": 3})
    assert state_of(checkpoint, theta, x, configuration) == {"step": 1}


def state_of(checkpoint, network, data, configuration):
    with checkpoint.run(network, data, configuration) as run:
        return run.state


# --- signals ----------------------------------------------------------------------------------------


@pytest.fixture
def received():
    """Signals that reach the handler of the caller."""
    found = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: found.append(number))
    yield found
    signal.signal(signal.SIGTERM, before)


def test_sigterm_writes_the_state_and_then_reaches_the_handler_before(tmp_path, received):
    handler = signal.getsignal(signal.SIGTERM)
    with Checkpoint(tmp_path, every=1e6).run() as run:
        assert not run.offer(lambda: {"step": 1})
        os.kill(os.getpid(), signal.SIGTERM)
        assert received == []
        assert run.offer(lambda: {"step": 2})
        assert received == [signal.SIGTERM]
        assert not run.offer(lambda: {"step": 3})
    assert signal.getsignal(signal.SIGTERM) is handler
    assert state_in(tmp_path, None) == {"step": 2}


def test_a_signal_without_another_offer_is_passed_on_at_the_end(tmp_path, received):
    def run():
        with Checkpoint(tmp_path).run():
            os.kill(os.getpid(), signal.SIGTERM)
            raise KeyError

    with pytest.raises(KeyError):
        run()
    assert received == [signal.SIGTERM]


def test_a_run_inside_another_passes_the_signal_to_the_outermost_handler(tmp_path, received):
    handler = signal.getsignal(signal.SIGTERM)
    outer = Checkpoint(tmp_path, every=1e6)
    with outer.run(), outer.part("inner").run() as inner:
        os.kill(os.getpid(), signal.SIGTERM)
        inner.offer(lambda: {"step": 1})
        assert received == [signal.SIGTERM]
    assert received == [signal.SIGTERM]
    assert signal.getsignal(signal.SIGTERM) is handler


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_by_default_sigterm_ends_the_process_after_the_state_is_written(tmp_path):
    child = os.fork()
    if not child:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        with Checkpoint(tmp_path, every=1e6).run(data=1) as run:
            os.kill(os.getpid(), signal.SIGTERM)
            run.offer(lambda: {"step": 5})
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGTERM
    assert state_in(tmp_path) == {"step": 5}


def test_other_threads_install_no_handler(tmp_path, received):
    handler, found = signal.getsignal(signal.SIGTERM), []

    def work():
        with Checkpoint(tmp_path, every=0).run(data=1) as run:
            run.offer(lambda: {"step": 1})
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [handler]
    assert state_in(tmp_path) == {"step": 1}


def test_options_that_differ_only_in_code_or_attributes_have_other_digests() -> None:
    class Option:
        def __init__(self, rate):
            self.rate = rate

    assert digest(lambda x: x + 1) != digest(lambda x: x + 2)
    assert digest(Option(1)) != digest(Option(2))
    assert digest({"prior": Option(1)}) == digest({"prior": Option(1)})
    assert digest(torch.arange(8.0)[::4][:1]) == digest(torch.zeros(1))

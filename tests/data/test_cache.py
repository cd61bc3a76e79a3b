from __future__ import annotations

import errno
import hashlib
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
import torchio as tio

from lightning_segxai.data import cache as cache_module
from lightning_segxai.data.cache import DamagedEntryError, VolumeCache, default_folder
from lightning_segxai.data.intensity import PercentileScaling
from lightning_segxai.data.keeping import KeptVolumes, Mapped
from lightning_segxai.data.preparation import Preparation
from lightning_segxai.data.sampling import BalancedSampling, UniformSampling
from lightning_segxai.data.sources import Source, SubjectFiles
from lightning_segxai.data.volumes import Volume

SHAPE = (6, 5, 4)
FORK = multiprocessing.get_context("fork")
TURNED = np.array([[0, 0.7, 0, 5], [-0.6, 0, 0, 1 / 3], [0, 0, 0.8, 7], [0, 0, 0, 1.0]])


def volume(seed=0, name="a", shape=SHAPE):
    numbers = torch.Generator().manual_seed(seed)
    image = torch.randn(shape, generator=numbers)
    maps = {
        "label": torch.randint(0, 2, shape, generator=numbers, dtype=torch.uint8),
        "parcels": torch.randint(0, 9999, shape, generator=numbers, dtype=torch.int32),
        "weights": torch.rand(shape, generator=numbers),
    }
    index = {
        "centers": np.arange(7, dtype=np.int32),
        "bounds": np.array([0, 7]),
        "slices": np.linspace(0, 1, 6),
        "empty": np.zeros(0, dtype=np.int32),
        "empty2": np.zeros((0, 3), dtype=np.int64),
    }
    floor = float(image.min())
    return Volume(name, image, maps, TURNED, floor, index, 'Clamp(a="ü", b=None)', "0123")


@pytest.fixture
def shelf(tmp_path):
    return VolumeCache(tmp_path / "made" / "later")


def equal(a, b):
    assert (a.name, a.floor, a.preprocessing, a.source) == (
        b.name,
        b.floor,
        b.preprocessing,
        b.source,
    )
    assert np.array_equal(a.affine, b.affine)
    assert a.affine.dtype == b.affine.dtype
    assert list(a.maps) == list(b.maps)
    assert list(a.index) == list(b.index)
    for x, y in [(a.image, b.image), *((a.maps[k], b.maps[k]) for k in a.maps)]:
        assert x.dtype is y.dtype
        assert torch.equal(x, y)
    for key, x in a.index.items():
        assert (x.dtype, x.shape) == (b.index[key].dtype, b.index[key].shape)
        assert np.array_equal(x, b.index[key])
    return True


def left(shelf):
    """What else lies in the folder than whole entries."""
    return [p.name for p in shelf.folder.rglob("*") if p.name.startswith(".")]


def test_what_was_written_is_read(shelf):
    """An entry gives back every bit, kind and shape, under the name that is asked for."""
    assert "key" not in shelf
    shelf.write("key", volume())

    assert "key" in shelf
    assert equal(shelf.read("key", "a"), volume())
    assert shelf.read("key", "other").name == "other"
    assert shelf.about("key") == volume().about
    assert left(shelf) == []


@pytest.mark.parametrize(
    "array",
    [
        np.array([True, False]),
        np.arange(6, dtype=np.int16).reshape(2, 3).T,
        np.arange(8, dtype=">i4")[::2],
        np.array([1.5, -0.0, np.nan, np.inf], dtype=np.float16),
        np.array(7),
    ],
    ids=["bool", "transposed", "big-endian", "half", "one number"],
)
def test_any_index_array_is_kept(shelf, array):
    """Whatever an own strategy keeps, in any memory layout, comes back equal."""
    shelf.write("key", replace(volume(), index={"mine": array}))
    found = shelf.read("key", "a").index["mine"]
    assert found.shape == array.shape
    assert found.dtype.name == array.dtype.name
    assert np.array_equal(found, array, equal_nan=array.dtype.kind == "f")


def test_arrays_of_no_numbers_are_refused(shelf):
    """An index of words cannot be kept, which is told while it is written."""
    with pytest.raises(ValueError, match=r"keeps arrays of bool, .* but index-mine is of str"):
        shelf.write("key", replace(volume(), index={"mine": np.array(["words"])}))
    assert left(shelf) == []
    assert "key" not in shelf


def test_a_volume_cut_from_another_is_kept(shelf):
    """Views that are not contiguous are written in index order."""
    one = volume()
    view = replace(one, image=one.image.permute(2, 0, 1)[1:], maps={}, index={})
    shelf.write("key", view)
    assert equal(shelf.read("key", "a"), view)


def entry_parts():
    return ["entry.json", "image.raw", "map-label.raw", "map-weights.raw", "index-bounds.raw"]


@pytest.mark.parametrize("part", entry_parts())
def test_a_missing_part_is_found(shelf, part):
    """Without one of its files an entry is damaged, and not there for `in`."""
    shelf.write("key", volume())
    (shelf.folder / "key" / part).unlink()
    assert "key" not in shelf
    for ask in (lambda: shelf.read("key", "a"), lambda: shelf.about("key")):
        with pytest.raises(DamagedEntryError, match=part.split(".")[0]):
            ask()


@pytest.mark.parametrize("change", [lambda b: b[:-1], lambda b: b"", lambda b: b + b"\0"])
@pytest.mark.parametrize("part", entry_parts())
def test_a_file_of_another_size_is_found(shelf, part, change):
    """A truncated or longer file makes the entry damaged."""
    shelf.write("key", volume())
    file = shelf.folder / "key" / part
    file.write_bytes(change(file.read_bytes()))
    assert "key" not in shelf
    with pytest.raises(DamagedEntryError, match="key"):
        shelf.read("key", "a")


@pytest.mark.parametrize("part", [*entry_parts(), "map-parcels.raw", "index-slices.raw"])
def test_a_flipped_bit_is_found(shelf, part):
    """Any bit of any file that differs from what was written is found by reading."""
    shelf.write("key", volume())
    file = shelf.folder / "key" / part
    content = file.read_bytes()
    for at in range(0, len(content), 7):
        if content[at : at + 1].isspace():
            continue  # between the words of entry.json
        for bit in (1, 2):
            changed = bytearray(content)
            changed[at] ^= bit
            file.write_bytes(changed)
            with pytest.raises(DamagedEntryError):
                shelf.read("key", "a")
    file.write_bytes(content)
    assert equal(shelf.read("key", "a"), volume())


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\xff\xfe",
        b"null",
        b"3",
        b"[]",
        b"{}",
        b'{"format": 1}',
        b'{"format": 1, "crc32": 0, "parts": []}',
        b'{"format": 1, "crc32": 0, "parts": {"image": 3}}',
    ],
)
def test_garbage_is_found(shelf, text):
    """Whatever stands in entry.json, it is an entry or it is damaged."""
    shelf.write("key", volume())
    (shelf.folder / "key" / "entry.json").write_bytes(text)
    assert "key" not in shelf
    with pytest.raises(DamagedEntryError, match="key"):
        shelf.read("key", "a")


def test_other_formats_are_found(shelf, monkeypatch):
    """An entry of an older or newer format is not read."""
    monkeypatch.setattr(cache_module, "FORMAT", cache_module.FORMAT + 1)
    shelf.write("key", volume())
    monkeypatch.undo()
    with pytest.raises(DamagedEntryError, match=r"entry\.json"):
        shelf.read("key", "a")


def test_no_entry_and_an_empty_one_differ(shelf):
    """A key without entry is not found; an empty folder is a damaged entry, and is replaced."""
    with pytest.raises(FileNotFoundError, match="key"):
        shelf.read("key", "a")
    (shelf.folder / "key").mkdir(parents=True)
    with pytest.raises(DamagedEntryError, match="key"):
        shelf.about("key")
    shelf.write("key", volume())
    assert equal(shelf.read("key", "a"), volume())


def test_a_damaged_entry_is_replaced_and_a_whole_one_stays(shelf):
    """Writing mends what lacks a part; what another process has written meanwhile stays."""
    shelf.write("key", volume(0))
    shelf.write("key", volume(1))
    assert equal(shelf.read("key", "a"), volume(0))
    (shelf.folder / "key" / "image.raw").unlink()
    shelf.write("key", volume(1))
    assert equal(shelf.read("key", "a"), volume(1))
    assert left(shelf) == []


# --- a volume that is made again


@dataclass(frozen=True)
class Made(Source):
    """A source of random numbers."""

    name: str = "a"
    subject: str = "a"
    split: str = ""
    metadata: dict = field(default_factory=dict)
    seed: int = 0
    described: str = "made"
    files: tuple[Path, ...] = ()

    def read(self):
        numbers = torch.Generator().manual_seed(self.seed)
        image = torch.rand(1, *SHAPE, generator=numbers)
        label = torch.zeros(1, *SHAPE, dtype=torch.uint8)
        label[0, 2, 2, 1:3] = 1
        maps = {"image": tio.ScalarImage(tensor=image), "label": tio.LabelMap(tensor=label)}
        return tio.Subject(maps, name=self.name)


def mapped(shelf, seed=0, name="a"):
    how = Preparation(Made(name, seed=seed), tio.ToCanonical(), BalancedSampling())
    one = how.volume()
    key = f"key-{seed}"
    shelf.write(key, one)
    return Mapped(shelf, key, one.about, how), one


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        lambda entry: shutil.rmtree(entry),
        lambda entry: shutil.rmtree(entry.parent),
        lambda entry: [file.unlink() for file in entry.iterdir()],
        lambda entry: flip(entry / "image.raw"),
        lambda entry: flip(entry / "index-vessels.raw"),
        lambda entry: flip(entry / "entry.json"),
        lambda entry: (entry / "map-label.raw").write_bytes(b""),
        lambda entry: (entry / "entry.json").write_text("{}"),
        lambda entry: (entry / "entry.json").write_text('{"format": 1, "parts": 3}'),
    ],
)
def test_a_damaged_volume_is_made_again(shelf, damage):
    """Reading gives the volume nevertheless, warns of whose it was, and mends the entry."""
    keeper, one = mapped(shelf)
    damage(shelf.folder / keeper.key)
    with pytest.warns(UserWarning, match=r'volume of subject "a" is damaged or gone .*made again'):
        assert equal(keeper.read(), one)
    assert equal(shelf.read(keeper.key, "a"), one)
    assert left(shelf) == []


def test_a_volume_is_mapped_once_and_its_twin_again(shelf):
    """A keeper gives the same volume each time, and a copy in another process maps the files."""
    keeper, one = mapped(shelf)
    assert keeper.read() is keeper.read()
    assert equal(keeper.read(), one)
    assert keeper.about == one.about


def test_a_pickled_volume_leaves_its_voxels(shelf):
    """What goes to a worker is a few bytes, whether the volume was read before or not."""
    keeper, one = mapped(shelf)
    before = len(pickle.dumps(keeper))
    keeper.read()
    kept = KeptVolumes([keeper])
    assert kept[0].image.nbytes == one.image.nbytes
    assert len(pickle.dumps(keeper)) == before < 3000
    assert len(pickle.dumps(kept)) < before + 300
    assert equal(pickle.loads(pickle.dumps(kept))[0], one)


def read_there(pickled, answer):
    keeper = pickle.loads(pickled)
    answer.put(hashlib.sha256(keeper.read().image.numpy().tobytes()).hexdigest())


def test_a_pickled_volume_is_read_in_another_process(shelf):
    """Another process reads the same bits."""
    keeper, one = mapped(shelf)
    answer = FORK.Queue()
    process = FORK.Process(target=read_there, args=(pickle.dumps(keeper), answer))
    process.start()
    assert answer.get(timeout=20) == hashlib.sha256(one.image.numpy().tobytes()).hexdigest()
    process.join()


# --- several processes


def write_at_once(folder, barrier, seed):
    shelf = VolumeCache(folder)
    one = volume(seed)
    for turn in range(15):
        barrier.wait(20)
        shelf.write(f"key-{turn}", one)
        found = shelf.read(f"key-{turn}", "a")  # nothing torn
        if not any(torch.equal(found.image, volume(s).image) for s in (0, 1, 2)):
            sys.exit(3)


def test_processes_write_the_same_entry_at_once(shelf):
    """Whoever wins, the entry is whole at any moment, and nothing else is left."""
    barrier = FORK.Barrier(3)
    processes = [
        FORK.Process(target=write_at_once, args=(shelf.folder, barrier, n)) for n in range(3)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert len(list(shelf.folder.iterdir())) == 15
    assert left(shelf) == []


def mend_at_once(folder, barrier, answers):
    shelf = VolumeCache(folder)
    how = Preparation(Made(), tio.ToCanonical(), BalancedSampling())
    keeper = Mapped(shelf, "key-0", how.volume().about, how)
    barrier.wait(20)
    answers.put(hashlib.sha256(keeper.read().image.numpy().tobytes()).hexdigest())


@pytest.mark.filterwarnings("ignore:The cached volume")
def test_processes_mend_the_same_entry_at_once(shelf):
    """Several processes that find an entry damaged all get the volume, and one entry stays."""
    keeper, one = mapped(shelf)
    expected = hashlib.sha256(one.image.numpy().tobytes()).hexdigest()
    for _ in range(4):
        flip(shelf.folder / keeper.key / "image.raw")
        barrier, answers = FORK.Barrier(3), FORK.Queue()
        processes = [
            FORK.Process(target=mend_at_once, args=(shelf.folder, barrier, answers))
            for _ in range(3)
        ]
        for process in processes:
            process.start()
        assert [answers.get(timeout=30) for _ in processes] == [expected] * 3
        for process in processes:
            process.join()
        assert left(shelf) == []
        if "key-0" not in shelf:
            shelf.write("key-0", one)
        assert equal(shelf.read("key-0", "a"), one)


def write_and_die(folder, at):
    """Write an entry, and be killed while its n-th file is written."""
    count = 0
    real = os.fsync

    def fsync(handle):
        nonlocal count
        count += 1
        if count == at:
            os.kill(os.getpid(), signal.SIGKILL)
        real(handle)

    os.fsync = fsync
    VolumeCache(folder).write("key", volume())


@pytest.mark.parametrize("at", [1, 3, 10])
def test_a_killed_process_leaves_nothing_that_is_read(shelf, at):
    """What it left is no entry, is in nobody's way, and is swept a day later, not before."""
    process = FORK.Process(target=write_and_die, args=(shelf.folder, at))
    process.start()
    process.join(20)
    assert process.exitcode == -signal.SIGKILL
    assert "key" not in shelf
    (rest,) = left(shelf)

    shelf.write("key", volume())
    assert equal(shelf.read("key", "a"), volume())
    assert left(shelf) == [rest]

    old = time.time() - 86_000
    os.utime(shelf.folder / rest, (old, old))
    shelf.write("other", volume())
    assert left(shelf) == [rest]
    old -= 800
    os.utime(shelf.folder / rest, (old, old))
    shelf.write("another", volume())
    assert left(shelf) == []


# --- a full disk, a folder that cannot be written


@pytest.mark.parametrize("at", range(1, 11))
def test_a_full_disk_leaves_nothing(shelf, monkeypatch, at):
    """Whichever write fails, there is no entry then, and nothing that takes room."""
    shelf.write("before", volume())
    count = 0
    real = cache_module._flushed

    def flushed(file, content):
        nonlocal count
        count += 1
        if count == at:
            file.write_bytes(bytes(content)[: len(content) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        real(file, content)

    monkeypatch.setattr(cache_module, "_flushed", flushed)
    with pytest.raises(OSError, match="No space left"):
        shelf.write("key", volume())
    assert [path.name for path in shelf.folder.iterdir()] == ["before"]
    assert equal(shelf.read("before", "a"), volume())


def test_a_damaged_volume_on_a_full_disk_stays_in_memory(shelf, monkeypatch):
    """Where the entry cannot be mended, the volume is held instead."""
    keeper, one = mapped(shelf)
    flip(shelf.folder / keeper.key / "image.raw")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache_module, "_flushed", full)
    with pytest.warns(UserWarning, match='subject "a"'):
        assert equal(keeper.read(), one)
    assert left(shelf) == []


def test_a_note_on_a_full_disk_leaves_nothing(shelf, tmp_path, monkeypatch):
    """A digest that cannot be noted is given nevertheless."""
    file = aged(tmp_path / "file", b"abc")

    class Full:
        def __init__(self, handle):
            os.close(handle)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        def write(self, _):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache_module.os, "fdopen", lambda handle, mode: Full(handle))
    assert shelf.content(file) == hashlib.sha256(b"abc").hexdigest()
    assert list((shelf.folder / "seen").iterdir()) == []


class ReadOnly:
    """A folder in which nobody, not even root, can make or change anything."""

    def __init__(self, monkeypatch):
        def refuse(*_args, **_kwargs):
            raise PermissionError(errno.EACCES, "Permission denied")

        monkeypatch.setattr(cache_module.tempfile, "mkdtemp", refuse)
        monkeypatch.setattr(cache_module.tempfile, "mkstemp", refuse)


def test_a_read_only_folder_is_read(shelf, tmp_path, monkeypatch):
    """Entries are read, digests made, and damage is mended in memory; writing is refused."""
    keeper, one = mapped(shelf)
    broken, _ = mapped(shelf, seed=1, name="b")
    flip(shelf.folder / broken.key / "image.raw")
    file = aged(tmp_path / "file", b"abc")
    ReadOnly(monkeypatch)

    assert equal(keeper.read(), one)
    assert shelf.content(file) == hashlib.sha256(b"abc").hexdigest()
    with pytest.warns(UserWarning, match='subject "b"'):
        assert torch.equal(broken.read().image, Made(seed=1).read()["image"].data[0])
    with pytest.raises(PermissionError, match="denied"):
        shelf.write("key", volume())


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root writes anywhere")
def test_a_folder_without_permission(shelf):
    """A folder without the permission to write gives entries, and takes none."""
    shelf.write("key", volume())
    shelf.folder.chmod(0o555)
    try:
        assert equal(shelf.read("key", "a"), volume())
        with pytest.raises(PermissionError):
            shelf.write("other", volume())
    finally:
        shelf.folder.chmod(0o755)


def test_a_file_where_the_folder_should_be(tmp_path):
    """A cache folder that is a file is an error of the system, as a full disk is."""
    (tmp_path / "cache").write_text("a file")
    shelf = VolumeCache(tmp_path / "cache")
    assert "key" not in shelf
    with pytest.raises(OSError, match="cache"):
        shelf.write("key", volume())


def test_entries_can_be_read_by_others(shelf):
    """Whoever may enter the cache folder can read the entries: it may be a group's."""
    shelf.write("key", volume())
    mode = (shelf.folder / "key").stat().st_mode & 0o777
    assert mode == 0o755


# --- mapping


def test_no_file_stays_open(shelf):
    """Fifty mapped volumes hold no file descriptor."""
    keepers = [mapped(shelf, seed)[0] for seed in range(50)]
    before = len(list(Path("/proc/self/fd").iterdir()))
    volumes = [keeper.read() for keeper in keepers]
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert len({float(v.image[0, 0, 0]) for v in volumes}) == 50


def test_a_mapped_volume_outlives_its_entry(shelf):
    """A volume that is in use stays readable after its entry was removed or replaced."""
    one = volume(shape=(64, 64, 16))  # several pages
    shelf.write("key", one)
    in_use = shelf.read("key", "a")
    shelf.discard("key")
    assert "key" not in shelf
    shelf.write("key", volume(1))
    assert equal(shelf.read("key", "a"), volume(1))
    assert equal(in_use, one)
    shutil.rmtree(shelf.folder)
    assert equal(in_use, one)


def test_discarding_nothing_is_fine(shelf):
    """An entry that is not there is as good as removed, also without a folder."""
    shelf.discard("key")
    shelf.write("other", volume())
    shelf.discard("key")
    assert left(shelf) == []


def test_writing_into_a_mapped_volume_stays_in_memory(shelf):
    """A mapped tensor may be written to, and neither the disk nor another reader sees it."""
    shelf.write("key", volume())
    mine, other = shelf.read("key", "a"), shelf.read("key", "a")
    mine.image.fill_(7)
    mine.maps["label"].zero_()
    assert equal(other, volume())
    assert equal(shelf.read("key", "a"), volume())


# --- digests of files


def aged(file, content, seconds=10):
    """A file that was written a while ago."""
    file.write_bytes(content)
    then = time.time() - seconds
    os.utime(file, (then, then))
    return file


def reads(monkeypatch):
    """Count how often a file is read to make a digest."""
    counted = []
    real = hashlib.file_digest

    def file_digest(stream, name):
        counted.append(stream.name)
        return real(stream, name)

    monkeypatch.setattr(cache_module.hashlib, "file_digest", file_digest)
    return counted


def test_a_digest_is_remembered(shelf, tmp_path, monkeypatch):
    """A file of the same size and time of change is not read again, also by another process."""
    file = aged(tmp_path / "file", b"abc")
    counted = reads(monkeypatch)
    assert shelf.content(file) == hashlib.sha256(b"abc").hexdigest()
    assert VolumeCache(shelf.folder).content(file) == hashlib.sha256(b"abc").hexdigest()
    assert len(counted) == 1


@pytest.mark.parametrize(("content", "seconds"), [(b"xyz", 9), (b"abcd", 10)])
def test_a_changed_file_is_read_again(shelf, tmp_path, content, seconds):
    """Another time of change, or another size, makes a new digest."""
    file = aged(tmp_path / "file", b"abc")
    then = file.stat().st_mtime
    shelf.content(file)
    aged(file, content)
    os.utime(file, (then + 10 - seconds, then + 10 - seconds))
    assert shelf.content(file) == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("seconds", [0, -1000])
def test_a_fresh_file_is_not_remembered(shelf, tmp_path, seconds):
    """A file written this moment, or with a time to come, could change without showing it."""
    file = aged(tmp_path / "file", b"abc", seconds)
    state = file.stat()
    shelf.content(file)
    file.write_bytes(b"xyz")
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert shelf.content(file) == hashlib.sha256(b"xyz").hexdigest()


@pytest.mark.parametrize("note", [b"", b"[]", b"{}", b"3", b"\xff", b'{"size": 3}'])
def test_half_a_note_is_made_again(shelf, tmp_path, monkeypatch, note):
    """Whatever stands in a note, the digest is right, and the note is mended."""
    file = aged(tmp_path / "file", b"abc")
    shelf.content(file)
    (written,) = (shelf.folder / "seen").iterdir()
    good = json.loads(written.read_text())
    written.write_bytes(note)
    assert shelf.content(file) == hashlib.sha256(b"abc").hexdigest()
    assert json.loads(written.read_text()) == good


def test_files_of_equal_names_are_two(shelf, tmp_path):
    """Notes are kept by the whole path."""
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        aged(tmp_path / folder / "file", folder.encode())
    digests = [shelf.content(tmp_path / folder / "file") for folder in ("a", "b", "a")]
    assert digests == [hashlib.sha256(c).hexdigest() for c in (b"a", b"b", b"a")]


def test_the_folder_is_the_users(monkeypatch):
    """The cache lies in the user's cache folder, wherever that is."""
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert default_folder() == Path("/somewhere/lightning-segxai")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert default_folder() == Path.home() / ".cache/lightning-segxai"


# --- the key of an entry


def files(folder, image=0, label=1):
    folder.mkdir(parents=True, exist_ok=True)
    array = np.random.default_rng(image).normal(size=SHAPE).astype(np.float32)
    nib.save(nib.Nifti1Image(array, np.eye(4)), folder / "image.nii")
    where = np.zeros(SHAPE, dtype=np.uint8)
    where[2, 2, : 1 + label] = 1
    nib.save(nib.Nifti1Image(where, np.eye(4)), folder / "label.nii")
    return SubjectFiles(str(folder / "image.nii"), str(folder / "label.nii"), name="a")


def how(source, *, scaling=None, sampling=None, spacing=None, classes=2):
    steps = [tio.ToCanonical(), *([] if spacing is None else [tio.Resample(spacing)])]
    steps.append(PercentileScaling() if scaling is None else scaling)
    chosen = BalancedSampling() if sampling is None else sampling
    return Preparation(source, tio.Compose(steps), chosen, classes)


def test_a_key_follows_from_content_and_settings(shelf, tmp_path):
    """Whatever could change the volume or its index changes the key."""
    source = files(tmp_path / "data")
    different = [
        {},
        {"scaling": PercentileScaling(upper=99.9)},
        {"scaling": PercentileScaling(clip=True)},
        {"scaling": tio.ZNormalization()},
        {"scaling": tio.Lambda(lambda x: x * 2)},
        {"scaling": tio.Lambda(lambda x: x * 3)},
        {"sampling": BalancedSampling(0.4)},
        {"sampling": UniformSampling()},
        {"spacing": 0.6},
        {"spacing": (0.6, 0.6, 0.7)},
        {"classes": 3},
        {"classes": None},
    ]
    keys = [how(source, **settings).key(shelf) for settings in different]
    keys.append(how(files(tmp_path / "data", image=1)).key(shelf))
    keys.append(how(files(tmp_path / "data", label=2)).key(shelf))
    keys.append(how(replace(source, label=None)).key(shelf))
    assert len(set(keys)) == len(keys)


def test_a_key_does_not_depend_on_the_folder(shelf, tmp_path):
    """The same files elsewhere, and another cache, have the same key."""
    here, there = (how(files(tmp_path / where)) for where in ("here", "there/below"))
    assert here.key(shelf) == there.key(VolumeCache(tmp_path / "other"))

from __future__ import annotations

import random
import warnings

import numpy as np
import pytest
import torch

from lightning_segxai.data.choice import Landmark, ProbeChoice, chosen_probes
from lightning_segxai.data.volumes import Volume

SIZE = (8, 8, 8)
TURNED = np.array([[0, -0.7, 0, 5], [-0.6, 0, 0, 60], [0, 0, 0.8, -7], [0, 0, 0, 1.0]])


def tubes(*radii):
    """Tubes along k, sixteen voxels apart."""
    label = torch.zeros(16 * len(radii), 16, 31, dtype=torch.uint8)
    i, j = torch.meshgrid(*map(torch.arange, label.shape[:2]), indexing="ij")
    for n, radius in enumerate(radii):
        label[(i - 16 * n - 8) ** 2 + (j - 8) ** 2 <= radius**2] = 1
    return label


def volume(name, *radii, affine=TURNED):
    label = tubes(*radii)
    numbers = torch.Generator().manual_seed(len(name))
    image = torch.rand(label.shape, generator=numbers) + 5 * label
    maps = {"label": label, "brain": torch.ones_like(label), "weights": torch.ones(label.shape)}
    return Volume(name, image, maps, affine, float(image.min()), {}, "scaled", "0123")


def fork(name):
    """A volume with one fork."""
    label = torch.zeros(32, 32, 16, dtype=torch.uint8)
    label[15:18, 3:17, 7:10] = 1
    for step in range(12):
        for i in (15 + step, 15 - step):
            label[i : i + 3, 16 + step : 19 + step, 7:10] = 1
    return Volume(name, torch.rand(label.shape), {"label": label}, np.eye(4), 0.0)


def middle(probe):
    """World coordinates of the voxel in the middle of a probe."""
    return probe.affine @ [*(n // 2 for n in probe.image.shape[1:]), 1]


def test_vessels_of_each_volume_in_turn():
    """The fullest place of every volume comes before the second of any, under numbered names."""
    volumes = [volume("a", 3, 1), volume("b", 2, 4)]
    probes = chosen_probes(ProbeChoice(n=3), volumes, [], SIZE)
    assert [p.name for p in probes] == ["a-1", "b-1", "a-2"]
    assert all(p.image.shape == (1, *SIZE) for p in probes)
    assert np.abs(np.linalg.inv(TURNED) @ middle(probes[1]) - [24, 8, 15, 1])[:2].max() < 2


def test_a_probe_is_what_lies_there():
    """Image, label, regions, place and digests of a probe are the volume's."""
    one = volume("a", 3, 1)
    (probe,) = chosen_probes(ProbeChoice(n=1, kind="thinnest"), [one], [], SIZE)
    i, j, k = (np.linalg.inv(TURNED) @ probe.affine[:, 3])[:3].round().astype(int)
    inside = (slice(i, i + 8), slice(j, j + 8), slice(k, k + 8))

    assert probe.name == "a-thinnest-1"
    assert torch.equal(probe.image[0], one.image[inside])
    assert torch.equal(probe.label, one.maps["label"][inside].long())
    assert list(probe.regions) == ["brain"]
    assert probe.spacing_mm == pytest.approx((0.6, 0.7, 0.8))
    assert (probe.preprocessing, probe.source) == ("scaled", "0123")


def test_thinnest_are_of_the_thin_tubes():
    """Each volume's thinnest vessel is in the middle of its first probe."""
    volumes = [volume("a", 3, 1), volume("b", 2, 4)]
    probes = chosen_probes(ProbeChoice(n=4, kind="thinnest"), volumes, [], SIZE)
    assert [p.name for p in probes] == [f"{v}-thinnest-{n}" for n in (1, 2) for v in "ab"]
    voxels = [(np.linalg.inv(TURNED) @ middle(p))[:3].round().tolist() for p in probes]
    assert voxels == [[24, 8, 15], [8, 8, 15], [8, 8, 15], [24, 8, 15]]


def test_bifurcations():
    """Forks are found in the volumes that have one; too few are told."""
    with pytest.warns(UserWarning, match=r'found only 1 distinct places of kind "bifurcations"'):
        probes = chosen_probes(
            ProbeChoice(n=2, kind="bifurcations"), [volume("a", 2), fork("f")], [], SIZE
        )
    assert [p.name for p in probes] == ["f-bifurcations-1"]
    assert np.abs(middle(probes[0])[:3] - [16, 16, 8]).max() <= 4


def test_whole_volumes():
    """The first volumes are explained whole, under their names."""
    volumes = [volume("a", 2), volume("b", 1, 2), fork("f")]
    probes = chosen_probes(ProbeChoice(n=2, kind="whole"), volumes, [], SIZE)
    assert [p.name for p in probes] == ["a", "b"]
    for probe, one in zip(probes, volumes, strict=False):
        assert torch.equal(probe.image[0], one.image)
        assert np.array_equal(probe.affine, one.affine)


FLIPPED = [
    np.eye(4),
    np.diag([-0.5, 0.5, 0.8, 1.0]),
    TURNED,
    np.array([[0.5, 0.1, 0, 3], [-0.1, 0.5, 0, 4], [0, 0, -0.8, 5], [0, 0, 0, 1.0]]),
]


@pytest.mark.parametrize("affine", FLIPPED)
def test_landmarks_lie_where_they_are_in_the_world(affine):
    """The middle of a landmark's probe is the voxel nearest to it, in any orientation."""
    one = volume("b", 1, 2, affine=affine)
    mm = (affine @ [20.3, 7.8, 11.4, 1])[:3]
    choice = ProbeChoice(kind="landmarks", landmarks={"tip": Landmark("b", tuple(mm.tolist()))})
    (probe,) = chosen_probes(choice, [volume("a", 1)], [one], SIZE)

    assert probe.name == "tip"
    assert np.allclose(middle(probe), affine @ [20, 8, 11, 1])
    assert torch.equal(probe.image[0], one.image[16:24, 4:12, 7:15])


def test_landmarks_that_are_nowhere():
    """A landmark in no subject, or outside of it, is refused by its name."""
    volumes = [volume("a", 1), volume("b", 1)]
    cases = (
        (Landmark("c", (0.0, 0.0, 0.0)), r'"tip" lies in subject "c", but there are only a, b\.'),
        (Landmark("a", (900.0, 0.0, 0.0)), r'"tip" at \(900.0, .*outside of subject "a"'),
        (Landmark("a", tuple((TURNED @ [-1, 3, 3, 1])[:3].tolist())), r"voxel -1, 3, 3 of \(16"),
        (Landmark("a", tuple((TURNED @ [3, 16, 3, 1])[:3].tolist())), r"voxel 3, 16, 3 of \(16"),
    )
    for landmark, message in cases:
        choice = ProbeChoice(kind="landmarks", landmarks={"tip": landmark})
        with pytest.raises(ValueError, match=message):
            chosen_probes(choice, volumes, [], SIZE)


def missing(*tube_numbers):
    """A network that finds all tubes but some, and what it was asked for."""
    asked = []

    def segment(ckpt, image):
        asked.append((ckpt, tuple(image.shape)))
        found = (image[0] >= 5).long()
        for n in tube_numbers:
            found[16 * n : 16 * (n + 1)] = 0
        return found

    return segment, asked


def test_largest_missed_of_all_volumes():
    """Missed pieces are ranked by size over the volumes, not one volume after the other."""
    volumes = [volume("a", 3, 1), volume("b", 3, 4), volume("c", 3, 2)]
    segment, asked = missing(1)
    choice = ProbeChoice(n=2, kind="largest_missed", ckpt="best.ckpt")
    probes = chosen_probes(choice, volumes, [], SIZE, segment)

    assert [p.name for p in probes] == ["b-missed-1", "c-missed-1"]
    assert asked == [("best.ckpt", (1, 32, 16, 31))] * 3
    for probe in probes:
        voxel = (np.linalg.inv(TURNED) @ middle(probe))[:3].round().tolist()
        assert voxel == [24, 8, 15]


def test_several_missed_pieces_of_a_volume():
    """A volume's pieces are numbered by size, and nothing is missed where all is found."""
    volumes = [volume("a", 3, 1, 2), volume("b", 1)]
    choice = ProbeChoice(n=2, kind="largest_missed", ckpt="best.ckpt")
    probes = chosen_probes(choice, volumes, [], SIZE, missing(1, 2)[0])
    assert [p.name for p in probes] == ["a-missed-1", "a-missed-2"]
    with pytest.warns(UserWarning, match='found only 0 distinct places of kind "largest_missed"'):
        assert chosen_probes(choice, volumes, [], SIZE, missing()[0]) == []


def test_largest_missed_needs_the_network():
    """Without a function that segments, what was missed cannot be known."""
    choice = ProbeChoice(kind="largest_missed", ckpt="best.ckpt")
    with pytest.raises(ValueError, match=r"needs the network: .*AttributionMonitor"):
        chosen_probes(choice, [volume("a", 1)], [], SIZE)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n": -1}, r"n=-1\)` must be at least 0"),
        ({"kind": "landmarks"}, r'needs `landmarks` for kind="landmarks".*landmarks=None'),
        ({"landmarks": {}}, r'kind="vessels", landmarks=\{\}'),
        ({"kind": "largest_missed"}, r'needs `ckpt` for kind="largest_missed"'),
        ({"ckpt": "a.ckpt"}, r"ckpt='a\.ckpt'"),
    ],
)
def test_a_choice_is_checked(settings, message):
    """What belongs to a kind is needed there, and refused elsewhere."""
    with pytest.raises(ValueError, match=message):
        ProbeChoice(**settings)


def test_a_volume_without_label():
    """Without a label there is no vessel: the middle of the volume, or no place."""
    one = Volume("a", torch.rand(12, 12, 12), {}, np.eye(4), 0.0)
    (probe,) = chosen_probes(ProbeChoice(n=1), [one], [], SIZE)
    assert middle(probe)[:3].tolist() == [6, 6, 6]
    with pytest.warns(UserWarning, match="found only 0"):
        assert chosen_probes(ProbeChoice(n=1, kind="thinnest"), [one], [], SIZE) == []


def test_no_probe_is_asked_for():
    """None is none, without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for kind in ("vessels", "whole", "thinnest", "bifurcations"):
            assert chosen_probes(ProbeChoice(n=0, kind=kind), [volume("a", 1)], [], SIZE) == []


def test_choices_are_always_the_same():
    """No random number is drawn, and the volumes stay as they are."""
    volumes = [volume("a", 3, 1), volume("b", 2, 4)]
    before = [v.image.clone() for v in volumes]
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()

    def names_and_places(kind):
        probes = chosen_probes(ProbeChoice(n=2, kind=kind), volumes, [], SIZE)
        return [(p.name, p.affine.tolist(), p.image.tolist()) for p in probes]

    for kind in ("vessels", "whole", "thinnest"):
        assert names_and_places(kind) == names_and_places(kind)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1]
    assert all(torch.equal(v.image, b) for v, b in zip(volumes, before, strict=True))

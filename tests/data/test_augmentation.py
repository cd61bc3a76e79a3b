from __future__ import annotations

import pickle
import random
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest
import torch
import torchio as tio

from lightning_segxai.data.augmentation import Augmentation, light_augmentation

SHAPE = (12, 9, 10)
SPACINGS_MM = [(0.5, 0.5, 0.8), (1.0, 0.7, 0.4), (0.3, 0.3, 0.6), (0.6, 0.6, 0.6), (2.0, 1.0, 1.0)]
SEEDS = torch.tensor([11, 2**62 + 5, -3, 0, 11])


def batch(patches=5):
    """Patches of several spacings; a label follows from its image."""
    draw = torch.Generator().manual_seed(1)
    data = torch.randn((5, 1, *SHAPE), generator=draw)[:patches]
    affines = np.stack([np.diag([*spacing, 1.0]) for spacing in SPACINGS_MM])[:patches]
    return {
        "image": {"data": data, "affine": affines, "type": ["intensity"] * patches},
        "label": {
            "data": (data > 1).to(torch.int16),
            "affine": affines.copy(),
            "type": ["label"] * patches,
        },
        "name": [f"case_{n}" for n in range(patches)],
        "location": torch.zeros(patches, 6),
    }


def only(whole, n):
    """The batch of one patch."""
    return {
        key: {k: v[n : n + 1] for k, v in entry.items()}
        if isinstance(entry, dict)
        else entry[n : n + 1]
        for key, entry in whole.items()
    }


def always():
    """Every twin, on every patch."""
    transforms = light_augmentation()
    for transform in transforms:
        transform.probability = 1
    return transforms


def unlike():
    """Transforms without a twin."""
    return [
        tio.RandomAffine(p=0.7),
        tio.OneOf([tio.RandomGhosting(), tio.Compose([tio.RandomNoise(), tio.RandomSpike()])]),
        tio.RandomFlip(axes=("left",)),
    ]


class FromEverywhere(tio.Transform):
    """Adds a number of each global generator."""

    def apply_transform(self, subject):
        for image in self.get_images(subject):
            numbers = torch.rand(1).item() + np.random.rand() + random.random()
            image.set_data(image.data + numbers)
        return subject

    def get_images(self, subject):
        return subject.get_images()


LISTS = {
    "light": light_augmentation,
    "always": always,
    "unlike": unlike,
    "mixed": lambda: [*unlike(), *always(), FromEverywhere()],
}


@pytest.mark.parametrize("name", LISTS)
def test_a_patch_does_not_depend_on_its_batch(name):
    """Alone, with others and again, a patch and a seed give the same bits; seeds give others."""
    augmentation = Augmentation(LISTS[name]())
    together = augmentation(batch(), SEEDS)
    for n in range(5):
        torch.manual_seed(n)
        alone = augmentation(only(batch(), n), SEEDS[n : n + 1])
        for key in ("image", "label"):
            assert torch.equal(alone[key]["data"][0], together[key]["data"][n])
    image = together["image"]["data"]
    if name != "light":
        assert not torch.equal(image[0] - batch()["image"]["data"][0], image[1])
    elsewhere = augmentation(batch(), SEEDS + 1)["image"]["data"]
    assert not torch.equal(image, elsewhere)


class Failing(FromEverywhere):
    """Draws numbers, then fails."""

    def apply_transform(self, subject):
        super().apply_transform(subject)
        raise RuntimeError("broken")


def states():
    """Of the global generators of torch, NumPy and Python."""
    return torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()


def in_process(pickled):
    """Augmented voxels, and whether the global generators stayed as they were."""
    torch.set_num_threads(1)
    augmentation, given, seeds = pickle.loads(pickled)
    before = states()
    try:
        augmented = augmentation(given, seeds)["image"]["data"].numpy().tobytes()
    except RuntimeError as error:
        augmented = str(error)
    return augmented, states() == before


@pytest.fixture(scope="module")
def spawned():
    """A plain process: type checks of the tests draw from Python's generator themselves."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        yield pool


@pytest.mark.parametrize("name", LISTS)
def test_a_spawned_process_gives_the_same_bits_and_keeps_its_generators(name, spawned):
    """Sent to a worker it does there what it does here, and no global generator moves."""
    pickled = pickle.dumps((Augmentation(LISTS[name]()), batch(), SEEDS))
    augmented, kept = spawned.submit(in_process, pickled).result()
    assert augmented == in_process(pickled)[0]
    assert kept


def test_generators_come_back_after_an_error(spawned):
    """A transform that fails leaves the global generators as they were."""
    pickled = pickle.dumps((Augmentation([Failing()]), batch(), SEEDS))
    assert spawned.submit(in_process, pickled).result() == ("broken", True)


@pytest.mark.parametrize("name", LISTS)
def test_types_shapes_and_the_rest_of_a_batch_stay(name):
    """float32 stays float32, labels their type, in the memory of the batch; no NaN."""
    given = batch()
    tensors = {key: given[key]["data"] for key in ("image", "label")}
    returned = Augmentation(LISTS[name]())(given, SEEDS)
    assert returned is given
    for key, dtype in (("image", torch.float32), ("label", torch.int16)):
        assert returned[key]["data"] is tensors[key]
        assert tensors[key].dtype == dtype
        assert tensors[key].isfinite().all()
        np.testing.assert_allclose(returned[key]["affine"], batch()[key]["affine"])
    assert returned["name"] == batch()["name"]
    assert list(returned) == list(batch())


@pytest.mark.parametrize(
    "transform", [tio.RandomFlip(axes=(0, 1, 2)), tio.RandomFlip(axes=("left", "anterior"))]
)
def test_label_and_image_stay_on_each_other(transform):
    """After flips, by a twin and by TorchIO, the label is what the image says, in new places."""
    flipped = Augmentation([transform])(batch(), SEEDS)
    assert torch.equal(flipped["label"]["data"] > 0, flipped["image"]["data"] > 1)
    assert not torch.equal(flipped["label"]["data"], batch()["label"]["data"])


def test_transforms_keep_their_order():
    """Doubling then adding is not adding then doubling, with a twin in between."""
    double = tio.Lambda(lambda x: 2 * x, types_to_apply=[tio.INTENSITY])
    add = tio.RandomNoise(mean=(3, 3), std=(0, 0))
    image = batch()["image"]["data"]
    for transforms, expected in (
        ([double, add, double], 2 * (2 * image + 3)),
        ([add, double, add], 2 * (image + 3) + 3),
    ):
        torch.testing.assert_close(
            Augmentation(transforms)(batch(), SEEDS)["image"]["data"], expected
        )


@pytest.mark.parametrize("transform", [tio.RandomNoise(), FromEverywhere()])
def test_places_in_the_list_draw_different_numbers(transform):
    """The same transform twice in the list does not do the same twice."""
    image = batch()["image"]["data"]
    once = Augmentation([transform])(batch(), SEEDS)["image"]["data"]
    twice = Augmentation([transform, transform])(batch(), SEEDS)["image"]["data"]
    assert ((twice - once) - (once - image)).abs().amax(dim=(1, 2, 3, 4)).min() > 1e-3


def test_an_unknown_transform_does_what_torchio_does():
    """What has no twin gives TorchIO's own result, spacings of the patches included."""
    transform = tio.Blur((0.5, 0.6, 0.7))
    given = batch()
    theirs = [
        transform(tio.ScalarImage(tensor=given["image"]["data"][n], affine=affine)).data
        for n, affine in enumerate(given["image"]["affine"])
    ]
    ours = Augmentation([transform])(batch(), SEEDS)["image"]["data"]
    torch.testing.assert_close(ours, torch.stack(theirs), rtol=0, atol=0)


def test_each_patch_is_blurred_by_its_own_spacing():
    """A twin takes millimeters by each patch's affine."""
    twin = tio.RandomBlur(std=(0.5, 0.5))
    theirs = Augmentation([tio.Blur((0.5, 0.5, 0.5))])(batch(), SEEDS)["image"]["data"]
    ours = Augmentation([twin])(batch(), SEEDS)["image"]["data"]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_transform_that_changes_in_place_is_seen():
    """copy=False, which makes TorchIO return the subject that it got, loses no change."""
    shift = tio.Lambda(lambda x: x + 1, types_to_apply=[tio.INTENSITY], copy=False)
    moved = Augmentation([shift])(batch(), SEEDS)["image"]["data"]
    torch.testing.assert_close(moved, batch()["image"]["data"] + 1)


def test_monai_transforms_repeat():
    """MONAI's transforms draw from generators of their own, which follow the seeds, too."""
    from monai.transforms import RandGaussianNoise, RandShiftIntensityd

    def noisy():
        return [
            tio.MonaiAdapter(RandGaussianNoise(prob=1.0), include=["image"]),
            tio.Compose([tio.MonaiAdapter(RandShiftIntensityd(["image"], 1.0, prob=1.0))]),
        ]

    first, second = (
        Augmentation(noisy())(batch(), SEEDS)["image"]["data"].as_subclass(torch.Tensor)
        for _ in range(2)
    )
    assert torch.equal(first, second)
    assert (first - batch()["image"]["data"]).abs().amax(dim=(1, 2, 3, 4)).min() > 1e-3


def test_all_patches_may_change_their_shape_alike():
    """A fixed crop or padding makes a new tensor, moves the affine and spares no patch."""
    given = Augmentation([tio.CropOrPad((8, 10, 10)), tio.RandomFlip(p=1)])(batch(), SEEDS)
    assert given["image"]["data"].shape == (5, 1, 8, 10, 10)
    assert given["label"]["data"].shape == (5, 1, 8, 10, 10)
    assert given["label"]["data"].dtype == torch.int16
    assert given["image"]["affine"][1][0, 3] == 2.0


def test_integers_without_a_type_are_labels_and_with_it_intensities():
    """Whole numbers get noise only where the image is said to hold intensities."""
    for entry, changed in (({}, False), ({"type": ["intensity"] * 2}, True)):
        counts = torch.full((2, 1, 4, 4, 4), 100, dtype=torch.int16)
        given = {"image": {"data": counts, "affine": np.stack([np.eye(4)] * 2), **entry}}
        noisy = Augmentation([tio.RandomNoise(std=(1, 1))])(given, SEEDS[:2])["image"]["data"]
        assert noisy.is_floating_point() == changed
        assert torch.equal(noisy, counts) != changed


def test_vectorized_tells_whether_all_have_twins():
    """The default list may run on the GPU; one transform without a twin keeps the list off it."""
    assert Augmentation(light_augmentation()).vectorized
    assert Augmentation([]).vectorized
    assert not Augmentation([*light_augmentation(), tio.RandomAffine()]).vectorized


def test_an_empty_list_changes_nothing():
    """Without transforms the batch comes back as it was."""
    assert torch.equal(Augmentation([])(batch(), SEEDS)["image"]["data"], batch()["image"]["data"])


def test_seeds_must_be_as_many_as_patches():
    """Another number of seeds is an error that tells both."""
    with pytest.raises(ValueError, match=r"4 seeds for 5 patches"):
        Augmentation([])(batch(), SEEDS[:4])


def test_patches_of_several_shapes_are_an_error():
    """A crop that only some patches get is an error that tells the shapes."""
    seeds = torch.arange(5)
    with pytest.raises(ValueError, match=r"`CropOrPad` left 'image' in shapes .*Give it p=1"):
        Augmentation([tio.CropOrPad(8, p=0.5)])(batch(), seeds)


def test_a_transform_must_keep_the_images():
    """An image that a transform adds cannot be collated, which is said."""
    with pytest.raises(ValueError, match=r"`RandomGamma` left \['image', 'label', 'before'\]"):
        Augmentation([tio.RandomGamma(keep={"image": "before"})])(batch(), SEEDS)

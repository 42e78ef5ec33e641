"""Samples of both stages, their order and batches."""
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from npz_files import write_2d, write_3d

from medficient_mini.inference.geometry import box_of_mask, boxes_to_network, to_network
from medficient_mini.training.augment import Objects, mask_to_network
from medficient_mini.training.cases import list_slices, scan_cases, with_neighbours
from medficient_mini.training.samples import SliceDataset, epoch_keys, load_embedding, make_loader, save_embedding
from medficient_mini.training.volume_cache import SliceCache

IMAGE, BARE, EMPTY, VOLUME = range(4)


@pytest.fixture
def cases(tmp_path):
    """A 2D image, one without masks, one without any label, and a volume."""
    write_2d(tmp_path / "npz", "2D_US_a_1")
    write_2d(tmp_path / "npz", "2D_US_b_1", gts=None, seed=1)
    write_2d(tmp_path / "npz", "2D_US_d_1", labels=0)
    write_3d(tmp_path / "npz", "3D_CT_c_1")
    return scan_cases(tmp_path / "npz")


@pytest.fixture
def cache(tmp_path):
    return SliceCache(tmp_path / "cache", 100)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_samples_depend_on_seed_epoch_and_position_alone(cases, cache):
    slices = with_neighbours(list_slices(cases, cache, True))
    options = dict(mode="full", objects=Objects(2, 32, 32), in_use=0.5, photometric=True)
    first, again, other = (SliceDataset(slices, cache, (32, "bilinear"), seed=seed, **options)
                           for seed in (1, 1, 2))
    assert all(same(first[e, p, p % 6], again[e, p, p % 6]) for e in range(2) for p in range(12))
    assert not all(same(first[0, p, 0], first[1, p, 0]) for p in range(6))
    assert not all(same(first[0, p, 0], other[0, p, 0]) for p in range(6))


def test_a_sample_without_augmentation_holds_the_image_its_boxes_and_masks(cases, cache):
    dataset = SliceDataset([(cases[IMAGE], 0)], cache, (128, "bilinear"), Objects(3, 64, 256, shift=0))
    sample, (image, gts) = dataset[0, 0, 0], cache.image_and_labels(cases[IMAGE])
    assert torch.equal(sample["image"], to_network(image, 128)) and sample["masks"].dtype == torch.uint8
    assert sample["box_valid"].tolist() == [True, True, False]
    assert not sample["boxes"][2:].any() and not sample["masks"][2:].any()
    tight = [boxes_to_network(box_of_mask(gts == label)[None], 40, 60, 256)[0] for label in (1, 2)]
    labels = [[torch.equal(box, one) for one in tight].index(True) + 1 for box in sample["boxes"][:2]]
    assert sorted(labels) == [1, 2]
    assert all(np.array_equal(m, mask_to_network(gts == k, 64)) for m, k in zip(sample["masks"], labels))


def test_volumes_are_prompted_as_in_use_and_taught_where_objects_end(cases, cache):
    slices = [(cases[VOLUME], z) for z in range(5)]                            # labels in slices 1 to 3
    options = dict(objects=Objects(2, 32, 32, shift=0), mode="full")
    dataset = SliceDataset(slices, cache, (32, "bilinear"), in_use=1.0, **options)
    for position in range(8):
        samples = [dataset[0, position, k] for k in range(5)]
        assert all(sample["box_valid"].any() for sample in samples)
        assert [bool(sample["masks"].any()) for sample in samples] == [False, True, True, True, False]
    never = SliceDataset(slices, cache, (32, "bilinear"), **options)
    assert not never[0, 0, 0]["box_valid"].any() and never[0, 0, 3]["box_valid"].all()


def test_student_and_teacher_see_the_same_image(cases, cache):
    dataset = SliceDataset([(cases[BARE], 0)], cache, (64, "bilinear"), Objects(1, 32, 64), mode="flips",
                           teacher_input=(32, "area"))
    image, seen = cache.image_and_labels(cases[BARE])[0], Counter()
    for position in range(20):
        sample = dataset[0, position, 0]
        for flip in [(1, 1), (1, -1), (-1, 1), (-1, -1)]:
            flipped = np.ascontiguousarray(image[::flip[0], ::flip[1]])
            if torch.equal(sample["image"], to_network(flipped, 64, "bilinear")):
                seen[flip] += torch.equal(sample["teacher_image"], to_network(flipped, 32, "area"))
    assert len(seen) == 4 and seen.total() == 20 and "embedding" not in sample and not sample["box_valid"].any()


def test_samples_name_the_file_of_their_embedding(cases, cache, tmp_path):
    """One for each of the four flips; none for what is otherwise changed, and no network would say the same of."""
    def names(**options):
        dataset = SliceDataset([(cases[IMAGE], 0)], cache, (32, "bilinear"), embeddings=tmp_path, **options,
                               teacher_input=(32, "bilinear"))
        samples = [dataset[0, position, 0] for position in range(20)]
        images = {sample["embedding_file"]: sample["teacher_image"] for sample in samples}
        assert all(torch.equal(images[sample["embedding_file"]], sample["teacher_image"])
                   for sample in samples if sample["embedding_file"])
        return [Path(sample["embedding_file"]).name for sample in samples]

    assert set(names()) == {"0.npy"}
    assert set(names(mode="flips")) == {"0.npy", "0-h.npy", "0-v.npy", "0-hv.npy"}
    assert 0 < names(mode="full").count("") < 20
    assert 0 < names(photometric=True).count("0.npy") < 15 and set(names(photometric=True)) == {"", "0.npy"}


def test_embeddings_are_kept_and_a_damaged_one_is_one_line(tmp_path):
    embedding = torch.randn(256, 64, 64)
    kept = save_embedding(tmp_path / "case" / "0.npy", embedding)
    assert torch.equal(kept, load_embedding(tmp_path / "case" / "0.npy")) and torch.allclose(kept.float(), embedding, atol=1e-2)
    path = tmp_path / "case" / "0.npy"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="0.npy: embedding: expected numbers"):
        load_embedding(path)


def test_a_full_disk_costs_the_kept_embedding_alone(tmp_path, monkeypatch):
    def full(path, array):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    embedding = torch.ones(256, 64, 64)
    assert torch.equal(save_embedding(tmp_path / "case" / "0.npy", embedding), embedding.half())
    assert not list((tmp_path / "case").iterdir())


def indices_of(*arguments, **options):
    return [index for _, _, index in epoch_keys(*arguments, **options)]


def test_epochs_cover_everything_in_turn():
    epoch = epoch_keys(10, 5, 0, 10)
    assert sorted(i for _, _, i in epoch) == list(range(10)) and epoch == epoch_keys(10, 5, 0, 10)
    assert [p for _, p, _ in epoch] == list(range(10)) and {e for e, _, _ in epoch} == {0}
    assert indices_of(10, 5, 1, 10) != [i for _, _, i in epoch] and {e for e, _, _ in epoch_keys(10, 5, 1, 10)} == {1}
    counts = Counter(i for number in range(5) for i in indices_of(10, 1, number, 4))
    assert counts == {i: 2 for i in range(10)}
    for length in (3, 7, 11, 25):                                              # one stream, however it is cut
        stream = [i for number in range(10) for i in indices_of(10, 1, number, length)]
        assert all(sorted(stream[start:start + 10]) == list(range(10)) for start in range(0, len(stream) - 9, 10))
    assert Counter(indices_of(10, 1, 0, 30)) == {i: 3 for i in range(10)}


def test_weights_count():
    drawn = Counter(indices_of(3, 0, 0, 5000, weights=np.array([0.8, 0.2, 0])))
    assert drawn[0] == pytest.approx(4000, abs=150) and drawn[0] + drawn[1] == 5000


def test_loader_is_the_same_with_and_without_workers_and_takes_its_keys_anew(cases, cache):
    slices = list_slices(cases, cache, False)
    dataset = SliceDataset(slices, cache, (32, "bilinear"), mode="flips", objects=Objects(1, 32, 32))
    epochs = [epoch_keys(len(slices), 0, epoch, len(slices))[2:] for epoch in (0, 1)]
    expected = [[dataset[key]["image"] for key in keys] for keys in epochs]
    batches = []
    for workers in (0, 2):
        keys = []
        loader = make_loader(dataset, keys, 3, workers)
        for epoch, images in zip(epochs, expected):
            keys[:] = epoch
            batches.append(list(loader))
            assert torch.equal(torch.cat([batch["image"] for batch in batches[-1]]), torch.stack(images))
    assert [len(batch["image"]) for batch in batches[0]] == [3, 3, 1]
    assert all(same(a, b) for one, two in zip(batches[:2], batches[2:]) for a, b in zip(one, two, strict=True))

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from medclr.data.index_content import ContentDigest, content_of
from medclr.data.index_gzip import GzipStream

VOLUME = np.random.default_rng(0).integers(-500, 500, (7, 8, 9)).astype(np.int16)


@pytest.mark.parametrize("dtype", [np.int32, np.float32, np.float64, ">i2"])
@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 0, 1), (1, 0, 2)])
@pytest.mark.parametrize("flips", [(1, 1, 1), (-1, 1, 1), (-1, -1, -1)])
def test_type_and_order_of_axes_do_not_count(dtype: object, axes: tuple[int, ...], flips: tuple[int, ...]) -> None:
    stored = VOLUME.transpose(axes)[tuple(slice(None, None, flip) for flip in flips)].astype(dtype)
    affine = np.zeros((4, 4))
    affine[3, 3] = 1
    for column, (axis, flip) in enumerate(zip(axes, flips, strict=True)):
        affine[axis, column] = flip * 1.5
    assert content_of(stored, affine) == content_of(VOLUME, np.eye(4))


@pytest.mark.parametrize(
    "change",
    [
        lambda volume: volume + 1,
        lambda volume: volume[::-1],
        lambda volume: volume.transpose(1, 0, 2),
        lambda volume: np.roll(volume, 1, axis=2),
        lambda volume: volume[:, :, :-1],
        lambda volume: np.where(np.arange(9) == 4, volume[::-1, ::-1], volume),
    ],
)
def test_other_voxels_count(change: object) -> None:
    assert content_of(change(VOLUME), np.eye(4)) != content_of(VOLUME, np.eye(4))  # type: ignore[operator]


def test_masks_of_one_voxel_each_are_told_apart() -> None:
    digests = set()
    for place in np.ndindex(5, 5, 5):
        mask = np.zeros((5, 5, 5), np.uint8)
        mask[place] = 1
        digests.add(content_of(mask, np.eye(4)))
    assert len(digests) == 125


def test_pieces_give_the_digest_of_the_whole() -> None:
    rows = VOLUME.reshape(7, -1, order="F").T.astype(np.float32)
    for size in (1, 5, 72):
        digest = ContentDigest(VOLUME.shape, np.eye(4))
        for start in range(0, len(rows), size):
            digest.update(np.ascontiguousarray(rows[start : start + size]))
        assert digest.hexdigest() == content_of(VOLUME, np.eye(4))


CONTENT = np.random.default_rng(1).integers(0, 9, 700_000).astype(np.uint8).tobytes()


@pytest.mark.parametrize("name", ["one", "members", "padded"])
@pytest.mark.parametrize("size", [999, 1 << 18])
def test_a_compressed_file_is_read_as_gzip_reads_it(tmp_path: Path, name: str, size: int) -> None:
    packed = {
        "one": gzip.compress(CONTENT),
        "members": gzip.compress(CONTENT[:300_000]) + gzip.compress(CONTENT[300_000:]),
        "padded": gzip.compress(CONTENT) + b"\0" * 300,
    }[name]
    (tmp_path / "a.gz").write_bytes(packed)
    with GzipStream(tmp_path / "a.gz") as stream:
        stream.seek(10)
        pieces = list(iter(lambda: stream.read(size), b""))
    assert b"".join(pieces) == CONTENT[10:]
    assert {len(piece) for piece in pieces[:-1]} <= {size}


@pytest.mark.parametrize(("end", "kind"), [(-1, EOFError), (-9, EOFError), (1000, EOFError)])
def test_a_compressed_file_that_breaks_off_is_noticed(tmp_path: Path, end: int, kind: type[Exception]) -> None:
    (tmp_path / "a.gz").write_bytes(gzip.compress(CONTENT)[:end])
    with GzipStream(tmp_path / "a.gz") as stream, pytest.raises(kind):
        stream.seek(len(CONTENT) + 1)


@pytest.mark.parametrize("place", [0, 5000, -6])
def test_a_damaged_compressed_file_is_noticed(tmp_path: Path, place: int) -> None:
    packed = bytearray(gzip.compress(CONTENT))
    packed[place] ^= 0xFF
    (tmp_path / "a.gz").write_bytes(bytes(packed))
    with GzipStream(tmp_path / "a.gz") as stream, pytest.raises((gzip.BadGzipFile, EOFError)):
        stream.seek(len(CONTENT) + 1)

"""Headers of files that are whole, odd, damaged, or no DICOM at all."""

from __future__ import annotations

import io
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from pydicom import dcmread
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence as Items
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

from medclr.data import dicom_bounds, dicom_parse
from medclr.data.dicom_header import DicomHeader, NotDicom, read_header
from medclr.data.dicom_identity import KEYWORDS
from medclr.errors import ScanError
from tests.data.dicom_files import (
    anatomy,
    macro,
    placed,
    shared_groups,
    volumes_in,
    voxels_of,
    write_enhanced,
    write_stack,
)


def saved(tmp_path: Path, **tags: object) -> Path:
    def change(image: Dataset, _: int) -> None:
        for key, value in tags.items():
            setattr(image, key, value)

    return write_stack(tmp_path / "files", anatomy((9, 7, 1)), change=change)[0]


def wheel(name: str) -> Path:
    return Path(str(get_testdata_file(name)))


@pytest.mark.parametrize("content", [b"", b"hello", b"\x89PNG\r\n" + bytes(300), bytes(5000), b"a,b\n1,2\n" * 100])
def test_another_kind_of_file_is_not_dicom(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(NotDicom):
        read_header(tmp_path / "file", "file")


@pytest.mark.parametrize("name", ["DICOMDIR", "DICOMDIR-implicit", "DICOMDIR-bigEnd"])
def test_a_dicomdir_is_named_as_what_it_is(name: str) -> None:
    with pytest.raises(ScanError, match="DICOMDIR, not an image"):
        read_header(wheel(name), name)


@pytest.mark.parametrize("name", ["test-SR.dcm", "rtplan.dcm", "waveform_ecg.dcm"])
def test_an_object_without_pixels_is_no_image(name: str) -> None:
    with pytest.raises(ScanError, match="holds no image"):
        read_header(wheel(name), name)


@pytest.mark.parametrize(
    "syntax",
    [ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian],
)
def test_every_way_to_write_a_file_gives_the_same_volume(tmp_path: Path, syntax: str) -> None:
    voxels = anatomy()
    for path in write_stack(tmp_path, voxels):
        image = dcmread(path)
        little, implicit = syntax != ExplicitVRBigEndian, syntax == ImplicitVRLittleEndian
        if not little:
            image.PixelData = image.pixel_array.astype(">i2").tobytes()
        image.file_meta.TransferSyntaxUID = syntax
        if little:
            image.save_as(path, implicit_vr=implicit, little_endian=True, enforce_file_format=True)
        else:
            fresh = Dataset()  # of values, since raw elements would keep their order of bytes
            for element in image:
                fresh.add_new(element.tag, element.VR, element.value)
            fresh.file_meta = image.file_meta
            fresh.save_as(path, implicit_vr=False, little_endian=False, enforce_file_format=True)
    volumes, refusals = volumes_in(tmp_path)
    assert refusals == {}
    np.testing.assert_array_equal(voxels_of(tmp_path, volumes[0])[0], voxels)


@pytest.mark.parametrize("meta", [True, False])
@pytest.mark.parametrize("implicit", [True, False])
def test_a_file_without_preamble_is_read(tmp_path: Path, meta: bool, implicit: bool) -> None:
    voxels = anatomy()
    for path in write_stack(tmp_path, voxels):
        image = dcmread(path)
        out = io.BytesIO()
        if meta:
            image.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian
            image.save_as(out, implicit_vr=implicit, little_endian=True, enforce_file_format=True)
            path.write_bytes(out.getvalue()[132:])
        else:
            bare = Dataset(image)
            bare.save_as(out, implicit_vr=implicit, little_endian=True)
            path.write_bytes(out.getvalue())
    volumes, refusals = volumes_in(tmp_path)
    assert refusals == {}
    np.testing.assert_array_equal(voxels_of(tmp_path, volumes[0])[0], voxels)


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path)
    whole = path.read_bytes()
    for length in range(140, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises((ScanError, NotDicom)):
            read_header(path, "file")


def test_overlays_above_the_stored_bits_are_masked(tmp_path: Path) -> None:
    voxels = (anatomy() % 2048 - 1024).astype(np.int16)
    for path in write_stack(tmp_path, voxels):
        image = dcmread(path)
        image.BitsStored, image.HighBit = 12, 11
        stored = image.pixel_array.view(np.uint16) & 0x0FFF | 0x5000
        image.PixelData = stored.tobytes()
        image.save_as(path)
    volumes, _ = volumes_in(tmp_path)
    np.testing.assert_array_equal(voxels_of(tmp_path, volumes[0])[0], voxels)


def test_a_deflated_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dicom_parse, "LARGEST_INFLATED", 1 << 22)
    path = saved(tmp_path)
    image = dcmread(path)
    image.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    image.save_as(path, implicit_vr=False, little_endian=True)
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    bomb = packer.compress(bytes(1 << 24)) + packer.flush()
    start = path.read_bytes()
    place = 132 + 12 + struct.unpack("<I", start[140:144])[0]
    path.write_bytes(start[:place] + bomb)
    with pytest.raises(ScanError, match="absurdly large"):
        read_header(path, "file")


def test_a_header_that_takes_too_long_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path)
    monkeypatch.setattr(dicom_parse, "MOST_SECONDS", -1.0)
    with pytest.raises(ScanError, match="too long"):
        read_header(path, "file")


def test_thousands_of_frames_are_read_in_time(tmp_path: Path) -> None:
    frames = []
    pixels = np.zeros((1, 1), dtype=np.int16)
    for number in range(4000):
        group = placed((0, 0, number % 100), StackID="1", TemporalPositionIndex=number // 100 + 1)
        group.MREchoSequence = Items([macro(EffectiveEchoTime=3.0)])
        frames.append((pixels, group))
    path = write_enhanced(tmp_path / "file", frames, shared_groups())
    begin = time.perf_counter()
    header = read_header(path, "file")
    assert len(header.frames) == 4000
    assert time.perf_counter() - begin < dicom_bounds.MOST_SECONDS
    assert DicomHeader.from_json(header.to_json()) == header


@pytest.mark.parametrize(
    ("tags", "age"),
    [
        ({"PatientAge": "045Y"}, 45),
        ({"PatientAge": "006M"}, 0.5),
        ({"PatientAge": "14"}, None),
        ({"PatientBirthDate": "19800101", "StudyDate": "20200101"}, 40),
        ({"PatientBirthDate": "20300101", "StudyDate": "20200101"}, None),
        ({}, None),
    ],
)
def test_the_age_comes_from_its_tag_or_from_dates(tmp_path: Path, tags: dict[str, str], age: float | None) -> None:
    found = read_header(saved(tmp_path, **tags), "file").age
    assert found == (None if age is None else pytest.approx(age, abs=0.01))


def test_the_sequence_comes_from_coded_tags_alone(tmp_path: Path) -> None:
    tags = {"SeriesDescription": "T2 FLAIR", "ProtocolName": "T2", "ScanningSequence": ["SE", "IR"]}
    assert read_header(saved(tmp_path, **tags), "file").sequence == "se ir"
    assert read_header(saved(tmp_path, SeriesDescription="T1"), "file").sequence is None
    assert read_header(saved(tmp_path, AcquisitionContrast="DIFFUSION"), "file").sequence == "diffusion"


SECRETS = {
    "PatientName": "Wxyzq^Secretname",
    "PatientID": "SECRETID77",
    "OtherPatientIDs": ["SECRETOTHER1", "SECRETOTHER2"],
    "PatientAddress": "12 Secretstreet",
    "PatientComments": "secretcomment",
    "AccessionNumber": "SECRETACC",
    "InstitutionName": "Secret Hospital",
    "ReferringPhysicianName": "Secretdoctor^A",
    "StudyDescription": "secretstudy",
    "SeriesDescription": "secretseries",
    "ImageComments": "secretimage",
    "StudyDate": "19991231",
    "PatientBirthDate": "19010203",
    "AcquisitionTime": "235911",
    "StationName": "SECRETSTATION",
}


def test_private_values_are_in_the_identity_and_nowhere_else(tmp_path: Path) -> None:
    path = saved(tmp_path, **SECRETS)
    header = read_header(path, "file")
    for keyword in SECRETS:
        assert (keyword in header.identity) == (keyword in KEYWORDS)
    plain = header.to_json().lower()
    for value in header.identity.values():
        plain = plain.replace(f'"{value.lower()}"'.replace("\\", "\\\\"), "")
    assert "secret" not in plain
    assert "secret" not in repr(header).lower()
    write_stack(
        tmp_path / "series", anatomy(), change=lambda image, _: [setattr(image, *item) for item in SECRETS.items()]
    )
    for volume in volumes_in(tmp_path / "series")[0]:
        text = volume.to_json().lower()
        assert not any(word in text for word in ("secret", "1999", "1901", "235911"))


def test_errors_of_damaged_files_quote_no_value(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    path = saved(tmp_path, **SECRETS)
    whole = path.read_bytes()
    random = np.random.default_rng(0)
    texts = []
    for _ in range(300):
        changed = bytearray(whole)
        for place in random.integers(132, 900, 3):
            changed[place] = random.integers(0, 256)
        path.write_bytes(changed)
        try:
            read_header(path, "file")
        except (ScanError, NotDicom) as error:
            texts.append(f"{error} {error.__cause__} {'' if error.__suppress_context__ else error.__context__}")
    texts += [str(warning.message) for warning in recwarn.list] + [caplog.text]
    assert len(texts) > 20
    assert not [text for text in texts if "secret" in text.lower() or "19991231" in text]


def test_other_ids_of_a_sequence_join_the_identity(tmp_path: Path) -> None:
    path = saved(tmp_path, OtherPatientIDsSequence=[macro(PatientID="A1"), macro(PatientID="B2")])
    assert read_header(path, "file").identity["OtherPatientIDs"] == "A1\\B2"

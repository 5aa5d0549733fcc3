from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from monai.bundle import ConfigParser

from medclr.affinity import Affinity, Gaussian, Related, Same
from medclr.errors import ConfigError
from medclr.losses import info_nce

# Two views each of three samples; samples 0 and 1 are two scans' pairs of patient 7, and patient 9 has one.
SAMPLE = [0, 0, 1, 1, 2, 2]
PATIENT = [7, 7, 7, 7, 9, 9]
VIEW = [0, 1, 0, 1, 0, 1]
# i: itself, +: positive, p: same patient, .: negative
TRUTH = ["i+pp..", "+ipp..", "ppi+..", "pp+i..", "....i+", "....+i"]


def meta(sample: list[int], patient: list[int], view: list[int]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(values) for name, values in (("sample", sample), ("patient", patient), ("view", view))}


@pytest.mark.parametrize(
    ("same_patient", "positive", "ignored"),
    [("ignored", "+", "ip"), ("positive", "+p", "i"), ("negative", "+", "i")],
)
def test_the_truth_table(same_patient: Any, positive: str, ignored: str) -> None:
    table = meta(SAMPLE, PATIENT, VIEW)
    positives, left_out = Affinity(same_patient=same_patient)(table, table)
    assert positives.dtype == torch.float32
    assert left_out.dtype == torch.bool
    assert positives.tolist() == [[float(cell in positive) for cell in row] for row in TRUTH]
    assert left_out.tolist() == [[cell in ignored for cell in row] for row in TRUTH]


def test_the_default_ignores_a_patients_other_samples() -> None:
    table = meta(SAMPLE, PATIENT, VIEW)
    for one, other in zip(Affinity()(table, table), Affinity(same_patient="ignored")(table, table), strict=True):
        assert torch.equal(one, other)


def test_queries_and_keys_may_differ() -> None:
    queries = meta([1, 2], [7, 9], [0, 1])
    positives, ignored = Affinity()(queries, meta(SAMPLE, PATIENT, VIEW))
    assert positives.tolist() == [[0, 0, 0, 1, 0, 0], [0, 0, 0, 0, 1, 0]]
    assert ignored.tolist() == [[True, True, True, False, False, False], [False, False, False, False, False, True]]


@given(
    rows=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 2), st.integers(0, 1)), min_size=1, max_size=12),
    block=st.integers(1, 5),
    same_patient=st.sampled_from(["ignored", "positive", "negative"]),
)
def test_blocks_of_rows_are_the_rows_of_the_whole(rows: list[tuple[int, ...]], block: int, same_patient: Any) -> None:
    table = meta(*[list(column) for column in zip(*rows, strict=True)])
    affinity = Affinity(same_patient=same_patient)
    positives, ignored = affinity(table, table)
    assert not (positives.bool() & ignored).any()
    assert ignored.diagonal().all()
    pairs = affinity.pairs(table, table)
    blocks = [pairs(slice(start, start + block)) for start in range(0, len(rows), block)]
    assert torch.equal(torch.cat([part for part, _ in blocks]), positives)
    assert torch.equal(torch.cat([part for _, part in blocks]), ignored)


@pytest.mark.parametrize("same_patient", ["ignore", "", None, True])
def test_another_setting_is_refused(same_patient: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        Affinity(same_patient=same_patient)
    assert "ignored, positive or negative" in str(caught.value)


def test_a_weight_makes_weaker_positives_of_a_patients_other_samples() -> None:
    table = meta(SAMPLE, PATIENT, VIEW)
    positives, ignored = Affinity(same_patient=0.25)(table, table)
    assert positives.tolist() == [[{"+": 1.0, "p": 0.25}.get(cell, 0.0) for cell in row] for row in TRUTH]
    assert ignored.tolist() == [[cell == "i" for cell in row] for row in TRUTH]
    for weight, word in ((0, "negative"), (1, "positive")):
        for one, other in zip(
            Affinity(same_patient=weight)(table, table),
            Affinity(same_patient=word)(table, table),  # type: ignore[arg-type]
            strict=True,
        ):
            assert torch.equal(one, other)


def test_a_queues_keys_are_of_no_sample_but_of_a_patient() -> None:
    queries = meta([0, 1, 2], [7, 9, -1], [0, 0, 0])
    queued = meta([-1, -1, -1, -1], [7, 9, 8, -1], [1, 1, 1, 1])
    positives, ignored = Affinity()(queries, queued)
    assert not positives.any()
    assert ignored.tolist() == [[True, False, False, False], [False, True, False, False], [False] * 4]
    again, _ = Affinity()(queued, queued)  # nor of each other's
    assert not again.any()


# Against plain loops

CODES = ("scan", "study", "modality", "sequence", "sex", "label")
NUMBERS = ("days", "age")
Record = dict[str, Any]
BASES: dict[str, Callable[[], Affinity]] = {
    "default": lambda: Affinity(),
    "negative": lambda: Affinity(same_patient="negative"),
    "weight": lambda: Affinity(same_patient=0.3),
    "same scan": lambda: Affinity(related=[Related("positive", same="scan")]),
    "same study": lambda: Affinity(related=[Related(0.5, same="study_id")]),
    "across modality": lambda: Affinity(related=[Related(different="modality")], same_patient="negative"),
    "within days": lambda: Affinity(related=[Related(within_days=60, least_days=5)]),
    "fading": lambda: Affinity(related=[Related(0.8, within_days=90, bandwidth=30)], same_patient=0.1),
    "label": lambda: Affinity(kernels=[Same("label")], same_patient="kernels"),
    "age": lambda: Affinity(kernels=[Gaussian("age", 4.0)]),
    "age and sex": lambda: Affinity(kernels=[Gaussian("age", 4.0), Same("sex", 0.25)], same_patient="positive"),
    "all": lambda: Affinity(
        related=[
            Related("ignored", same="scan"),
            Related("positive", same="study_id", different=["modality", "sequence"]),
            Related("kernels", least_days=80),
            Related(0.7, same="sequence", within_days=60, bandwidth=20),
            Related("negative", different="modality"),
        ],
        kernels=[Gaussian("age", 4.0), Same("sex", 0.25), Gaussian("days", 50), Same("label")],
        same_patient=0.4,
    ),
}


def alike(one: Record, other: Record, column: str) -> bool | None:
    """None: not known."""
    name = "study" if column == "study_id" else column
    return None if one[name] is None or other[name] is None else one[name] == other[name]


def expected(affinity: Affinity, one: Record, other: Record) -> float | None:
    """The weight of one pair, None for ignored; from the rule's words, with no tensor."""
    if one["sample"] == other["sample"] is not None:
        return None if one["view"] == other["view"] else 1.0
    counts: Any = "kernels"
    if one["patient"] == other["patient"]:
        counts = affinity.same_patient
        days = None if one["days"] is None or other["days"] is None else abs(one["days"] - other["days"])
        for relation in affinity.related:
            held = all(alike(one, other, column) is True for column in relation.same)
            held = held and all(alike(one, other, column) is False for column in relation.different)
            if relation.within_days is not None or relation.least_days > 0:
                most = math.inf if relation.within_days is None else relation.within_days
                held = held and days is not None and relation.least_days <= days <= most
            if held:
                counts = relation.counts
                if relation.bandwidth is not None:
                    assert days is not None
                    counts = {"positive": 1.0}.get(counts, counts) * math.exp(-((days / relation.bandwidth) ** 2) / 2)
                break
    if counts == "ignored":
        return None
    if counts != "kernels":
        return {"positive": 1.0, "negative": 0.0}.get(counts, counts)
    weights = []
    for kernel in affinity.kernels:
        same = alike(one, other, kernel.columns[0])
        if same is not None and isinstance(kernel, Same):
            weights.append(1.0 if same else kernel.otherwise)
        elif same is not None and isinstance(kernel, Gaussian):
            difference = one[kernel.column] - other[kernel.column]
            weights.append(math.exp(-((difference / kernel.bandwidth) ** 2) / 2))
    return math.prod(weights) if weights else 0.0


def tensors(records: list[Record]) -> dict[str, torch.Tensor]:
    table = {
        name: torch.tensor([-1 if record[name] is None else record[name] for record in records])
        for name in ("sample", "patient", "view", *CODES)
    }
    for name in NUMBERS:
        values = [math.nan if record[name] is None else record[name] for record in records]
        table[name] = torch.tensor(values, dtype=torch.float64)
    return table


codes = st.one_of(st.none(), st.integers(0, 2))
record = st.fixed_dictionaries(
    {
        "sample": st.integers(0, 5),
        "patient": st.integers(0, 2),
        "view": st.integers(0, 1),
        **dict.fromkeys(CODES, codes),
        "days": st.one_of(st.none(), st.integers(-50, 150)),
        "age": st.one_of(st.none(), st.floats(40, 60)),
    }
)
records = st.lists(record, min_size=1, max_size=10)
any_base = st.sampled_from(sorted(BASES))


@given(name=any_base, queries=records, candidates=records)
def test_every_pair_counts_as_plain_loops_say(name: str, queries: list[Record], candidates: list[Record]) -> None:
    affinity = BASES[name]()
    positives, ignored = affinity(tensors(queries), tensors(candidates))
    assert positives.dtype == torch.float32
    assert positives.shape == ignored.shape == (len(queries), len(candidates))
    for row, one in enumerate(queries):
        for column, other in enumerate(candidates):
            weight = expected(affinity, one, other)
            assert bool(ignored[row, column]) == (weight is None)
            assert float(positives[row, column]) == pytest.approx(weight or 0.0, abs=1e-6)


@given(name=any_base, table=records)
def test_pairs_are_symmetric_weights_from_0_to_1_and_never_both(name: str, table: list[Record]) -> None:
    positives, ignored = BASES[name]()(tensors(table), tensors(table))
    assert torch.equal(positives, positives.T)
    assert torch.equal(ignored, ignored.T)
    assert ((positives >= 0) & (positives <= 1)).all()
    assert not (positives.bool() & ignored).any()
    assert ignored.diagonal().all()


@given(name=any_base, table=records, seed=st.integers(0, 100))
def test_the_order_of_queries_and_keys_does_not_matter(name: str, table: list[Record], seed: int) -> None:
    affinity, whole = BASES[name](), tensors(table)
    random = torch.Generator().manual_seed(seed)
    rows, columns = (torch.randperm(len(table), generator=random) for _ in range(2))
    shuffled = [{key: value[order] for key, value in whole.items()} for order in (rows, columns)]
    for part, whole_part in zip(affinity(*shuffled), affinity(whole, whole), strict=True):
        assert torch.allclose(part, whole_part[rows][:, columns], rtol=1e-6, atol=0)


@given(name=any_base, table=records, block=st.integers(1, 4))
def test_blocks_of_rows_are_those_of_the_whole_with_all_parts(name: str, table: list[Record], block: int) -> None:
    affinity, whole = BASES[name](), tensors(table)
    pairs = affinity.pairs(whole, whole)
    blocks = [pairs(slice(start, start + block)) for start in range(0, len(table), block)]
    for which, part in enumerate(affinity(whole, whole)):
        assert torch.allclose(torch.cat([parts[which] for parts in blocks]), part, rtol=1e-6, atol=0)


PARTS: dict[str, tuple[Any, list[str]]] = {
    "same study": (Related(0.5, same="study_id"), ["study"]),
    "across modality": (Related("positive", different="modality"), ["modality"]),
    "within days": (Related("positive", within_days=60), ["days"]),
    "several": (Related("positive", same="sequence", least_days=1), ["sequence", "days"]),
    "age": (Gaussian("age", 4.0), ["age"]),
    "sex": (Same("sex"), ["sex"]),
}


@given(
    part=st.sampled_from(sorted(PARTS)),
    with_others=st.booleans(),
    queries=records,
    candidates=records,
    lost=st.data(),
)
def test_a_missing_value_leaves_the_pair_as_without_that_part(
    part: str, with_others: bool, queries: list[Record], candidates: list[Record], lost: st.DataObject
) -> None:
    made, entries = PARTS[part]
    entry = lost.draw(st.sampled_from(entries))
    queries = [{**record, entry: None} for record in queries]
    related = [Related("negative", different="label")] if with_others else []
    kernels = [Same("label", 0.2), Gaussian("days", 9)] if with_others and entry != "days" else []
    without = Affinity(related=related, kernels=kernels, same_patient=0.4)
    more = {"related": [made, *related]} if isinstance(made, Related) else {"kernels": [made, *kernels]}
    plus = Affinity(**{"related": related, "kernels": kernels, "same_patient": 0.4, **more})
    for one, other in ((queries, candidates), (candidates, queries)):  # missing on either side
        for got, wanted in zip(plus(tensors(one), tensors(other)), without(tensors(one), tensors(other)), strict=True):
            assert torch.equal(got, wanted)


def test_a_patients_scans_are_never_negatives_by_default_whatever_the_kernels_say() -> None:
    table = {**meta(SAMPLE, PATIENT, VIEW), "sex": torch.tensor([0, 0, 1, 1, 1, 1])}
    positives, ignored = Affinity(kernels=[Same("sex")])(table, table)
    same_patient = torch.tensor(PATIENT)[:, None] == torch.tensor(PATIENT)
    assert (positives.bool() | ignored)[same_patient].all()
    assert positives[2:4, 4:].all()  # two patients of one sex


# Published losses


def test_labels_give_the_supervised_contrastive_loss() -> None:
    """Equation 2 of arXiv:2004.11362, L_out, written out."""
    z = torch.nn.functional.normalize(torch.randn(10, 6, generator=torch.Generator().manual_seed(1)), dim=1)
    labels = [0, 0, 1, 1, 0, 0, 2, 2, 1, 1]
    table = {
        **meta([0, 0, 1, 1, 2, 2, 3, 3, 4, 4], [0, 0, 1, 1, 2, 2, 3, 3, 4, 4], [0, 1] * 5),
        "label": torch.tensor(labels),
    }
    total = 0.0
    for i in range(10):
        positive = [p for p in range(10) if p != i and labels[p] == labels[i]]
        evidence = math.log(sum(math.exp(float(z[i] @ z[a]) / 0.2) for a in range(10) if a != i))
        total -= sum(float(z[i] @ z[p]) / 0.2 - evidence for p in positive) / len(positive)
    loss = info_nce(z, z, Affinity(kernels=[Same("label")]).pairs(table, table), 0.2)
    assert float(loss) == pytest.approx(total / 10, rel=1e-5)


def test_a_gaussian_gives_the_y_aware_loss() -> None:
    """Equation 3 of arXiv:2106.08808: view 1 of each against view 2 of all, with the kernel's normalised weights."""
    random = torch.Generator().manual_seed(2)
    one, two = (torch.nn.functional.normalize(torch.randn(5, 6, generator=random), dim=1) for _ in range(2))
    ages, sigma, tau = [40.0, 44.0, 52.0, 60.0, 61.5], 5.0, 0.1
    total = 0.0
    for i in range(5):
        weights = [math.exp(-((age - ages[i]) ** 2) / (2 * sigma**2)) for age in ages]
        evidence = math.log(sum(math.exp(float(one[i] @ two[j]) / tau) for j in range(5)))
        for k in range(5):
            total -= weights[k] / sum(weights) * (float(one[i] @ two[k]) / tau - evidence)
    number = list(range(5))
    query = {**meta(number, number, [0] * 5), "age": torch.tensor(ages)}
    key = {**meta(number, number, [1] * 5), "age": torch.tensor(ages)}
    loss = info_nce(one, two, Affinity(kernels=[Gaussian("age", sigma)]).pairs(query, key), tau)
    assert float(loss) == pytest.approx(total / 5, rel=1e-5)


# What it reads, and errors


def test_it_says_what_it_reads() -> None:
    assert Affinity().needs == ("sample", "patient", "view")
    assert Affinity().columns == ()
    affinity = BASES["all"]()
    assert affinity.columns == ("study_id", "modality", "sequence", "days", "age", "sex", "label")
    assert affinity.needs == (
        "sample", "patient", "view", "scan", "study", "modality", "sequence", "days", "age", "sex", "label"
    )  # fmt: skip


def test_nothing_but_what_it_needs_is_read() -> None:
    affinity = BASES["all"]()
    table = tensors([dict.fromkeys(("sample", "patient", "view", *CODES, *NUMBERS), 0)] * 3)
    only = {name: table[name] for name in affinity.needs}
    strange = {**table, "crop": torch.zeros(3, 4), "short": torch.zeros(1)}
    assert torch.equal(affinity.pairs(strange, only)(slice(1, 3))[1], affinity(only, only)[1][1:])


@pytest.mark.parametrize("side", ["query", "key"])
def test_a_missing_entry_is_named_with_those_that_are_there(side: str) -> None:
    table = {**meta(SAMPLE, PATIENT, VIEW), "age": torch.zeros(6)}
    less = meta(SAMPLE, PATIENT, VIEW)
    with pytest.raises(ConfigError, match="lacks metadata") as caught:
        Affinity(kernels=[Gaussian("age", 5)])(less if side == "query" else table, less if side == "key" else table)
    assert "no 'age' among patient, sample, view" in str(caught.value)
    assert "affinity.columns" in str(caught.value)


def test_entries_that_were_not_spread_over_the_views_are_refused() -> None:
    table = {**meta(SAMPLE, PATIENT, VIEW), "scan": torch.zeros(6, 2, dtype=torch.int64)}
    with pytest.raises(ConfigError, match="does not fit") as caught:
        Affinity(related=[Related(same="scan")])(table, table)
    assert "of_views" in str(caught.value)


@pytest.mark.parametrize("same_patient", [-0.1, 1.5, math.nan, math.inf, [0.5]])
def test_a_weight_beyond_0_to_1_is_refused(same_patient: Any) -> None:
    with pytest.raises(ConfigError, match="a weight from 0 to 1"):
        Affinity(same_patient=same_patient)


@pytest.mark.parametrize(
    ("setting", "parts"),
    [
        ("related", ["same_study"]),
        ("related", "same_study"),
        ("related", [Same("sex")]),
        ("kernels", ["age"]),
        ("kernels", [{"column": "age"}]),
        ("kernels", [Related(same="scan")]),
        ("kernels", 5),
    ],
)
def test_something_else_than_relations_and_kernels_is_refused(setting: str, parts: Any) -> None:
    with pytest.raises(ConfigError, match="unusable") as caught:
        Affinity(**{setting: parts})
    assert setting in str(caught.value)


def test_a_bundle_builds_it_from_its_parts() -> None:
    rows = [{"patient_id": "a", "age": 40}, {"patient_id": "b", "age": 50}]
    parser = ConfigParser({
        "training": rows,
        "affinity": {
            "_target_": "medclr.affinity.Affinity",
            "same_patient": 0.5,
            "related": [{"_target_": "medclr.affinity.Related", "counts": "positive", "same": "study_id"}],
            "kernels": [
                {"_target_": "medclr.affinity.Gaussian", "column": "age", "bandwidth": "scott", "rows": "@training"},
                {"_target_": "medclr.affinity.Same", "column": "sex"},
            ],
        },
        "columns": "$@affinity.columns",
    })  # fmt: skip
    assert parser.get_parsed_content("columns") == ("study_id", "age", "sex")
    assert parser.get_parsed_content("affinity").kernels[0].bandwidth == pytest.approx(50**0.5 * 2**-0.2)

"""Every method at one budget: does its encoder know a patient again, and by what?

python tests/benchmarks/compare_methods.py DATALIST --output FOLDER [--runs NAME ...] [--seeds 0 1 2] [--steps 300]

Trains the pretraining bundle's methods, each with pairs of one scan and pairs of one patient, and looks at the held-out
patients (validation and test; nothing is chosen by them): pair recall, effective rank, alignment, uniformity, and what
can be read from the embeddings by a linear probe that is fitted on training patients. Beside them: untrained encoders,
and a fingerprint without anatomy, the histogram of grey values and their quantisation step. All of it again on scans
that are re-quantised and whose intensities are changed, which a fingerprint does not survive; runs that end in
``altered`` were trained on such scans too. Embeddings are centred on the training patients' mean. What was measured
stands in FOLDER/results.jsonl and is not repeated; the tables are printed, and written to FOLDER/tables.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import nibabel
import numpy as np
import torch
from comparison_tables import tables
from monai.bundle import ConfigWorkflow
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.metrics import balanced_accuracy_score, r2_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from medclr import keys
from medclr.data import Datalist, Preprocessing, read_datalist, write_datalist
from medclr.draws import stable_seed
from medclr.engine.metrics import embedding_report, pair_recall
from medclr.evaluate import WindowEmbedder
from medclr.weights import load_encoder, read_manifest

CONFIGS = Path(__file__).resolve().parents[2] / "bundles" / "contrastive_pretraining" / "configs"
OVERLAYS = {
    "SimCLR": [],
    "MoCo v2": ["moco.yaml"],
    "MoCo v3": ["mocov3.yaml"],
    "BYOL": ["byol.yaml"],
    "patient in queue": ["moco.yaml", "patient.yaml"],
    "SupCon": ["supcon.yaml"],
    "y-aware": ["yaware.yaml"],
}
HELD_OUT = (keys.VALIDATION, keys.TEST)
LEVELS = (16, 64)
Table = NDArray[np.float64]


class Run(NamedTuple):
    """What is trained, by its name: ``SimCLR, SamePatient`` or ``SimCLR, SameScan, altered``."""

    method: str
    rule: str
    altered: bool

    @classmethod
    def of(cls, name: str) -> Run:
        """Of ``METHOD, RULE[, altered]``."""
        method, rule, *more = [part.strip() for part in name.split(",")]
        if method not in OVERLAYS or rule not in ("SamePatient", "SameScan") or more not in ([], ["altered"]):
            raise SystemExit(f"{name!r}: wanted 'METHOD, RULE[, altered]', METHOD among {', '.join(OVERLAYS)}")
        return cls(method, rule, bool(more))


class Scans(NamedTuple):
    """The preprocessed scans of some rows."""

    volumes: list[torch.Tensor]
    steps: Table
    """Quantisation step of each scan's own values, log2."""
    patients: NDArray[np.int64]
    rows: list[dict[str, Any]]


def altered_copy(datalist: Datalist, folder: Path) -> Datalist:
    """The same scans, each with a gamma, a contrast, noise and 16 to 64 grey values of its own."""
    target = folder / "datalist.json"
    if not target.exists():
        sections = {}
        for section, rows in datalist.sections.items():
            sections[section] = [_altered_row(row, folder / f"{section}_{at}.nii.gz") for at, row in enumerate(rows)]
        write_datalist(Datalist(sections, folder), target)
    return read_datalist(target)


def _altered_row(row: dict[str, Any], path: Path) -> dict[str, Any]:
    path.parent.mkdir(parents=True, exist_ok=True)
    volume = Preprocessing(orientation=None).volume(row)
    random = np.random.default_rng(stable_seed("altered", path.name))
    image = volume.image[0].double().numpy() ** random.uniform(0.6, 1.6)
    image = image * random.uniform(0.7, 1.3) + random.normal(0, random.uniform(0.01, 0.05), image.shape)
    low, high = np.quantile(image, [0.002, 0.998])
    levels = int(random.integers(LEVELS[0], LEVELS[1] + 1))
    grey = np.round(np.clip((image - low) / (high - low), 0, 1) * (levels - 1))
    nibabel.save(nibabel.Nifti1Image(grey.astype(np.uint8), volume.affine.numpy()), path)
    return {**{name: value for name, value in row.items() if name != keys.LABEL}, keys.IMAGE: str(path)}


def scans_of(rows: Sequence[dict[str, Any]]) -> Scans:
    """Read and preprocess as the bundle does."""
    names = {name: place for place, name in enumerate(dict.fromkeys(row[keys.PATIENT_ID] for row in rows))}
    volumes, steps = [], []
    for row in rows:
        volumes.append(Preprocessing().volume(row).image)
        steps.append(quantisation_step(np.asanyarray(nibabel.load(row[keys.IMAGE]).dataobj)))
    patients = np.array([names[row[keys.PATIENT_ID]] for row in rows])
    return Scans(volumes, np.log2(steps), patients, list(rows))


def quantisation_step(values: NDArray[Any]) -> float:
    """Median difference of neighbouring values that occur."""
    return float(np.median(np.diff(np.unique(values.astype(np.float64)))))


def fingerprint(scans: Scans) -> Table:
    """What an encoder could know of a scan without its anatomy: (scans, 33), histogram and quantisation step."""
    bins = [np.histogram(volume[0].numpy(), bins=32, range=(0, 1))[0] for volume in scans.volumes]
    shares = np.sqrt(np.array(bins) / np.array([volume[0].numel() for volume in scans.volumes])[:, None])
    step = np.log2([[quantisation_step(volume[0].numpy())] for volume in scans.volumes])
    parts = [part - part.mean(axis=0) for part in (shares, step)]
    return np.concatenate([part / np.sqrt(part.var(axis=0).sum()) for part in parts], axis=1)


def embedded(encoder: torch.nn.Module, size: Sequence[int], scans: Scans) -> Table:
    """Features of whole scans (scans, F)."""
    encoder.eval()
    embedder = WindowEmbedder(size)
    with torch.no_grad():
        rows = [embedder(volume[None], encoder)[0] for volume in scans.volumes]
    return torch.stack(rows).double().numpy()


def probes(train: Table, seen: Scans, test: Table, unseen: Scans) -> dict[str, float]:
    """What a linear probe reads on unseen patients: R2 of numbers, balanced accuracy of classes (chance is 1 / K)."""
    found = {}
    if np.ptp(seen.steps) > 0:
        found["quantisation step, R2"] = _regress(train, seen.steps, test, unseen.steps)
    for column in (keys.SCANNER, keys.SITE, "dtype", keys.AGE, "severity"):
        known = [[row.get(column) for row in scans.rows] for scans in (seen, unseen)]
        kept = [[at for at, value in enumerate(values) if value is not None] for values in known]
        own, other = ([values[at] for at in places] for values, places in zip(known, kept, strict=True))
        if len(set(own)) < 2 or len(set(other)) < 2:
            continue
        if column in (keys.AGE, "severity"):
            found[f"{column}, R2"] = _regress(train[kept[0]], np.array(own), test[kept[1]], np.array(other))
        else:
            model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000, class_weight="balanced"))
            guess = model.fit(train[kept[0]], own).predict(test[kept[1]])
            found[f"{column}, balanced accuracy (chance 1/{len(set(own))})"] = balanced_accuracy_score(other, guess)
    return {name: float(value) for name, value in found.items()}


def _regress(train: Table, target: Table, test: Table, truth: Table) -> float:
    model = make_pipeline(StandardScaler(), RidgeCV(np.logspace(-1, 4, 11)))
    return float(r2_score(truth, model.fit(train, target).predict(test)))


class Bench:
    """The scans and settings that all runs share."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.output = arguments, Path(arguments.output)
        self.plain = read_datalist(arguments.datalist)
        self.changed = altered_copy(self.plain, self.output / "altered")
        self.seen = scans_of(self.plain.training)
        held_out = [[row for name in HELD_OUT for row in lists.sections.get(name, [])] for lists in self._both]
        self.unseen, self.unseen_changed = map(scans_of, held_out)
        self.results = self.output / "results.jsonl"

    @property
    def _both(self) -> tuple[Datalist, Datalist]:
        return self.plain, self.changed

    def finished(self) -> list[dict[str, Any]]:
        """What stands in results.jsonl."""
        return [json.loads(line) for line in self.results.read_text().splitlines()] if self.results.exists() else []

    def add(self, **result: Any) -> None:
        """Write one result down."""
        with self.results.open("a") as file:
            file.write(json.dumps(result) + "\n")
        short = {name: value for name, value in result.items() if not isinstance(value, list | dict)}
        print(json.dumps(short), flush=True)

    def look(self, tables: Sequence[Table], metric: str = "cosine") -> dict[str, Any]:
        """Metrics of the held-out scans and of their altered copies."""
        first, second = tables
        report = embedding_report(torch.from_numpy(first), torch.from_numpy(self.unseen.patients))
        return {
            **{name: report[name] for name in ("effective_rank", "alignment", "uniformity", "pair_recall_chance")},
            "recall": pair_recall(first, self.unseen.patients, metric).tolist(),
            "recall_altered": pair_recall(second, self.unseen.patients, metric).tolist(),
        }

    def fingerprints(self) -> None:
        """The baselines without an encoder."""
        both = self.unseen, self.unseen_changed
        if any(result["name"] == "fingerprint" for result in self.finished()):
            return
        prints = [fingerprint(scans) for scans in both]
        own = probes(fingerprint(self.seen), self.seen, prints[0], self.unseen)
        self.add(name="fingerprint", seed=0, probes=own, **self.look(prints, "euclidean"))
        steps = [scans.steps[:, None] for scans in both]
        recall = [pair_recall(step, self.unseen.patients, "euclidean").tolist() for step in steps]
        self.add(name="quantisation step of the file", seed=0, probes={}, recall=recall[0], recall_altered=recall[1])

    def train(self, name: str, seed: int) -> None:
        """Train one encoder and look at it, before the first step as well if no other run did."""
        run, done = Run.of(name), {(result["name"], result["seed"]) for result in self.finished()}
        if (name, seed) in done:
            return
        datalist, given = self.changed if run.altered else self.plain, self.arguments
        patients = len({row[keys.PATIENT_ID] for row in datalist.training})
        passes = -(-10 * given.batch // patients)
        epochs = max(1, round(given.steps / (patients * passes // given.batch)))
        folder = self.output / "runs" / f"{name} {seed}".replace(", ", "_").replace(" ", "_")
        weights = folder / "encoder.safetensors"
        trained = weights.exists() and read_manifest(weights).epochs == epochs
        work = ConfigWorkflow(
            config_file=[str(CONFIGS / part) for part in ["train.yaml", *OVERLAYS[run.method]]],
            meta_file=str(CONFIGS / "metadata.json"),
            logging_file=str(CONFIGS / "logging.conf"),
            workflow_type="train",
            bundle_root=str(CONFIGS.parent),
            datalist=str(datalist.path),
            output_dir=str(folder / "again" if trained else folder),
            seed=seed,
            roi_size=given.size,
            init_filters=8,
            batch_size=given.batch,
            passes=passes,
            max_epochs=epochs,
            val_interval=0,
            **{"pair_rule::_target_": f"medclr.pairs.{run.rule}"},
            **({"label_column": given.label} if run.method == "SupCon" else {}),
        )
        work.initialize()
        encoder = work.parser.get_parsed_content("encoder")
        if ("untrained", seed) not in done:
            self._add("untrained", seed, encoder)
        if trained:
            load_encoder(weights, into=encoder)
        else:
            work.run()
        self._add(name, seed, encoder, steps=read_manifest(weights).steps)

    def _add(self, name: str, seed: int, encoder: torch.nn.Module, **more: Any) -> None:
        sets = self.seen, self.unseen, self.unseen_changed
        train, test, changed = (embedded(encoder, self.arguments.size, scans) for scans in sets)
        # What all scans have in common may be a hundred times what tells them apart, and hides it from a cosine.
        train, test, changed = (table - train.mean(axis=0) for table in (train, test, changed))
        found = probes(train, self.seen, test, self.unseen)
        self.add(name=name, seed=seed, probes=found, **self.look([test, changed]), **more)


def main() -> None:
    """Train what is not there yet, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("datalist", help="with training, validation and test sections")
    parser.add_argument("--output", required=True)
    methods = ("SimCLR", "MoCo v2", "MoCo v3", "BYOL")
    everything = [f"{method}, {rule}" for rule in ("SamePatient", "SameScan") for method in methods]
    parser.add_argument("--runs", nargs="*", default=[*everything, "SimCLR, SamePatient, altered"])
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=32, help="patients a step")
    parser.add_argument("--size", nargs=3, type=int, default=[32, 48, 32], help="voxels of a view")
    parser.add_argument("--label", default="label", help="the column of classes for SupCon")
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}, {platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads")
    bench = Bench(arguments)
    bench.fingerprints()
    for seed in arguments.seeds:
        for name in arguments.runs:
            bench.train(name, seed)
    text = tables(bench.finished())
    (bench.output / "tables.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from monai.bundle import ConfigParser

from medclr.errors import ConfigError
from medclr.launch import configuration, refuse_unknown_keys

BUNDLES = Path(__file__).resolve().parents[1] / "bundles"
TRAIN = str(BUNDLES / "contrastive_pretraining" / "configs" / "train.yaml")
EVALUATE = str(BUNDLES / "contrastive_pretraining" / "configs" / "evaluate.yaml")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--config_file", TRAIN, "--max_epochs", "3"],
        ["--config_file", TRAIN, "--max_epochs=3", "--roi_size", "[32,48,32]", "--meta_file", "metadata.json"],
        ["--config_file", f"['{TRAIN}','{EVALUATE}']", "--section", "test"],
        ["--config_file", TRAIN, "--pair_rule::_target_", "medclr.pairs.SameScan"],
        ["--config_file", TRAIN, "--intensity::0::probability", "0"],
        ["--config_file", TRAIN, "--encoder#network#blocks_down", "[1,1]"],
        ["--config_file", TRAIN, "--run_id", "run", "--train::trainer::new_argument", "1"],
        [],
    ],
)
def test_keys_of_the_configuration_and_of_monai_pass(arguments: list[str]) -> None:
    refuse_unknown_keys(arguments)


@pytest.mark.parametrize(
    ("option", "hint"),
    [
        ("--max_epoch", "max_epochs"),
        ("--section", "configuration"),  # of the overlay, which is not given
        ("--trian::trainer::max_epochs", "configuration"),
        ("--train::trainr::max_epochs", "configuration"),
        ("--intensity::99::probability", "configuration"),
        ("--outputdir=elsewhere", "output_dir"),
        ("-max_epoch", "max_epochs"),
    ],
)
def test_a_key_that_no_configuration_has_is_refused_with_those_it_resembles(option: str, hint: str) -> None:
    with pytest.raises(ConfigError, match="No configuration has the key") as caught:
        refuse_unknown_keys(["--config_file", TRAIN, option, "3"])
    assert hint in caught.value.fix


def test_keys_in_a_file_of_arguments_count(tmp_path: Path) -> None:
    file = tmp_path / "arguments.yaml"
    file.write_text(f"config_file: {TRAIN}\nmax_epoch: 3\n")
    with pytest.raises(ConfigError, match="max_epoch"):
        refuse_unknown_keys(["--args_file", str(file)])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--max_epoch", "3"], ["No configuration has the key 'max_epoch'", "Did you mean max_epochs"]),
        (["--datalist", "nowhere.json"], ["nowhere.json", "Check the path of the datalist"]),
        (["--spacing", "[1,0,1]"], ["spacing", "millimetres"]),
        (["--temperature", "warm"], ["temperature"]),
        (["--optimizer::momentum", "3"], ["momentum", "settings that MONAI can build"]),
        (["--train::trainer::optimizer", "@optimiser"], ["optimiser", "settings that MONAI can build"]),
    ],
)
def test_what_a_user_can_get_wrong_ends_with_our_last_lines(
    options: list[str], words: list[str], cohort: list[dict[str, str]], tmp_path: Path
) -> None:
    folder = os.path.commonpath([row["image"] for row in cohort])
    (tmp_path / "datalist.json").write_text(json.dumps({"dataset_dir": folder, "training": cohort}))
    common = ["--datalist", "datalist.json", "--output_dir", "output", "--batch_size", "2", "--val_interval", "0"]
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", TRAIN, *common, *options]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode != 0
    last = done.stderr.rstrip().splitlines()[-4:]
    assert [line.split()[0] for line in last[1:]] == ["got:", "wanted:", "fix:"], done.stderr[-2000:]
    for word in words:
        assert word in "\n".join(last)


def test_an_expression_knows_the_configuration_that_it_stands_in() -> None:
    parser = ConfigParser(
        {
            "imports": ["$import medclr", "$import torch"],
            "rate": "$10 ** -2",
            "unused": "$1 / 0",
            "device": "$torch.device('cpu')",
            "layer": {"_target_": "torch.nn.Linear", "in_features": "@width", "out_features": 1},
            "width": 3,
            "sizes": "$[@width] * 3",
            "found": "$[@rate, @device, @layer, @sizes] and medclr.launch.configuration()",
        }
    )
    parser["width"] = 4
    found = parser.get_parsed_content("found")
    assert found.pop("found").startswith("$[@rate")
    assert found == {
        "imports": ["$import medclr", "$import torch"],
        "rate": 0.01,
        "unused": "$1 / 0",
        "device": "cpu",
        "layer": {"_target_": "torch.nn.Linear", "in_features": "@width", "out_features": 1},
        "width": 4,
        "sizes": [4, 4, 4],
    }


def test_outside_of_a_configuration_there_is_none_to_know() -> None:
    with pytest.raises(ConfigError, match="no configuration"):
        configuration()

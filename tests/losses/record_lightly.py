"""Records what lightly's NTXentLoss gives, so that the tests can hold medclr to it without lightly.

pip install --no-deps --target FOLDER lightly
python tests/losses/record_lightly.py FOLDER

lightly's packages import torchvision, whose usual build does not load beside a CPU build of torch. The loss needs torch
alone, so that its own file is loaded and the packages around it stand empty.
"""

from __future__ import annotations

import importlib
import json
import sys
import types
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

VALUES = Path(__file__).with_name("lightly_values.json")
SAMPLES, WIDTH, QUEUED = 24, 16, 40
TEMPERATURES = (0.05, 0.1, 0.5, 1.0)


def load(folder: str) -> tuple[type[torch.nn.Module], str]:
    """NTXentLoss of the lightly that was installed into ``folder``, and its version."""
    for name in ("lightly", "lightly.loss", "lightly.models", "lightly.models.modules", "lightly.utils"):
        package = types.ModuleType(name)
        package.__path__ = [str(Path(folder, *name.split(".")))]
        sys.modules[name] = package
    # Only gathering over ranks would use it, and it imports torchvision.
    sys.modules["lightly.models"].utils = types.ModuleType("lightly.models.utils")  # type: ignore[attr-defined]
    (version,) = (found.version for found in distributions(name="lightly", path=[folder]))
    return importlib.import_module("lightly.loss.ntx_ent_loss").NTXentLoss, version


def inputs(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Two views (SAMPLES, WIDTH) that resemble each other, and a queue (QUEUED, WIDTH) of unit length; float64."""
    random = np.random.default_rng(seed)
    common, noise, queue = (random.standard_normal((n, WIDTH)) for n in (SAMPLES, 2 * SAMPLES, QUEUED))
    views = [torch.from_numpy(common + 0.7 * part) for part in np.split(noise, 2)]
    return views[0], views[1], normalize(torch.from_numpy(queue), dim=1)


def fingerprint(tensors: tuple[Tensor, ...]) -> float:
    """Tells whether another version of NumPy draws other inputs."""
    return float(sum(tensor.abs().sum() for tensor in tensors))


def main() -> None:
    """Write VALUES."""
    loss_of, version = load(sys.argv[1])
    cases: list[dict[str, Any]] = []
    for seed in (0, 1):
        for temperature in TEMPERATURES:
            for queue in (False, True):
                *views, queued = inputs(seed)
                z_1, z_2 = (view.requires_grad_() for view in views)
                loss = loss_of(temperature, memory_bank_size=(QUEUED, WIDTH) if queue else 0)
                if queue:
                    loss.memory_bank.bank = queued
                value = loss(z_1, z_2)
                norms = [float(gradient.norm()) for gradient in torch.autograd.grad(value, (z_1, z_2))]
                cases.append(
                    {
                        "seed": seed,
                        "inputs": fingerprint(inputs(seed)),
                        "temperature": temperature,
                        "queue": queue,
                        "loss": float(value.detach()),
                        "gradient_norms": norms,
                    }
                )
    found = {"lightly": version, "torch": torch.__version__, "numpy": np.__version__, "cases": cases}
    VALUES.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{VALUES}: {len(cases)} cases of lightly {version}")


if __name__ == "__main__":
    main()

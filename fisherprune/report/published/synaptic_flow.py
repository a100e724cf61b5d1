"""The results of Tanaka et al. 2020 (SynFlow, arXiv 2006.05467), three runs each.

``synaptic_flow.csv`` holds raw accuracies in percent of ganguli-lab/Synaptic-Flow,
folder ``Results/data`` as of June 2020: for each dataset, network, method and exponent
e of the compression 10^e, that is at sparsity 1 - 10^-e, the highest accuracy on the
test images in 160 or 100 epochs (``run1`` to ``run3``) and, for the one network whose
curves are there, that of the last epoch (``last1`` to ``last3``).

What the settings come from: the settings files beside the results, of VGG16 on
CIFAR-100 and VGG11 on CIFAR-10, which agree, and the code of that time. All training
images, none for validation; SGD with Nesterov's momentum; the classifier and the 1x1
convolutions of the shortcuts are pruned like the rest, biases and BatchNorm are not;
SynFlow in 100 rounds at exponentially growing sparsity, the others at once. There is
none of ResNet18, see ``RESNET_NOTE``.

Left out: VGG on TinyImageNet, a network of three Linear layers with dropout that is
not one of ours; WideResNet18, as its code builds the same network as that of ResNet18.
"""

from __future__ import annotations

import csv
from functools import cache
from pathlib import Path
from statistics import fmean, stdev

from fisherprune.report.published.table import (
    Fields,
    PublishedCell,
    PublishedSetting,
    PublishedTable,
)

Row = dict[str, str]

FILE = Path(__file__).with_name("synaptic_flow.csv")
METHODS = {"grasp": "grasp_reversed"}
"""What their methods are called here, where that is another name."""
NETWORKS = {
    "vgg11_bn": ("VGG11", "lottery_vgg11"),
    "vgg16_bn": ("VGG16", "lottery_vgg16"),
    "resnet18": ("ResNet18", "resnet18"),
}
DATASETS = {
    "cifar10": ("CIFAR-10", 10, 32),
    "cifar100": ("CIFAR-100", 100, 32),
    "tinyimagenet": ("TinyImageNet", 200, 64),
}
"""Name, classes and size of the images."""

COMMON: Fields = {"batch_size": 128, "nesterov": True, "validation_share": 0.0}
VGG: Fields = {
    "init": "kaiming_normal",
    "lr": 0.1,
    "lr_drop_factor": 0.1,
    "weight_decay": 1e-4,
}
RESNET: Fields = {"init": "kaiming_normal_fan_out"}
TINYIMAGENET: Fields = {
    "epochs": 100,
    "lr_drops": (30, 60, 80),
    "lr_drop_factor": 0.1,
    "weight_decay": 1e-4,
}
OWN: dict[str, Fields] = {"synflow": {"rounds": 100, "schedule": "exponential"}}

SCORE_NOTE = (
    "Their masks are made on ten times as many training images as there are classes, "
    "drawn from all of them and augmented; ours on ten images of each class as they "
    "are."
)
GRASP_NOTE = (
    "The published GraSP column stands beside our grasp_reversed: when these results "
    "were made, their code kept the weights with the largest -w Hm, the opposite end "
    "of the criterion of Wang et al. 2020, which is our grasp; it was changed two "
    "months later. Theirs is the gradient flow of the prunable weights in batches of "
    "256, ours that of all weights in all images."
)
RESNET_NOTE = (
    "Beside their results there is no settings file of ResNet18: that its setting is "
    "this one rests on the appendix of the paper."
)


@cache
def synaptic_flow_tables() -> tuple[PublishedTable, ...]:
    """Return a table for each dataset and network in the file."""
    rows: dict[tuple[str, str], list[Row]] = {}
    with FILE.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            rows.setdefault((row["dataset"], row["network"]), []).append(row)
    everything = [row for chosen in rows.values() for row in chosen]
    note = _selection_note(everything)
    return tuple(_table(*where, chosen, note) for where, chosen in rows.items())


def _table(dataset: str, network: str, rows: list[Row], note: str) -> PublishedTable:
    title, _, _ = DATASETS[dataset]
    pruned = [row for row in rows if float(row["exponent"]) > 0]
    dense = [row for row in rows if float(row["exponent"]) == 0]
    remarks = {"": f"{note} {SCORE_NOTE}", "grasp_reversed": GRASP_NOTE}
    if network == "resnet18":
        remarks[""] += f" {RESNET_NOTE}"
    return PublishedTable(
        source=f"arXiv 2006.05467, raw results ({NETWORKS[network][0]}, {title})",
        runs="three runs",
        n=3,
        chosen="at the best test accuracy of all epochs",
        setting=_setting(dataset, network),
        cells={_where(row): _cell([row]) for row in pruned},
        dense=_cell(dense),
        remarks=remarks,
    )


def _setting(dataset: str, network: str) -> PublishedSetting:
    _, classes, size = DATASETS[dataset]
    is_resnet = network == "resnet18"
    values = {
        **COMMON,
        **(RESNET if is_resnet else VGG),
        **(TINYIMAGENET if dataset == "tinyimagenet" else {}),
        "image_size": size,
        "score_samples": 10 * classes,
    }
    skip = {"bias", "bn"} | ({"shortcut.1"} if is_resnet else set())
    model = NETWORKS[network][1]
    return PublishedSetting(dataset, model, values, [frozenset(skip)], OWN)


def _where(row: Row) -> tuple[str, float]:
    """Return our code of the method, and the sparsity to six decimals."""
    method = row["method"]
    return METHODS.get(method, method), round(1 - 10 ** -float(row["exponent"]), 6)


def _values(row: Row, name: str) -> list[float]:
    return [float(row[f"{name}{i}"]) for i in (1, 2, 3) if row[f"{name}{i}"]]


def _cell(rows: list[Row]) -> PublishedCell:
    """Return mean and sample standard deviation over the runs of all rows."""
    values = [value for row in rows for value in _values(row, "run")]
    return fmean(values), stdev(values)


def _selection_note(rows: list[Row]) -> str:
    """Say what the best epoch is above the last one, where both are known."""
    gaps = [
        run - last
        for row in rows
        for run, last in zip(_values(row, "run"), _values(row, "last"), strict=False)
    ]
    return (
        "Their accuracies are the highest on the test images over all epochs, ours are "
        f"those of the last epoch: in the {len(gaps)} runs whose curves they publish "
        f"(VGG16, CIFAR-100) the highest is {fmean(gaps):.2f} points above the last on "
        "average."
    )

from dataclasses import fields, replace

import pytest
import torch

from fisherprune.data import BATCH_SIZES, IMAGE_SIZES
from fisherprune.errors import FisherpruneError
from fisherprune.runs.config import TrainConfig
from fisherprune.runs.device import rank_device, resolve_device
from fisherprune.runs.kinds import KINDS
from fisherprune.train import options

NAN, INF = float("nan"), float("inf")
WHOLE = {f.name for f in fields(TrainConfig) if f.type in ("int", "int | None")}
"""Fields that are whole numbers."""


@pytest.mark.parametrize(
    "values, message",
    [
        ({"method": "obs"}, "method must be one of none, .*fbss.*, got 'obs'"),
        ({"model": "alexnet"}, "model must be one of resnet18, .*, got 'alexnet'"),
        ({"dataset": "mnist"}, "dataset must be one of cifar10, .*, got 'mnist'"),
        ({"scope": "block"}, "scope must be one of global, .*layer.*, got 'block'"),
        ({"labels": "all"}, "labels must be one of given, sampled, got 'all'"),
        ({"draws": 0}, "draws must be at least 1, got 0"),
        ({"probes": 0}, "probes must be at least 1, got 0"),
        ({"ties": "any"}, "ties must be one of error, position, got 'any'"),
        ({"device": "gpu"}, "device must be auto, cpu, cuda or cuda:INDEX, got 'gpu'"),
        ({"device": "cuda:"}, "device must be auto"),
        ({"device": "cuda:01"}, "device must be auto, cpu, .* got 'cuda:01'"),
        ({"device": "cuda:\u0663"}, "device must be auto, cpu, .* got 'cuda:\u0663'"),
        ({"device": "cuda:1000"}, "device must be cuda:999 at most, got 'cuda:1000'"),
        ({"sparsity": 1.5}, r"sparsity must be .* in \[0, 1\], got 1.5"),
        ({"sparsity": -0.1}, "sparsity must be"),
        ({"sparsity": NAN}, "sparsity must be .* got nan"),
        ({"epochs": -1}, "epochs must be at least 0, got -1"),
        ({"warmup_epochs": -1}, "warmup_epochs must be at least 0"),
        ({"batch_size": 1}, "batch_size must be at least 2, got 1"),
        ({"image_size": 4}, "image_size must be at least 8, got 4"),
        ({"train_samples": 1}, "train_samples must be at least 2, got 1"),
        ({"score_samples": 0}, "score_samples must be at least 1, got 0"),
        ({"group_size": 0}, "group_size must be at least 1, got 0"),
        ({"score_batch_size": 0}, "score_batch_size must be at least 1, got 0"),
        ({"lr": 0.0}, "lr must be above 0 and finite, got 0"),
        ({"lr": NAN}, "lr must be above 0 and finite, got nan"),
        ({"lr": INF}, "lr must be above 0 and finite, got inf"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\), got 1.0"),
        ({"momentum": 0.0, "nesterov": True}, "momentum must be above 0 for nesterov"),
        ({"init": "xavier"}, "init must be one of default, kaiming_.*, got 'xavier'"),
        ({"validation_share": 1.0}, r"validation_share must be in \[0, 1\), got 1.0"),
        ({"validation_share": -0.1}, r"validation_share must be in .* got -0.1"),
        ({"validation_share": NAN}, r"validation_share must be in .* got nan"),
        *(
            (
                {"validation_share": 0.0, name: value},
                f"{name} must be {idle} where validation_share is 0: .* got {value}",
            )
            for name, value, idle in [
                ("validation_every", 2, 1),
                ("validation_metric", "f1", "accuracy"),
            ]
        ),
        ({"weight_decay": -1.0}, "weight_decay must be at least 0 and finite, got -1"),
        ({"weight_decay": NAN}, "weight_decay must be at least 0 and finite, got nan"),
        ({"weight_decay": INF}, "weight_decay must be at least 0 and finite, got inf"),
        ({"lr_drop_factor": 0.0}, r"lr_drop_factor must be in \(0, 1\], got 0.0"),
        ({"lr_drops": (60, 60)}, "lr_drops must be growing .* got \\(60, 60\\)"),
        ({"lr_drops": (0,)}, "lr_drops must be growing .* from 1 to .*, got \\(0,\\)"),
        ({"lr_drops": (1, 2**31)}, "from 1 to 2147483647, got \\(1, 2147483648\\)"),
        *(
            ({name: 2**31}, f"^{name} must be at most 2147483647, got 2147483648$")
            for name in sorted(WHOLE - {"image_size", "seed"})
        ),
        ({"image_size": 2**31}, "image_size must be at most 65536, got 2147483648"),
        ({"epochs": 10**100}, r"epochs must be at most 2147483647, got 10+\.\.\.$"),
        ({"epochs": 10**9999}, "epochs must be at most .*, got int too large to show"),
        ({"method": "none"}, "sparsity must be 0 for method none, .* got 0.9"),
        *(
            (
                {"method": "none", "sparsity": 0, name: value},
                f"{name} must be {idle} for method none, got {value}",
            )
            for name, value, idle in [
                ("scope", "erk", "global"),
                ("min_per_layer", 1, 0),
                ("structure", "channels", "weights"),
                ("invert_scores", True, False),
                ("shuffle_masks", True, False),
                ("reinitialize", True, False),
            ]
        ),
        ({"scope": "densities"}, "densities must be given for scope densities"),
        ({"min_per_layer": -1}, "min_per_layer must be at least 0, got -1"),
        ({"structure": "rows"}, "structure must be one of .*, got 'rows'"),
        ({"structure": "2:4"}, "sparsity must be 0.5 for structure 2:4, got 0.9"),
        (
            {"structure": "1:4", "sparsity": 0.75, "scope": "erk"},
            "scope must be global or layer for structure 1:4",
        ),
        (
            {"structure": "channels", "shuffle_masks": True},
            "shuffle_masks must be False for structure channels",
        ),
        ({"densities": {"a": 1}}, "and for no other; scope is global"),
        (
            {"data_mirror": "http://x/", "dataset": "digits"},
            "data_mirror must be left out for dataset digits",
        ),
        ({"data_mirror": "ftp://x/"}, "data_mirror must be an address that begins"),
        ({"processes": 0}, "processes must be at least 1, got 0"),
        (
            {"processes": 4, "batch_size": 3},
            "batch_size must be at least 4, an image for each process, got 3",
        ),
        (
            {"processes": 2, "device": "cuda:1"},
            "device must be auto, cpu or cuda for 2 processes, .* by CUDA_VISIBLE_DEV",
        ),
    ],
)
def test_values_no_run_can_have(values, message):
    with pytest.raises(FisherpruneError, match=message):
        TrainConfig(**values)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"epochs": "3"}, "epochs must be a whole number, got '3'"),
        ({"epochs": 3.5}, "epochs must be a whole number, got 3.5"),
        ({"epochs": None}, "epochs must be a whole number, got None"),
        ({"batch_size": 2.5}, "batch_size must be a whole number or None, got 2.5"),
        ({"group_size": True}, "group_size must be a whole number, got True"),
        ({"seed": "a"}, "seed must be a whole number, got 'a'"),
        ({"lr": "x"}, "lr must be a number, got 'x'"),
        ({"lr": True}, "lr must be a number, got True"),
        ({"lr": 10**400}, "lr must be a number, got 1000"),
        ({"sparsity": None}, "sparsity must be a number, got None"),
        ({"amp": "no"}, "amp must be true or false, got 'no'"),
        ({"amp": 1}, "amp must be true or false, got 1"),
        ({"method": None}, "method must be a string, got None"),
        ({"model": ["a"]}, r"model must be a string, got \['a'\]"),
        ({"data_dir": None}, "data_dir must be a string, got None"),
        ({"data_dir": ""}, "data_dir must be the name of a folder, got ''"),
        ({"output_dir": ""}, "output_dir must be the name of a folder, got ''"),
        ({"lr_drops": 60}, "lr_drops must be a list of whole numbers, got 60"),
        ({"lr_drops": "60"}, "lr_drops must be a list of whole numbers, got '60'"),
        ({"lr_drops": [6.5]}, r"lr_drops must be a list of whole .* got \[6.5\]"),
        ({"skip": 3}, "skip must be a list of strings or None, got 3"),
        ({"skip": [3]}, r"skip must be a list of strings or None, got \[3\]"),
        ({"densities": 3}, "densities must be numbers by parameter name, got 3"),
    ],
)
def test_values_of_another_type(values, message):
    with pytest.raises(FisherpruneError, match=f"^{message}"):
        TrainConfig(**values)


def test_every_field_has_a_kind():
    kinds = {field.type.removesuffix(" | None") for field in fields(TrainConfig)}
    assert kinds - KINDS.keys() == {"Mapping[str, float]"}  # checked_densities


def test_equal_values_are_made_alike():
    config = TrainConfig(skip="bn", lr_drops=[6], lr=1)
    assert (config.skip, config.lr_drops) == (("bn",), (6,))
    assert isinstance(config.lr, float)


def test_learning_rate_drops():
    config = TrainConfig(lr=1.0, lr_drops=(2, 5), lr_drop_factor=0.5)
    rates = [config.learning_rate(epoch) for epoch in range(7)]
    assert rates == [1, 1, 0.5, 0.5, 0.5, 0.25, 0.25]


def test_batch_size_by_dataset():
    assert TrainConfig().training_batch_size == 512
    assert TrainConfig(dataset="digits").training_batch_size == 16
    assert TrainConfig(batch_size=7).training_batch_size == 7
    assert BATCH_SIZES.keys() == IMAGE_SIZES.keys()


def test_every_field_is_an_option_with_its_default():
    text = options.make_parser().format_help()
    for field in fields(TrainConfig):
        option = f"  --{field.name.replace('_', '-')} "
        assert (option in text.replace("\n", " ")) is (field.name != "model_source")
    assert options.parse([]) == (TrainConfig(), None, False)


def test_options_fill_the_configuration():
    command = (
        "--method snip --sparsity 0.98 --scope layer --group-size 4 --epochs 3 --lr 0.1"
        " --warmup-epochs 2 --bn-warmup --score-samples 9 --score-batch-size 8 --amp"
        " --model vgg19 --dataset folder --data-dir d --image-size 48 --seed 7 --quiet"
        " --train-samples 99 --batch-size 64 --momentum 0.5 --weight-decay 0"
        " --lr-drops 5 9 --lr-drop-factor 0.1 --device cpu --output-dir o"
        " --structure blocks:4x8 --min-per-layer 6"
    )
    assert options.parse(command.split()) == (
        TrainConfig(
            method="snip", sparsity=0.98, scope="layer", group_size=4, epochs=3, lr=0.1,
            warmup_epochs=2, bn_warmup=True, score_samples=9, score_batch_size=8,
            amp=True, model="vgg19", dataset="folder", data_dir="d", image_size=48,
            seed=7, train_samples=99, batch_size=64, momentum=0.5, weight_decay=0.0,
            lr_drops=(5, 9), lr_drop_factor=0.1, device="cpu", output_dir="o",
            structure="blocks:4x8", min_per_layer=6,
        ),
        None,
        True,
    )  # fmt: skip
    assert options.parse(["--lr-drops"]).config.lr_drops == ()
    assert options.parse(["--method", "none"]).config.sparsity == 0
    command = "--validation-every 3 --validation-metric f1 --compile --tensorboard"
    command += " --memory-format channels_last"
    assert options.parse(command.split()).config == TrainConfig(
        validation_every=3, validation_metric="f1", compile=True, tensorboard=True,
        memory_format="channels_last",
    )  # fmt: skip


def test_a_variant_keeps_the_defaults_by_dataset():
    digits = TrainConfig(dataset="digits")
    assert replace(digits, dataset="cifar10") == TrainConfig()


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == resolve_device("cpu") == torch.device("cpu")
    with pytest.raises(FisherpruneError, match="device cuda must be .* finds no CUDA"):
        resolve_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("auto") == torch.device("cuda")
    assert resolve_device("cuda:1") == torch.device("cuda", 1)
    for index in (2, 256, 999):  # to torch.device 256 is 0, and 999 is -25
        message = f"device cuda:{index} must be present, .* has 2 CUDA devices"
        with pytest.raises(FisherpruneError, match=message):
            resolve_device(f"cuda:{index}")


def test_each_process_of_a_machine_has_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert rank_device("auto", 3) == rank_device("cpu", 0) == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert rank_device("cpu", 1) == torch.device("cpu")
    assert rank_device("auto", 1) == rank_device("cuda", 1) == torch.device("cuda", 1)
    message = "device auto: each process .* process 2 .counted from 0. finds 2; start"
    with pytest.raises(FisherpruneError, match=message):
        rank_device("auto", 2)


def test_whole_numbers_up_to_the_largest():
    config = TrainConfig(group_size=2**31 - 1, image_size=2**16, seed=2**99)
    assert (config.group_size, config.seed) == (2**31 - 1, 2**99)

"""Files of compressed models: what comes back, how large they are, what is refused."""

import json
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nets import randomized
from safetensors import safe_open
from safetensors.torch import save_file
from sparse_nets import NETS, case, random_masks
from torch import nn

import fisherprune as fp
from fisherprune import sparse
from fisherprune.sparse.packing import pack_places, unpack_places

FORMAT = "fisherprune-sparse-1"


@given(st.sets(st.integers(0, 2**31 - 1)))
def test_places_come_back(places):
    places = torch.tensor(sorted(places), dtype=torch.int64)
    assert torch.equal(unpack_places(pack_places(places)), places)


@pytest.mark.parametrize("density", [0.5, 0.1, 0.01, 0.001, 0.0003])
def test_places_take_at_most_two_bytes(density):
    places = (torch.rand(4_000_000) < density).nonzero().flatten()
    packed = pack_places(places)
    assert len(packed) <= 2 * len(places)
    assert len(packed) <= 1.3 * len(places) or density < 0.01
    assert torch.equal(unpack_places(packed), places)


@pytest.mark.parametrize(
    ("places", "packed"),
    [
        ([], []),
        ([0], [0]),
        ([127], [127]),
        ([128], [0x80, 1]),
        ([16383, 16384 + 16384], [0xFF, 0x7F, 0x80, 0x80, 1]),
        ([2**31 - 1], [0xFF, 0xFF, 0xFF, 0xFF, 7]),
    ],
)
def test_the_coding_is_leb128(places, packed):
    assert pack_places(torch.tensor(places, dtype=torch.int64)).tolist() == packed


def test_broken_places_are_refused():
    with pytest.raises(ValueError, match="the places end within a number"):
        unpack_places(torch.tensor([1, 128], dtype=torch.uint8))
    with pytest.raises(ValueError, match="a place has 6 bytes, at most 5 may be"):
        unpack_places(torch.tensor([128] * 5 + [1], dtype=torch.uint8))


def saved(tmp_path, name="conv", fold=False, **options):
    """Save a compressed network; return it, the path, and an input."""
    model, masks, x, _ = case(name, density=0.1, others=0.5)
    randomized(model).eval()
    model = sparse.compress(model, masks, fold=fold, **options)
    path = tmp_path / "sparse.safetensors"
    sparse.save(model, path)
    return model, path, x


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("bound", [1.0, 0.25])
@pytest.mark.parametrize("name", NETS)
def test_what_is_loaded_is_what_was_saved(tmp_path, name, bound, fold):
    model, path, x = saved(tmp_path, name, fold, dense_above=bound)
    fresh = NETS[name][0]()
    loaded = sparse.load(fresh, path)
    folded = isinstance(model, torch.fx.GraphModule)
    assert (loaded is fresh) == (not folded) and fresh.training == (not folded)
    found, expected = loaded.state_dict(), model.state_dict()
    assert [*found] == [*expected]
    assert all(torch.equal(found[n], expected[n]) for n in expected)
    assert torch.equal(loaded.eval()(x), model(x))


def test_the_same_model_makes_the_same_file(tmp_path):
    model, path, _ = saved(tmp_path)
    before = path.read_bytes()
    sparse.save(model, path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("density", [0.01, 0.1])
def test_size(tmp_path, density):
    model = nn.Sequential(nn.Linear(1000, 1000, bias=False))
    masks = random_masks(model, density)
    sparse.save(sparse.compress(model, masks), tmp_path / "file")
    size = (tmp_path / "file").stat().st_size
    assert size <= 600 + masks.kept() * (4 + 1.35)


def test_a_layer_of_two_names(tmp_path):
    def make():
        layer = nn.Linear(6, 6)
        return nn.Sequential(layer, nn.Tanh(), layer)

    model = sparse.compress(make(), {"0.weight": torch.eye(6) > 0})
    sparse.save(model, tmp_path / "file")
    loaded, x = sparse.load(make(), tmp_path / "file"), torch.randn(2, 6)
    assert loaded[0] is loaded[2] and torch.equal(loaded(x), model(x))


def test_wrapped_models(tmp_path):
    make = lambda: nn.Sequential(nn.Linear(6, 6))  # noqa: E731
    model = sparse.compress(make(), {"0.weight": torch.eye(6) > 0})
    sparse.save(torch.compile(model, backend="eager"), tmp_path / "file")
    fresh = torch.compile(make(), backend="eager")
    loaded, x = sparse.load(fresh, tmp_path / "file"), torch.randn(2, 6)
    assert loaded is fresh and torch.equal(loaded(x), model(x))


def test_halves_stay_halves(tmp_path):
    model = sparse.compress(
        nn.Sequential(nn.Linear(6, 6)).half(), {"0.weight": torch.eye(6) > 0}
    )
    sparse.save(model, tmp_path / "file")
    with safe_open(tmp_path / "file", framework="pt") as file:
        assert file.get_tensor("0.values").dtype == torch.float16
    loaded = sparse.load(nn.Sequential(nn.Linear(6, 6)), tmp_path / "file")
    assert torch.equal(loaded[0].values, model[0].values.float())


def test_what_save_refuses(tmp_path):
    error = fp.FisherpruneError
    with pytest.raises(error, match="save: model must be one of sparse layers"):
        sparse.save(nn.Linear(2, 2), tmp_path / "file")
    model = sparse.compress(
        nn.Sequential(nn.Linear(6, 6)), {"0.weight": torch.eye(6) > 0}
    )
    with pytest.raises(error, match="save: path must be a path, got 3"):
        sparse.save(model, 3)
    with pytest.raises(OSError, match="nowhere"):
        sparse.save(model, tmp_path / "nowhere" / "file")
    model.get_extra_state = lambda: {"own": 1}
    type_ = type("Extra", (nn.Sequential,), {"get_extra_state": lambda self: 1})
    model = sparse.compress(type_(nn.Linear(6, 6)), {"0.weight": torch.eye(6) > 0})
    with pytest.raises(error, match="save: '_extra_state' must be a tensor, got 1"):
        sparse.save(model, tmp_path / "file")


def not_loaded(model, path, match):
    """Expect an error that leaves the model as it is."""
    before = {n: t.clone() for n, t in model.state_dict().items()}
    modules, modes = list(model.modules()), [m.training for m in model.modules()]
    with pytest.raises(fp.FisherpruneError, match=match):
        sparse.load(model, path)
    assert list(model.modules()) == modules
    assert [m.training for m in modules] == modes
    found = model.state_dict()
    assert all(torch.equal(found[n], before[n]) for n in before)


def test_files_of_other_models(tmp_path):
    for fold in (False, True):
        _, path, _ = saved(tmp_path, "conv", fold, dense_above=1.0)
        not_loaded(NETS["sequence"][0](), path, "the model has no '0' with a weight")
        model = NETS["conv"][0]()
        model[0] = nn.Conv2d(3, 6, 5)
        not_loaded(model, path, r"'0' has shape \[6, 3, 3, 3\] in the file and \[6, 3")
        model = NETS["conv"][0]()
        model[0] = nn.Conv2d(3, 6, 3, padding=1, padding_mode="reflect")
        not_loaded(model, path, "'0.weight' of the model is of no layer that can be sp")
        model = NETS["conv"][0]()
        model[10] = nn.BatchNorm1d(12)
        not_loaded(model, path, r"has shape \[11\] in the file and \[12\] in the model")
        model = NETS["conv"][0]()
        model[7].bias = None
        not_loaded(model, path, "does not fit the model: .* in one of them alone")
    model = NETS["conv"][0]()
    model[4] = nn.Identity()
    not_loaded(model, path, "'3' has a ReLU in one of them alone")


def test_missing_and_other_files(tmp_path):
    model, path = nn.Sequential(nn.Linear(6, 6)), tmp_path / "file"
    not_loaded(model, path, "sparse file .* does not exist")
    not_loaded(model, 3, "load: path must be a path, got 3")
    path.write_bytes(b"no safetensors")
    not_loaded(model, path, "sparse file .* can't be read")
    fp.Masks({"0.weight": torch.eye(6) > 0}).save(path)
    not_loaded(model, path, "must be one that fisherprune.sparse.save wrote")


def rewritten(path, change):
    """Change tensors and what is said of layers, with the digest of before."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        about = json.loads(file.metadata()[FORMAT])
    change(tensors, about)
    save_file(tensors, path, metadata={FORMAT: json.dumps(about)})


def test_any_changed_byte_is_found(tmp_path):
    """Of the tensors; the header has its own checks."""
    model, path, _ = saved(tmp_path)
    whole = path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    for place in torch.randint(start, len(whole), (20,)).tolist():
        changed = bytearray(whole)
        changed[place] ^= 1 << int(torch.randint(8, ()))
        path.write_bytes(changed)
        not_loaded(NETS["conv"][0](), path, "is damaged: its tensors have another SHA")


def test_files_cut_short(tmp_path):
    _, path, _ = saved(tmp_path)
    whole = path.read_bytes()
    for length in torch.randint(0, len(whole), (20,)).tolist():
        path.write_bytes(whole[:length])
        not_loaded(NETS["conv"][0](), path, "sparse file .* can't be read")


def test_damaged_metadata(tmp_path):
    model, path, _ = saved(tmp_path)
    for change in (
        lambda tensors, about: about.pop("layers"),
        lambda tensors, about: about.pop("sha256"),
        lambda tensors, about: about.update(layers={}),
        lambda tensors, about: about["layers"].update({"0": 3}),
        lambda tensors, about: about["layers"]["0"].update(shape="abc"),
        lambda tensors, about: about["layers"]["0"].update(shape=[0]),
        lambda tensors, about: about["layers"]["0"].update(relu=1),
    ):
        sparse.save(model, path)
        rewritten(path, change)
        match = "is damaged: its metadata do not describe layers"
        not_loaded(NETS["conv"][0](), path, match)


def with_digest(path, change):
    """Change tensors, with the digest that they have then."""
    import hashlib

    def changed(tensors, about):
        change(tensors, about)
        digest = hashlib.sha256()
        for name in sorted(tensors):
            t = tensors[name]
            digest.update(f"{name} {t.dtype} {list(t.shape)}\n".encode())
            digest.update(t.reshape(-1).view(torch.uint8).numpy().tobytes())
        about["sha256"] = digest.hexdigest()

    rewritten(path, changed)


def test_layers_that_make_no_sense(tmp_path):
    model, path, _ = saved(tmp_path)

    def replace(name, value):
        return lambda tensors, about: tensors.update({name: value})

    gap = torch.tensor([0xFF, 0xFF, 0xFF, 0x7F], dtype=torch.uint8)
    values, places = torch.ones(1), torch.tensor([3], dtype=torch.uint8)
    for change, match in (
        (lambda t, a: t.pop("0.values"), "'0.values' is missing"),
        (lambda t, a: t.pop("0.places"), "'0.places' is missing"),
        (replace("0.values", torch.ones(2, 2)), "'0.values' is missing or has no sin"),
        (replace("0.places", torch.ones(3)), "'0.places' is no uint8"),
        (replace("0.places", gap[:2]), "'0': the places end within a number"),
        (replace("0.places", places), "'0' has 1 places for [0-9]+ values"),
        (lambda t, a: t.update({"0.places": gap, "0.values": values}), "has place 2"),
    ):
        sparse.save(model, path)
        with_digest(path, change)
        not_loaded(NETS["conv"][0](), path, f"is damaged: .*{match}")


def test_no_warnings_of_torch(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = nn.Sequential(nn.Linear(6, 6))
        sparse.compress(model, {"0.weight": torch.eye(6) > 0})
        sparse.save(model, tmp_path / "file")
        sparse.load(nn.Sequential(nn.Linear(6, 6)), tmp_path / "file")

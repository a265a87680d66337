"""Models are verified before use."""

from __future__ import annotations

import gc
import hashlib
import json
import math
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load, load_file, save

from ugicm.codec.codec import Codec
from ugicm.codec.config import ModelConfig
from ugicm.codec.errors import CodecError, ModelStoreError
from ugicm.codec.store import available, bitstream_digest, find_store, load_codec, model_path, read_model


@pytest.fixture
def folder(tiny_store: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_store / "tiny", tmp_path / "copy"))


def edit(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_names_and_paths(tiny_store: Path) -> None:
    assert available(tiny_store) == ["tiny"]
    assert load_codec("tiny", store=tiny_store, device="cpu").name == "tiny"
    assert load_codec(tiny_store / "tiny", device="cpu").name == "tiny"


def test_a_bare_name_is_one_of_the_store(
    tiny_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_store / "tiny", tmp_path / "tiny")
    shutil.copytree(tiny_store / "tiny", tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    assert model_path("tiny", tiny_store) == tiny_store / "tiny"
    assert model_path("./tiny", tiny_store) == model_path(Path("tiny"), tiny_store) == Path("tiny")
    assert model_path("mine", tiny_store) == Path("mine")


def test_transforms_are_stored_in_16_bits_and_computed_in_32(folder: Path) -> None:
    tensors = read_model(folder).tensors
    assert not any(tensor.dtype == torch.float16 for tensor in tensors.values())
    stored = load_file(folder / "weights.safetensors")
    for name, tensor in stored.items():
        assert torch.equal(tensors[name].to(tensor.dtype), tensor)
    assert stored["synthesis.fold.weight"].dtype == stored["analysis.down.weight"].dtype == torch.float16
    assert stored["gains.log_gain"].dtype == torch.float32


def test_unknown_model_lists_the_known(tiny_store: Path) -> None:
    with pytest.raises(ModelStoreError, match=r"no model 'big' in .*; there: tiny"):
        load_codec("big", store=tiny_store)


def test_store_from_the_environment(tiny_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UGICM_MODEL_STORE", str(tiny_store))
    assert find_store() == tiny_store


def test_damaged_weights(folder: Path) -> None:
    path = folder / "weights.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ModelStoreError, match="is damaged: SHA-256 is"):
        read_model(folder)


def test_missing_weights(folder: Path) -> None:
    (folder / "weights.safetensors").unlink()
    with pytest.raises(ModelStoreError, match="cannot read the model"):
        read_model(folder)


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe"])
def test_damaged_config(folder: Path, content: bytes) -> None:
    (folder / "config.json").write_bytes(content)
    with pytest.raises(ModelStoreError, match="cannot read the model"):
        read_model(folder)


def test_config_of_something_else(folder: Path) -> None:
    (folder / "config.json").write_text("[]")
    with pytest.raises(ModelStoreError, match=r"config\.json is not a JSON object"):
        read_model(folder)


def test_a_name_that_cannot_be_a_folder(tiny_store: Path) -> None:
    message = r"cannot look for the model 'long.*File name too long"
    if sys.version_info >= (3, 14):  # takes it for the name of one that is not there
        message = "no model 'long.*; there: tiny"
    with pytest.raises(ModelStoreError, match=message):
        load_codec("long" * 100, store=tiny_store)


def test_no_call_wakes_the_compiler(tiny_store: Path) -> None:
    """Importing that takes as long as torch itself, and 150 MB."""
    program = f"""
import sys
import numpy as np
from ugicm.codec.store import load_codec
codec = load_codec("tiny", store={str(tiny_store)!r}, device="cpu")
image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
codec.decode(codec.encode([image]), 1.0)
print("torch._dynamo" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_torch_of_another_default_type(tiny_store: Path, tiny_codec: Codec, photo: NDArray[np.uint8]) -> None:
    """A program that computes in another type by itself gets the same bytes and pixels."""
    image = photo[:100, :90]
    for dtype in (torch.float64, torch.bfloat16):
        torch.set_default_dtype(dtype)
        try:
            codec = load_codec("tiny", store=tiny_store, device="cpu", precision="float32")
            data = codec.encode([image], 40)
            refined = codec.encode([image], 40, refine=2)
            views = codec.decode(data * 2, [0.0, 1.0])
        finally:
            torch.set_default_dtype(torch.float32)
        assert data == tiny_codec.encode([image], 40)
        assert refined == tiny_codec.encode([image], 40, refine=2)
        np.testing.assert_array_equal(views, tiny_codec.decode(data * 2, [0.0, 1.0]))


def test_torch_with_another_default_device(
    tiny_store: Path, tiny_codec: Codec, photo: NDArray[np.uint8]
) -> None:
    image = photo[:100, :90]
    with torch.device("meta"):
        codec = load_codec("tiny", store=tiny_store, device="cpu", precision="float32")
        data = codec.encode([image], 40)
        refined = codec.encode([image], 40, refine=2)
        views = codec.decode(data * 2, [0.0, 1.0])
        assert len(codec.encode_to_size(image, max_bytes=len(data[0]))) <= len(data[0])
    assert data == tiny_codec.encode([image], 40)
    assert refined == tiny_codec.encode([image], 40, refine=2)
    np.testing.assert_array_equal(views, tiny_codec.decode(data * 2, [0.0, 1.0]))


def test_random_numbers_of_others_are_left_alone(tiny_store: Path, photo: NDArray[np.uint8]) -> None:
    before = torch.get_rng_state()
    load_codec("tiny", store=tiny_store, device="cpu").encode([photo[:64, :64]], refine=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_codec_is_freed_with_its_last_reference(tiny_store: Path, photo: NDArray[np.uint8]) -> None:
    codec = load_codec("tiny", store=tiny_store, device="cpu")
    codec.decode(codec.encode([photo[:64, :64]], refine=1))
    gc.collect()
    gc.disable()
    try:
        codec_lives = weakref.ref(codec)
        del codec
        assert codec_lives() is None
    finally:
        gc.enable()


def test_newer_format(folder: Path) -> None:
    edit(folder, format=99)
    with pytest.raises(ModelStoreError, match="has model format 99; this program reads 7"):
        read_model(folder)


def test_digest_of_other_weights(folder: Path) -> None:
    edit(folder, digest="00" * 8)
    with pytest.raises(ModelStoreError, match="does not belong to the weights"):
        read_model(folder)


def test_unknown_config_key(folder: Path) -> None:
    edit(folder, model={"name": "x", "colour": 3})
    with pytest.raises(ModelStoreError, match="unknown keys in the model config: colour"):
        read_model(folder)


def test_weights_of_another_shape(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())["model"]
    edit(folder, model={**config, "encoder_blocks": 2})
    with pytest.raises(ModelStoreError, match="weights of tiny do not fit its config"):
        load_codec(folder, device="cpu")


@pytest.mark.parametrize("device", ["abacus", "cuda:99"])
def test_absent_device(tiny_store: Path, device: str) -> None:
    with pytest.raises(CodecError, match=f"device '{device}' cannot be used here .*UGICM_DEVICE"):
        load_codec("tiny", store=tiny_store, device=device)


def test_unknown_precision(tiny_store: Path) -> None:
    with pytest.raises(CodecError, match="precision must be auto, float32 or bfloat16, got 'float16'"):
        load_codec("tiny", store=tiny_store, device="cpu", precision="float16")


def rewrite(folder: Path, tensors: dict[str, torch.Tensor], **model: object) -> None:
    """A model with these contents, and hashes that belong to them."""
    description = json.loads((folder / "config.json").read_text())
    description["model"].update(model)
    data = save({name: tensor.contiguous() for name, tensor in tensors.items()})
    (folder / "weights.safetensors").write_bytes(data)
    computed = {
        name: value.float() if value.is_floating_point() else value for name, value in tensors.items()
    }
    digest = bitstream_digest(ModelConfig.from_dict(description["model"]), computed)
    description.update(sha256=hashlib.sha256(data).hexdigest(), digest=digest.hex())
    (folder / "config.json").write_text(json.dumps(description))


def without(prefix: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith(prefix)]:
            del tensors[name]

    return change


def one_table_less(tensors: dict[str, torch.Tensor]) -> None:
    lengths = tensors["tables.y.lengths"] = tensors["tables.y.lengths"][:-1]
    tensors["tables.y.frequencies"] = tensors["tables.y.frequencies"][: int(lengths.sum())]


def a_wrong_sum(tensors: dict[str, torch.Tensor]) -> None:
    tensors["tables.y.frequencies"] = tensors["tables.y.frequencies"].clone()
    tensors["tables.y.frequencies"][0] += 1


def another_shape(tensors: dict[str, torch.Tensor]) -> None:
    tensors["entropy.base.weight"] = tensors["entropy.base.weight"][:-1]


def tables_of_fewer_channels(tensors: dict[str, torch.Tensor]) -> None:
    tensors["tables.z.choice"] = tensors["tables.z.choice"][..., :-1]


def fewer_levels(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = torch.ones(2)

    return change


def as_type(name: str, dtype: torch.dtype) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = tensors[name].to(dtype)

    return change


def not_a_number(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = torch.full_like(tensors[name], math.nan)

    return change


def a_foreign_layer(tensors: dict[str, torch.Tensor]) -> None:
    for kind in ("weight", "bias", "bits"):
        tensors[f"entropy.trunk.9.expand.{kind}"] = tensors[f"entropy.base.{kind}"].clone()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("tables.y"), r"is not valid: KeyError\('tables.y.frequencies'\)"),
        (without("tables.z"), "is not valid: KeyError"),
        (without("entropy.base.bias"), "is not valid: KeyError"),
        (without("entropy.base"), "is not valid: KeyError"),
        (another_shape, "entropy layer base of tiny has not the shape of its config"),
        (a_foreign_layer, "knows nothing of: .*trunk.9.expand"),
        (one_table_less, "tiny has 63 tables of y, not 64"),
        (a_wrong_sum, "must be at least 1 and sum to"),
        (tables_of_fewer_channels, "tiny has tables of 7 hyper channels, not 8"),
        (fewer_levels("grain"), r"tiny has 3 levels, but grain of shape \(2,\)"),
        (fewer_levels("reach"), "3 levels, but reach of shape"),
        (fewer_levels("largest"), "3 levels, but largest of shape"),
        (
            as_type("entropy.base.weight", torch.float32),
            "entropy layer base of tiny is not of integers as they",
        ),
        (as_type("entropy.base.bias", torch.int64), "entropy layer base of tiny is not of integers as they"),
        (as_type("tables.z.choice", torch.int32), "the choice of hyper tables is uint8, got int32"),
        (as_type("tables.y.frequencies", torch.float32), "table entries are int32, got float32"),
        (not_a_number("gains.log_gain"), "values in gains.log_gain that are not finite"),
        (not_a_number("synthesis.fold.bias"), "values in synthesis.fold.bias that are not finite"),
        (lambda tensors: None, None),
    ],
)
def test_contents_that_do_not_fit(
    folder: Path, change: Callable[[dict[str, torch.Tensor]], None], message: str | None
) -> None:
    """Of a folder that somebody made, not one that was damaged."""
    tensors = load((folder / "weights.safetensors").read_bytes())
    change(tensors)
    rewrite(folder, tensors)
    if message is None:
        load_codec(folder, device="cpu")
    else:
        with pytest.raises(ModelStoreError, match=message):
            load_codec(folder, device="cpu")


def test_a_config_that_asks_for_too_much(folder: Path) -> None:
    description = json.loads((folder / "config.json").read_text())
    for name in ("channels", "latent_channels", "entropy_channels", "decoder_blocks", "levels"):
        changed = description | {"model": description["model"] | {name: 10**6}}
        (folder / "config.json").write_text(json.dumps(changed))
        with pytest.raises(ModelStoreError, match=rf"is not valid: {name} must be at most \d+, got 1000000"):
            load_codec(folder, device="cpu")


def test_a_config_that_goes_deep(folder: Path) -> None:
    (folder / "config.json").write_text("[" * 100_000)
    with pytest.raises(ModelStoreError, match="cannot read the model in"):
        load_codec(folder, device="cpu")


@pytest.mark.parametrize(("least", "most"), [(0.2, 0.1), (0.1, 0.1), (0.1, math.inf)])
def test_rates_from_the_lowest_to_the_highest(least: float, most: float) -> None:
    with pytest.raises(ValueError, match=f"must be finite and above lambda_min, got {least} and {most}"):
        ModelConfig(name="x", lambda_min=least, lambda_max=most)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channels": 0}, "channels must be positive, got 0"),
        ({"context_blocks": -1}, "context_blocks must be positive, got -1"),
        ({"lambda_min": math.nan}, "lambda_min must be positive, got nan"),
        ({"levels": True}, "levels must be of type int, got True"),
        ({"levels": 8.0}, r"levels must be of type int, got 8\.0"),
        ({"levels": 1}, "levels must be at least 2, got 1"),
        ({"latent_channels": 30}, "latent_channels must be a multiple of 4, got 30"),
        ({"name": ""}, "name must be of printable characters, got ''"),
        ({"name": "a\nb"}, r"name must be of printable characters, got 'a\\nb'"),
    ],
)
def test_a_config_of_no_model(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig(**{"name": "x", **changes})


def test_a_config_with_more_blocks(folder: Path) -> None:
    tensors = load((folder / "weights.safetensors").read_bytes())
    rewrite(folder, tensors, context_blocks=read_model(folder).config.context_blocks + 1)
    with pytest.raises(ModelStoreError, match=r"KeyError\('entropy.trunk.1"):
        load_codec(folder, device="cpu")

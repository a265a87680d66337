"""Mixtures of machine views: what they are made of, and that bitstreams stay as they were."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.conftest import tiny_trainable, write_tiny_model
from ugicm.codec.store import load_codec, read_model
from ugicm_train.cli import main
from ugicm_train.export import model_tensors, write_model
from ugicm_train.model import PREFERENCE, TrainableCodec


def test_views_add_up_and_bitstreams_stay(tmp_path: Path, photo: NDArray[np.uint8]) -> None:
    base, other = write_tiny_model(tmp_path / "base", seed=1), tmp_path / "other"
    tensors = model_tensors(tiny_trainable(2)) | {"grain": torch.full((3,), 0.1)}
    write_model(other, tiny_trainable(2).config, tensors, {"steps": 1, "polish": [{"teacher": "t"}]})
    assert main(["mix", str(tmp_path / "mixed"), str(base), f"{base}*0.5", f"{other}*0.25"]) == 0
    first, second, mixed = (read_model(tmp_path / name) for name in ("base", "other", "mixed"))
    assert mixed.digest == first.digest
    assert (first.config.name, mixed.config.name) == ("tiny", "mixed")
    for name, value in mixed.tensors.items():
        if name.partition(".")[0] in PREFERENCE:
            expected = 0.5 * first.tensors[name] + 0.25 * second.tensors[name]
            torch.testing.assert_close(value, expected.half().float())  # as it is stored
        elif name == "grain":
            torch.testing.assert_close(value, torch.full((3,), 0.025))
        elif name == "reach":
            assert torch.equal(value, torch.ones(3))
        else:
            assert torch.equal(value, first.tensors[name])
    codecs = [load_codec(tmp_path / name, device="cpu", precision="float32") for name in ("base", "mixed")]
    crop = photo[:64, :64]
    bitstreams = [codec.encode([crop])[0] for codec in codecs]
    assert bitstreams[0] == bitstreams[1]
    human, machine = ([codec.decode(bitstreams[:1], s)[0] for codec in codecs] for s in (0.0, 1.0))
    np.testing.assert_array_equal(*human)
    assert (machine[0] != machine[1]).any()
    record = json.loads((tmp_path / "mixed" / "config.json").read_text())["training"]
    assert record["steps"] == 0
    assert record["mixed"][1] == {
        "share": 0.25,
        "weights": second.weights_sha256,
        "polish": [{"teacher": "t"}],
    }


def test_a_share_may_be_left_out_and_the_result_may_be_the_base(tmp_path: Path) -> None:
    base, other = write_tiny_model(tmp_path / "base", 1), write_tiny_model(tmp_path / "other", 2)
    assert main(["mix", str(base), str(base), str(other)]) == 0
    mixed, view = read_model(base), read_model(other)
    assert torch.equal(mixed.tensors["preference.fold.weight"], view.tensors["preference.fold.weight"])


def test_nothing_stays_of_the_machine_view_of_the_base(tmp_path: Path) -> None:
    base, view = tmp_path / "base", write_tiny_model(tmp_path / "view", 2)
    tensors = model_tensors(tiny_trainable(1)) | {"grain": torch.full((3,), 0.1)}
    write_model(base, tiny_trainable(1).config, tensors, {"steps": 1, "grain": 0.2, "polish": []})
    assert main(["mix", str(tmp_path / "mixed"), str(base), str(view)]) == 0
    assert "grain" not in read_model(tmp_path / "mixed").tensors
    record = json.loads((tmp_path / "mixed" / "config.json").read_text())["training"]
    assert record.keys() == {"steps", "mixed", "reach"}


def test_reach_weakens_the_machine_view_by_quality(tmp_path: Path, photo: NDArray[np.uint8]) -> None:
    base = tmp_path / "base"
    model = tiny_trainable(1)
    write_model(base, model.config, model_tensors(model) | {"grain": torch.full((3,), 0.1)}, {})
    mixed = tmp_path / "mixed"
    assert main(["mix", str(mixed), str(base), str(base), "--reach", "1", "0.5", "0"]) == 0
    # In place of what a view has, for its grain as well.
    assert main(["mix", str(mixed), str(base), str(mixed), "--reach", "1", "0.5", "0"]) == 0
    torch.testing.assert_close(read_model(mixed).tensors["grain"], torch.full((3,), 0.1))
    whole, weaker = (load_codec(folder, device="cpu", precision="float32") for folder in (base, mixed))
    bitstreams = whole.encode([photo[:64, :64]] * 3, [1.0, 50.5, 100.0])
    together = weaker.decode(bitstreams, 1.0)
    for data, strength, picture in zip(bitstreams, (1.0, 0.5, 1 / 32), together, strict=True):
        alone = weaker.decode([data], 1.0)[0]
        np.testing.assert_allclose(alone.astype(int), picture, atol=1)
        np.testing.assert_array_equal(weaker.decode([data], 1.0)[0], whole.decode([data], strength)[0])
    np.testing.assert_array_equal(weaker.decode(bitstreams)[2], whole.decode(bitstreams)[2])
    # So does half of it.
    half, quarter = (codec.decode(bitstreams[1:2], s)[0] for codec, s in ((weaker, 0.5), (whole, 0.25)))
    np.testing.assert_array_equal(half, quarter)
    # Mixtures keep it, but not those of views that differ in it.
    assert main(["mix", str(tmp_path / "again"), str(base), str(mixed)]) == 0
    assert read_model(tmp_path / "again").tensors["reach"].tolist() == [1.0, 0.5, 0.0]


def test_what_cannot_be_mixed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = write_tiny_model(tmp_path / "base")
    config = dataclasses.replace(tiny_trainable().config, decoder_blocks=1)
    write_model(tmp_path / "small", config, model_tensors(TrainableCodec(config)), {})
    assert main(["mix", str(tmp_path / "out"), str(base), f"{tmp_path / 'small'}*1"]) == 1
    assert "different shapes or rates" in capsys.readouterr().err
    config = dataclasses.replace(tiny_trainable().config, lambda_max=0.02)
    write_model(tmp_path / "low", config, model_tensors(TrainableCodec(config)), {})
    assert main(["mix", str(tmp_path / "out"), str(base), str(tmp_path / "low")]) == 1
    assert "different shapes or rates" in capsys.readouterr().err
    reached = tmp_path / "reached"
    assert main(["mix", str(reached), str(base), str(base), "--reach", "1", "1", "0.5"]) == 0
    assert main(["mix", str(tmp_path / "out"), str(base), str(base), str(reached)]) == 1
    assert "different reach" in capsys.readouterr().err
    for reach in (["1", "1"], ["1", "1", "2"]):
        assert main(["mix", str(tmp_path / "out"), str(base), str(base), "--reach", *reach]) == 1
        assert "reach needs 3 numbers in 0..1" in capsys.readouterr().err
    for view, message in (
        ("nowhere*1", "no model 'nowhere'"),
        (f"{base}*much", "could not convert"),
        (f"{base}*nan", "a share must be finite, got nan"),
    ):
        with pytest.raises(SystemExit):
            main(["mix", str(tmp_path / "out"), str(base), view])
        assert message in capsys.readouterr().err

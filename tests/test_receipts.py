"""receipts: bytes that repeat, atomic writes, every fault named, and a check that trusts nothing."""
import json
import os
import shutil
from dataclasses import dataclass

import numpy as np
import pytest

from oodrepro import metrics, receipts
from oodrepro.settings import Settings

IDENTITY = dict(paper="lmd", tier="smoke", table="table1", row="digits", column="glyphs", method="lmd",
                variant={"sampler": "ddim", "steps": 10}, seed=0)


def measured(seed=0, n_id=30, n_ood=20):
    is_ood = np.repeat([False, True], [n_id, n_ood])
    return dict(score=np.random.default_rng(seed).normal(size=n_id + n_ood) + is_ood, is_ood=is_ood,
                index=np.r_[np.arange(n_id), np.arange(n_ood)], nfe_per_image=20, seconds=0.5, settings={"steps": 10})


def write(folder, **changes):
    return receipts.write_receipt(folder, **{**IDENTITY, **measured(), **changes})


def test_the_record_follows_the_design(tmp_path):
    path = write(tmp_path)
    record = json.loads(path.read_text())
    assert list(record)[:18] == ["schema", "paper", "tier", "table", "row", "column", "method", "variant", "seed",
                                 "n_id", "n_ood", "metrics", "nfe_per_image", "seconds", "settings_hash", "code",
                                 "environment", "scores"]
    assert record["schema"] == 1 and record["row"] == {"id": "digits"} and record["column"] == {"ood": "glyphs"}
    assert list(record["metrics"]) == ["auroc", "fpr95", "fpr95_id_positive", "aupr_in", "aupr_out", "id_accuracy"]
    assert record["metrics"]["id_accuracy"] is None and {"commit", "dirty"} == set(record["code"])
    with np.load(path.with_name(record["scores"]), allow_pickle=False) as stored:
        assert {name: stored[name].dtype.name for name in stored.files} == {"score": "float32", "is_ood": "bool",
                                                                            "index": "int64"}
        again = metrics.evaluate(stored["score"], stored["is_ood"])
    assert all(record["metrics"][name] == again[name] for name in receipts.RECORDED)


def test_bytes_repeat(tmp_path, monkeypatch):
    first = write(tmp_path / "a")
    monkeypatch.setattr("time.time", lambda: 2e9)  # another day
    second = write(tmp_path / "b")
    assert first.name == second.name
    assert first.read_bytes() == second.read_bytes()
    assert first.with_suffix(".npz").read_bytes() == second.with_suffix(".npz").read_bytes()


def test_settings_objects_and_dictionaries_are_hashed_as_they_are_stored(tmp_path):
    @dataclass(frozen=True)
    class Tier(Settings):
        steps: int = 10

    record = json.loads(write(tmp_path, settings=Tier()).read_text())
    assert record["settings"] == {"kind": "Tier", "steps": 10} and record["settings_hash"] == Tier().hash
    assert receipts.check(tmp_path) == []


def test_other_papers_need_their_fields(tmp_path):
    oal = dict(paper="oal", row={"id": "cifar10", "training": "oal", "mode": "fixed"},
               column={"ood": "cifar100", "group": "near"}, method="energy")
    mixup = dict(paper="ddpm_label_mixup", row={"id": "mnist", "loss": "arcface", "outliers": "mixup"}, column="kmnist",
                 method="msp")
    write(tmp_path, **oal, id_accuracy=0.9)
    write(tmp_path, **mixup)
    frame = receipts.read_receipts(tmp_path)
    assert set(frame["row_training"].dropna()) == {"oal"} and set(frame["row_loss"].dropna()) == {"arcface"}
    with pytest.raises(ValueError, match="row.mode is 'both'"):
        write(tmp_path, **{**oal, "row": {"id": "cifar10", "training": "oal", "mode": "both"}})
    with pytest.raises(ValueError, match="column.group is 'middle'"):
        write(tmp_path, **{**oal, "column": {"ood": "cifar100", "group": "middle"}})
    with pytest.raises(ValueError, match="row.loss is 'hinge'"):
        write(tmp_path, **{**mixup, "row": {"id": "mnist", "loss": "hinge", "outliers": "mixup"}})


@pytest.mark.parametrize("field, value", [
    ("paper", "unknown"), ("tier", "large"), ("table", ""), ("method", ""), ("seed", 0.5), ("seed", True), ("seed", -1),
    ("nfe_per_image", -1), ("nfe_per_image", float("nan")), ("seconds", float("inf")), ("variant", {"mask": [1, 2]}),
    ("row", "faces"), ("column", {"id": "glyphs"}), ("id_accuracy", 93.0)])
def test_bad_fields_are_refused_and_nothing_is_written(tmp_path, field, value):
    with pytest.raises(ValueError, match=field):
        write(tmp_path, **{field: value})
    assert not any(tmp_path.iterdir())


def test_an_id_set_cannot_be_its_own_ood_set(tmp_path):
    with pytest.raises(ValueError, match="same, 'digits'"):
        write(tmp_path, column="digits")


def test_a_write_that_dies_between_the_two_files_is_noticed(tmp_path, monkeypatch):
    path = write(tmp_path)
    real = receipts._write

    def dies(target, content):
        if target.suffix == ".json":
            raise KeyboardInterrupt
        real(target, content)

    monkeypatch.setattr(receipts, "_write", dies)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, **measured(seed=9))
    assert any("checksum differs" in line for line in receipts.check(tmp_path))
    assert path.name in receipts.check(tmp_path)[0]


def test_half_written_temporary_files_are_ignored(tmp_path):
    write(tmp_path)
    (tmp_path / ".lmd.tmp-1-abc.json").write_text("{")
    (tmp_path / ".lmd.tmp-1-abc.npz").write_bytes(b"PK")
    assert len(receipts.read_receipts(tmp_path)) == 1 and receipts.check(tmp_path) == []


def damage(path, fault):
    scores = path.with_suffix(".npz")
    record = json.loads(path.read_text())
    if fault == "metric":
        record["metrics"]["fpr95"] += 1e-6
    elif fault == "seed":
        record["seed"] = 7
    elif fault == "settings":
        record["settings"]["steps"] = 1000
    elif fault == "counts":
        record["n_ood"] += 1
    elif fault == "empty":
        return path.write_text("")
    elif fault == "list":
        return path.write_text("[1, 2]")
    elif fault == "no metrics":
        record["metrics"] = "lost"
    elif fault == "outside":
        record["scores"] = "../../secret.npz"
    elif fault == "scores missing":
        return os.remove(scores)
    elif fault == "scores cut":
        return scores.write_bytes(scores.read_bytes()[:-40])
    elif fault == "scores changed":
        return scores.write_bytes(receipts._npz_bytes({**receipts.load_scores(path), "score": np.zeros(50, "f4")}))
    elif fault == "pickle":
        return np.savez(scores, score=np.array([{}], dtype=object))
    elif fault == "orphan":
        return shutil.copy(scores, scores.with_name("lonely.npz"))
    elif fault == "copy":
        return shutil.copy(path, path.with_name("copy.json"))
    path.write_text(json.dumps(record))


@pytest.mark.parametrize("fault, words", [
    ("metric", "fpr95 is"), ("seed", "belong to a file named"), ("settings", "settings_hash"),
    ("counts", "n_ood is 21"),
    ("empty", "JSON"), ("list", "not a receipt"), ("no metrics", "metrics.auroc"),
    ("outside", "scores is missing or wrong"), ("scores missing", "missing; restore"), ("scores cut", "npz"),
    ("scores changed", "checksum differs"), ("pickle", "not a readable npz"), ("orphan", "without a receipt"),
    ("copy", "belong to a file named")])
def test_check_finds_every_planted_fault(tmp_path, fault, words):
    path = write(tmp_path)
    assert receipts.check(tmp_path) == []
    damage(path, fault)
    assert any(words in line for line in receipts.check(tmp_path)), receipts.check(tmp_path)


def test_all_bad_files_are_named_at_once(tmp_path):
    paths = [write(tmp_path, seed=seed) for seed in range(4)]
    for path, fault in zip(paths, ["empty", "scores missing", "list"]):
        damage(path, fault)
    with pytest.raises(ValueError) as caught:
        receipts.read_receipts(tmp_path)
    assert "3 unusable" in str(caught.value) and all(path.name in str(caught.value) for path in paths[:3])
    assert paths[3].name not in str(caught.value)


def test_an_empty_folder_is_an_empty_table(tmp_path):
    frame = receipts.read_receipts(tmp_path)
    assert len(frame) == 0 and {"row_id", "column_ood", "auroc"} <= set(frame.columns)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        receipts.read_receipts(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        receipts.check(tmp_path / "nowhere")

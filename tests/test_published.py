"""published: the files in the package are complete and honest; every fault in one is named."""
from importlib import resources

import pytest
import yaml

from oodrepro import published as module
from oodrepro.published import published

LMD_TABLE1 = {  # as in the fact sheet: value, certainty
    ("cifar10", "cifar100"): (0.607, "published"), ("cifar10", "svhn"): (0.992, "published"),
    ("cifar100", "cifar10"): (0.568, "published"), ("cifar100", "svhn"): (0.985, "published"),
    ("svhn", "cifar10"): (0.914, "recalled"), ("svhn", "cifar100"): (0.876, "recalled"),
    ("mnist", "kmnist"): (0.984, "recalled"), ("mnist", "fashion_mnist"): (0.999, "recalled"),
    ("kmnist", "mnist"): (0.978, "recalled"), ("kmnist", "fashion_mnist"): (0.993, "recalled"),
    ("fashion_mnist", "mnist"): (0.992, "recalled"), ("fashion_mnist", "kmnist"): (0.990, "recalled"),
    ("average", "average"): (0.907, "reported-by-others")}


@pytest.mark.parametrize("paper", module.published_papers())
def test_every_file_in_the_package_is_valid_and_names_itself(paper):
    table = published(paper)
    assert module.paper_facts(paper)["paper"] == paper and set(table["paper"]) == {paper}
    assert table["value"].isna().equals(table["certainty"] == "unknown")
    assert 0 < module.paper_facts(paper)["tolerance"] < 0.1 and len(module.paper_facts(paper)["tolerance_reason"]) > 20


def test_the_module_and_the_data_folder_of_the_same_name_get_along():
    assert module.__file__.endswith("published.py")
    file = resources.files("oodrepro") / "published" / "lmd.yaml"
    cells = yaml.safe_load(file.read_text(encoding="utf-8"))["cells"]
    wanted = {"table", "row", "column", "metric", "value", "convention", "source", "certainty"}
    assert all(wanted <= set(cell) for cell in cells)


def test_lmd_table_1_stands_as_it_was_found():
    table = published("lmd")
    table1 = table[table["table"] == "table1"]
    found = {(row.row_id, row.column_ood): (row.value, row.certainty) for row in table1.itertuples()}
    assert found == LMD_TABLE1
    assert all(len(source) > 20 for source in table1["source"])


def test_only_four_values_of_lmd_may_be_judged():
    table = published("lmd")
    assert (table["certainty"] == "published").sum() == 4
    assert set(table[table["table"].str.startswith("rerun")]["certainty"]) == {"reported-by-others"}
    assert set(table[table["table"].str.startswith("ablation")]["certainty"]) == {"unknown"}


GOOD = {"table": "t", "row": {"id": "mnist"}, "column": {"ood": "kmnist"}, "method": "lmd", "metric": "auroc",
        "value": 0.9, "convention": "OOD positive", "source": "page 3", "certainty": "published"}


def write(folder, cells, **facts):
    head = {**{name: "x" for name in module._FACTS}, "tolerance": 0.01, **facts}
    (folder / "toy.yaml").write_text(yaml.safe_dump({**head, "cells": cells}))


@pytest.mark.parametrize("change, words", [
    ({"certainty": "probably"}, "certainty 'probably'"), ({"value": None}, "unknown cells have null"),
    ({"value": 90.0}, "did you mean 0.9"), ({"value": "high"}, "value 'high'"), ({"value": True}, "value True"),
    ({"metric": "AUROC"}, "metric 'AUROC'"), ({"row": {"ood": "mnist"}}, "needs row"),
    ({"column": "kmnist"}, "needs column"), ({"source": ""}, "empty source"),
    ({"convention": None}, "empty convention"),
    ({"pages": 3}, "unknown field 'pages'")])
def test_a_bad_cell_is_named(tmp_path, change, words):
    write(tmp_path, [GOOD, {**GOOD, "table": "second", **change}])
    with pytest.raises(ValueError, match=words) as caught:
        published("toy", tmp_path)
    assert "cell 2 (second" in str(caught.value)


@pytest.mark.parametrize("name", module._REQUIRED)
def test_a_missing_field_is_named(tmp_path, name):
    write(tmp_path, [{key: value for key, value in GOOD.items() if key != name}])
    with pytest.raises(ValueError, match=f"cell 1.*lacks '{name}'"):
        published("toy", tmp_path)


def test_all_faults_are_named_at_once_and_duplicates_point_to_the_first(tmp_path):
    write(tmp_path, [GOOD, {**GOOD, "value": 0.8}, "text", {**GOOD, "table": "u", "source": ""}])
    with pytest.raises(ValueError) as caught:
        published("toy", tmp_path)
    for words in ("cell 2", "repeats cell 1", "cell 3", "not an object", "cell 4"):
        assert words in str(caught.value)


def test_another_method_variant_or_metric_is_another_cell(tmp_path):
    others = [{"method": "msp"}, {"variant": {"mask": "center"}}, {"metric": "fpr95"}, {"table": "other"}]
    write(tmp_path, [GOOD] + [{**GOOD, **other} for other in others])
    table = published("toy", tmp_path)
    assert len(table) == 5 and table["variant_mask"].tolist()[2] == "center"


def test_files_that_are_no_published_numbers(tmp_path):
    with pytest.raises(ValueError, match="no published numbers for 'nothing'.*lmd"):
        published("nothing")
    for text, words in [("a: [", "not valid YAML"), ("a: 1\na: 2", "stands twice"), ("- 1", "lacks paper"),
                        ("", "lacks")]:
        (tmp_path / "toy.yaml").write_text(text)
        with pytest.raises(ValueError, match=words):
            published("toy", tmp_path)
    write(tmp_path, [])
    assert len(published("toy", tmp_path)) == 0

"""`fpn paper`: which cells a table needs, what is concluded from them, the page, and a real run that is cut off."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest

import fpn
from fpn.data.generated import generate
from fpn.errors import DataError, OptionError, TrainingError
from fpn.paper import cells, run
from fpn.paper.claims import CLAIMS, Claim, between, differences, judge, judge_all
from fpn.paper.command import paper
from fpn.paper.interval import estimate, quantile
from fpn.paper.page import Outcomes, write_page
from fpn.paper.published import ANCHORS, PUBLISHED
from fpn.paper.run import run_paper
from fpn.paper.scales import chosen, full, placed, small
from fpn.paper.tables import TABLES, WINDOWS, Cell, plan, table_of
from fpn.training.options import Options
from fpn.training.schedule import factor
from fpn.training.settings import resolve

QUICK = {"backbone": "tiny", "weights": "none", "short": 64, "epochs": 1, "device": "cpu", "workers": 0}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return generate(tmp_path_factory.mktemp("data") / "shapes", images=8, size=(96, 96), seed=2)


@pytest.fixture
def trainings(monkeypatch):
    """The folders of all trainings; no plots, which take longer than such small cells."""
    names, real = [], fpn.train
    monkeypatch.setattr("fpn.paper.page.plot", lambda *_: None)
    monkeypatch.setattr(fpn, "train", lambda *a, **k: names.append(k["out"].name) or real(*a, **k))
    return names


def keys(*arguments):
    return [cell.key.removesuffix("-seed0") for cell in plan(*arguments)]


def cell_numbers(rows, metric="AR1000"):
    """{row: values by seed in percent} as the cells would have them."""
    return {row: {seed: {metric: v / 100} for seed, v in enumerate(values)} for row, values in rows.items()}


# Which cells.


def test_each_table_has_its_cells_once_and_after_those_that_they_need():
    assert keys(TABLES[1], 1) == [f"rpn-{row}" for row in "abcdef"]
    assert keys(TABLES[2], 1) == ["rpn-c", *(f"fast_rcnn-{row}-on-c" for row in "abcdef")]
    assert keys(TABLES[3], 1) == [
        *("rpn-a", "fast_rcnn-a-on-a", "rpn-b", "fast_rcnn-b-on-b", "rpn-c", "fast_rcnn-c-on-c")
    ]
    assert keys(TABLES[5], 1) == ["rpn-c", "fast_rcnn-c-on-c", "shared_rpn-c", "shared_fast_rcnn-c"]
    assert keys(TABLES[6], 1) == [f"mask_proposals-{name}" for name in ("5x5", "7x7", "both")]
    assert keys(TABLES[2], 1, ["f"]) == ["rpn-c", "fast_rcnn-f-on-c"]


def test_tables_share_cells_and_seeds_come_one_after_the_other():
    assert len({cell for table in TABLES.values() for cell in plan(table, 1)}) == 6 + 6 + 2 + 2 + 3
    seeds = [cell.seed for cell in plan(TABLES[2], 3)]
    assert seeds == sorted(seeds) and len(seeds) == 3 * 7


def test_the_tables_have_the_rows_and_columns_that_are_published():
    for number, table in TABLES.items():
        assert table.rows.keys() == PUBLISHED[number].keys()
        assert all(row.keys() == table.metrics.keys() for row in PUBLISHED[number].values())
    assert ANCHORS.keys() == TABLES[1].rows.keys() and WINDOWS.keys() == TABLES[6].rows.keys()
    with pytest.raises(OptionError, match="table 4: .*1, 2, 3, 5, 6"):
        table_of(4)


# Statistics and claims.


def test_intervals_on_worked_numbers():
    three = estimate([40.0, 42.0, 44.0])
    assert (three.mean, three.spread, three.count) == (42.0, 2.0, 3)
    assert three.half == pytest.approx(4.303 * 2 / 3**0.5)
    one = estimate([40.0])
    assert one.spread is None and one.low == -np.inf and one.high == np.inf
    assert estimate([0.5, 0.5]).low == -np.inf  # equal by steps of the recall, not for certain
    # From tables of Student's t.
    assert [round(quantile(n), 3) for n in (1, 2, 10, 11, 20, 30)] == [12.706, 4.303, 2.228, 2.201, 2.086, 2.042]
    assert quantile(100) == pytest.approx(1.984, abs=5e-4)


def test_differences_are_taken_within_a_seed():
    numbers = cell_numbers({"c": [50, 60, 70], "a": [49.01, 59, 68.99]})  # seeds differ far more than rows
    assert between("c", "a", "AR1000").by_seed(numbers) == pytest.approx({0: 0.99, 1: 1, 2: 1.01})
    assert -1 < differences(1, "AR1000", numbers)["a"].high < -0.97
    del numbers["a"][1]
    assert between("c", "a", "AR1000").by_seed(numbers).keys() == {0, 2}


def test_every_claim_holds_on_the_papers_own_numbers():
    for number in TABLES:
        numbers = {  # with a little chance in them, as without any nothing can be told
            row: {
                s: {name: v / 100 + 1e-5 * s * n * m for m, (name, v) in enumerate(values.items(), 1)} for s in range(3)
            }
            for n, (row, values) in enumerate(PUBLISHED[number].items())
        }
        verdicts = judge_all(number, numbers)
        assert verdicts and all(verdict.outcome == "holds here" for verdict in verdicts), number


CLAIM = Claim(1, "c is ahead of a and d.", "AR1k", tuple(between("c", row, "AR1000") for row in "ad"))
ROWS = {"c": [50.0, 50.5, 51.0], "a": [45.0, 45.4, 46.1], "d": [45.0, 45.4, 46.1]}


@pytest.mark.parametrize(
    ("rows", "outcome", "words"),
    [
        ({}, "holds", r"c − a \+5.0 \[\+4.8, \+5.2\], in the paper \+8.0"),
        ({"d": [55.0, 55.4, 56.1]}, "does not hold", "Not above 0: c − d"),
        ({"d": [50.1, 50.2, 51.3]}, "cannot be told", "does not say whether it is above 0: c − d"),
        ({"c": [50.0], "a": [45.0], "d": [45.0]}, "cannot be told", "One seed"),
        ({"d": []}, "cannot be told", "Not run yet: d"),
        ({"d": [-100.0, -100.0, -100.0]}, "cannot be told", "no known objects"),
    ],
)
def test_a_claim_holds_or_does_not_or_cannot_be_told(rows, outcome, words):
    verdict = judge(CLAIM, cell_numbers(ROWS | rows))
    assert verdict.outcome.startswith(outcome) and re.search(words, verdict.sentence), verdict.sentence


@pytest.mark.parametrize(
    ("f", "outcome"),
    [([33.4, 33.0, 33.2], "holds"), ([29.0, 29.4, 29.3], "does not"), ([30.0, 34.0, 33.0], "cannot be told")],
)
def test_nearly_as_good_is_a_matter_of_both_sides(f, outcome):
    claim = next(claim for claim in CLAIMS if claim.within)
    verdict = judge(claim, cell_numbers({"c": [33.9, 33.5, 33.8], "f": f}, "AP"))
    assert verdict.outcome.startswith(outcome)


def test_sizes_without_objects_are_named():
    claim = next(claim for claim in CLAIMS if "small objects" in claim.text)
    metrics = {"AR1000_small": -1.0, "AR1000_medium": 0.5, "AR1000_large": 0.6}
    verdict = judge(claim, {row: {seed: metrics for seed in range(3)} for row in "ac"})
    assert verdict.outcome.startswith("cannot") and "no small objects" in verdict.sentence


# The page.


def test_the_page_stands_by_itself_and_says_what_is_missing(tmp_path):
    numbers = cell_numbers({"c": [50.0, 52.0], "a": [45.0, 46.0]})
    for seed in numbers["c"].values():
        seed |= {"AR1000_small": -1.0, "AR1000_large": 0.6}
    names = {"c": "FPN", "a": "one map <of C4>"}
    first = Outcomes(TABLES[1], names, numbers, 12, {"a": 6000, "c": 25575})
    second = Outcomes(TABLES[6], {}, {}, 6)
    page = write_page(tmp_path, [first, second], {"Machine": "2 cores"}).read_text()
    text = (tmp_path / "paper.md").read_text()
    assert "| c: FPN | 25,575 (200k) | – (44.0) | 51.0 ± 1.4 (56.3) | – (44.9) |" in text
    assert "| d | – (200k) | – (37.4) |" in text
    assert "So far 4 of 12 cells are done." in text and "Not run yet: b, d, e and f." in text
    assert "−5.5 [−11.9, +0.9] (−8.0)" in text and "- Machine: 2 cores" in text
    assert (tmp_path / "table-1.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "table-6.png").exists()  # nothing to draw
    assert "one map &lt;of C4&gt;" in page and "<of C4>" not in page
    assert not re.search(r'(src|href|srcset)="(?!data:)', page) and "<script" not in page


# The scales.


def test_full_has_the_papers_iterations_on_data_of_any_size(monkeypatch):
    for images in (115_000, 640):
        training = full("resnet50", "none", None, None, None, images, {"device": "cpu"}).training
        for model, iterations in {"rpn": 40_000, "fast_rcnn": 80_000, "mask_proposals": 80_000}.items():
            options = training[model]
            assert options["epochs"] * (images // 16) == pytest.approx(iterations, rel=0.1)
            assert options["batch"] * options["accumulate"] == 16 and options["schedule"] == "paper"
    assert training["rpn"]["lr"] == 0.02 and training["mask_proposals"]["lr"] == 0.03
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    where = placed("cpu", 8, None)
    assert where == {"device": "cpu", "devices": 8, "nodes": 1}
    eight = full("resnet50", "none", None, None, None, 115_000, where).training["rpn"]
    assert (eight["batch"], eight["accumulate"]) == (2, 1)
    assert [factor(step, 400, 0, "paper") for step in (0, 299, 300, 399)] == [1, 1, 0.1, 0.1]


def test_options_of_both_scales_are_ones_that_can_be_built_and_trained_with(shapes):
    train = fpn.data.load(shapes)["train"]
    for scale in (
        small("tiny", "none", 64, None, None, 8, {}),
        full("tiny", "none", 64, None, None, 8, {"device": "cpu"}),
    ):
        setup = cells.Setup(shapes, train, train, scale)
        for cell in plan(TABLES[2], 1, ["c"]) + plan(TABLES[6], 1, ["both"]):
            settings = resolve(Options(**cells.training_of(cell, scale), device="cpu"), train, 64)
            spec = cells.fresh(cell, setup).spec
            assert settings.epochs == scale.training[spec.model]["epochs"]
            assert spec.anchor_sizes == (32, 64, 128, 256, 512)


def test_several_devices_need_torchrun():
    with pytest.raises(OptionError, match="torchrun --nproc-per-node 8"):
        placed("cpu", 8, None)


def test_images_are_chosen_once_for_all(shapes):
    split = fpn.data.load(shapes)["train"]
    first = chosen(split, 3)
    assert len(first) == 3 and list(first.files) == list(chosen(split, 3).files)
    assert chosen(split, 8) is split


# Real runs.


def test_a_run_that_is_cut_off_goes_on_and_trains_nothing_twice(shapes, tmp_path, trainings, monkeypatch):
    out, real = tmp_path / "out", cells.measured

    def interrupted(cell, *others):
        if cell.row == "c":
            raise KeyboardInterrupt
        return real(cell, *others)

    monkeypatch.setattr(cells, "measured", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_paper(shapes, 1, out=out, seeds=1, rows=["b", "c"], **QUICK)
    assert trainings == ["rpn-b-seed0", "rpn-c-seed0"]
    assert "So far 1 of 6 cells are done." in (out / "paper.md").read_text()
    assert (out / "cells/rpn-c-seed0/resume.ckpt").is_file()
    monkeypatch.setattr(cells, "measured", real)
    page = run_paper(shapes, 1, out=out, seeds=1, rows=["b", "c"], command="fpn paper again", **QUICK)
    assert trainings[2:] == ["rpn-c-seed0"]
    for name in ("b", "c"):
        files = {file.name for file in (out / f"cells/rpn-{name}-seed0").iterdir()}
        assert {"cell.json", "asked.json", "last.safetensors", "config.yaml"} <= files
        assert not files & {"resume.ckpt", "best.safetensors"}
    cell = json.loads((out / "cells/rpn-c-seed0/cell.json").read_text())
    assert cell["numbers"].keys() == PUBLISHED[1]["c"].keys() and 0 <= cell["numbers"]["AR1000"] <= 1
    assert cell["anchors"] == 3 * (16**2 + 8**2 + 4**2 + 2**2 + 1) and cell["seconds"]["training"] > 0
    assert "fpn paper again" in page.read_text() and "So far 2 of 6" in page.read_text()

    again = run_paper(shapes, 1, out=out, seeds=1, rows=["c"], **QUICK)
    assert len(trainings) == 3 and again == page
    with pytest.raises(OptionError, match="training epochs 1, and now it is 2.*another --out"):
        run_paper(shapes, 1, out=out, seeds=1, rows=["c"], **{**QUICK, "epochs": 2})
    (out / "cells/rpn-c-seed0/cell.json").write_text("{")
    with pytest.raises(DataError, match="cell.json: damaged"):
        run_paper(shapes, 1, out=out, seeds=1, rows=["c"], **QUICK)


def test_features_are_shared_in_four_steps_whose_first_two_serve_all_tables(shapes, tmp_path, trainings):
    out = tmp_path / "out"
    run_paper(shapes, 5, out=out, seeds=1, **QUICK)
    assert trainings == [f"{key}-seed0" for key in keys(TABLES[5], 1)]
    run_paper(shapes, 2, out=out, seeds=1, rows=["c"], **QUICK)
    assert len(trainings) == 4  # both cells of row c were there
    text = (out / "paper.md").read_text()
    assert "## Table 2" in text and "## Table 5" in text and "So far" not in text.split("## Table 5")[1]
    first, last = (fpn.load(out / f"cells/{key}-seed0/last.safetensors") for key in keys(TABLES[5], 1)[1::2])
    before, after = first.state_dict(), last.state_dict()
    features = [name for name in before if name.startswith(("backbone", "pyramid"))]
    assert features and all(bool((before[name] == after[name]).all()) for name in features)
    assert any(bool((before[name] != after[name]).any()) for name in before if name.startswith("box_head"))


def test_a_cell_that_cannot_be_trained_keeps_only_those_that_need_it(shapes, tmp_path, trainings, monkeypatch):
    real = cells.trained

    def trained(cell, setup):
        if cell.key == "rpn-a-seed0":
            raise TrainingError("the loss is nan")
        return real(cell, setup)

    monkeypatch.setattr(cells, "trained", trained)
    with pytest.raises(TrainingError, match="fast_rcnn-a-on-a-seed0, rpn-a-seed0: not trained"):
        run_paper(shapes, 3, out=tmp_path, seeds=1, rows=["a", "b"], **QUICK)
    assert trainings == ["rpn-b-seed0", "fast_rcnn-b-on-b-seed0"]


def test_what_was_asked_for_and_never_begun_may_be_asked_for_otherwise(shapes, tmp_path, trainings):
    (tmp_path / "cells/rpn-c-seed0").mkdir(parents=True)
    (tmp_path / "cells/rpn-c-seed0/asked.json").write_text('{"detector": {"backbone": "other"}}')
    run_paper(shapes, 1, out=tmp_path, seeds=1, rows=["c"], **QUICK)
    assert trainings == ["rpn-c-seed0"]


def test_mask_proposals_are_measured_by_their_outlines(shapes, tmp_path, trainings):
    run_paper(shapes, 6, out=tmp_path, seeds=1, rows=["5x5"], **QUICK)
    cell = json.loads((tmp_path / "cells/mask_proposals-5x5-seed0/cell.json").read_text())
    assert cell["numbers"].keys() >= PUBLISHED[6]["5x5"].keys() and cell["asked"]["detector"]["windows"] == [5]


# What cannot work.


def test_what_cannot_work_is_refused_before_anything_is_trained(shapes, tmp_path, trainings):
    for options, words in (
        ({"table": 4}, "table 4"),
        ({"scale": "medium"}, "scale 'medium': it must be small or full"),
        ({"seeds": 0}, "seeds 0"),
        ({"rows": ["c", "g"]}, "rows g: table 1 has a, b"),
        ({"path": "demo", "backbone": "resnet18"}, "demo has a detector of its own"),
        ({"path": "demo", "scale": "full"}, "scale full: demo"),
        ({"rows": ["c", "e"], "backbone": "vit_b_32", "weights": "none", "device": "cpu"}, "lateral False: the levels"),
    ):
        with pytest.raises(OptionError, match=words):
            run_paper(**{"path": shapes, "table": 1, "out": tmp_path / "out", **options})
    assert not trainings and not (tmp_path / "out" / "cells").exists()


def test_data_without_outlines_or_without_a_val_split(shapes, tmp_path):
    fpn.data.convert(fpn.data.load(shapes), tmp_path / "voc", "voc")
    with pytest.raises(DataError, match="outline"):
        run_paper(tmp_path / "voc", 6, out=tmp_path / "out", **QUICK)
    one = {"train": fpn.data.load(shapes)["train"].select(np.array([0]), "train")}
    fpn.data.convert(replace(fpn.data.load(shapes), splits=one), tmp_path / "one", "coco")
    with pytest.raises(DataError, match="no val split"):
        run_paper(tmp_path / "one", 1, out=tmp_path / "out", **QUICK)


def test_ctrl_c_says_what_to_type(tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "run_paper", interrupted)
    with pytest.raises(SystemExit, match=rf"To go on from here: fpn paper cells --table 3 --seeds 2 --out {tmp_path}"):
        paper("cells", table=3, seeds=2, out=tmp_path)


def test_keys_name_what_is_in_a_folder():
    assert Cell("fast_rcnn", "a", 2, "c").key == "fast_rcnn-a-on-c-seed2"

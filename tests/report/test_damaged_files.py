"""A damaged file costs the page at most its own part, and nothing in a file becomes markup."""

import json
import random
import shutil
from pathlib import Path

import pytest
from PIL import Image

from vim_ssl import load_encoder, save_encoder
from vim_ssl.checkpoints.identity import encoder_hash, hashes_of_run, model_hash
from vim_ssl.report import page as page_module
from vim_ssl.report import write_report
from vim_ssl.report.compare import compare_runs
from vim_ssl.report.record import Record
from vim_ssl.results import Run

EVIL = '<img src=x onerror="alert(1)">'
FILES = {
    "config.json": {
        "recipe": "finetune", "epochs": 2, "batch_size": 4, "accumulation": 1, "base_lr": 0.1,
        "lr_reference_batch": 4, "encoder": "vim_nano_patch8_64", "model_args": {"depth": 1},
        "data": "photos", "patience": 0, "max_steps": 0, "mask_ratio": 0.5,
    },
    "state.json": {
        "state": "finished", "step": 8, "total": 8, "reason": "", "depends_on": {},
        "plan": {"effective_batch": 4, "batch_size": 4, "accumulation": 1, "processes": 1,
                 "peak_lr": 0.1, "epoch_steps": 4, "total_steps": 8, "images": 16, "left_out": 0},
    },
    "metrics.json": {
        "data": "photos", "top1": 50.0, "top1_ci": [40.0, 60.0], "train": 8, "test": 4, "n": 4,
        "split": "test", "summary": ["Better."], "baselines": {"pixels": {"top1": 25.0}},
        "weights": "0" * 16,
    },
    "linear_probe/metrics.json": {
        "data": "photos", "weights": "0" * 16, "skipped": [],
        "rows": [{"features": "x", "logistic": 50.0, "logistic_ci": [40.0, 60.0], "knn": 1.0}],
    },
    "zero_shot/metrics.json": {
        "data": "photos", "classification": {"top1": 50.0, "top1_ci": [1.0, 99.0]},
        "retrieval": {"image_to_text_r1": 50.0}, "examples": {"pairs": [], "cosines": []},
    },
    "encoder.json": {"config": {"img_size": 64, "depth": 1, "embed_dim": 8}, "made_by": {"a": 1}},
}  # fmt: skip
TEXTS = {
    "metrics.jsonl": '{"step": 4, "epoch": 1.0, "loss": 1.0, "samples": 16, "seconds": 1.0}\n'
    '{"step": 8, "epoch": 2.0, "loss": 0.5, "samples": 32, "seconds": 2.0, "val_top1": 50.0}\n',
    "classes.csv": "class,images,recall\ncat,2,0.5\ndog,2,0.5\n",
    "predictions.csv": "id,label,predicted\n0,cat,cat\n1,dog,cat\n",
}
# Written as they are, because JSON has no words for some.
ODD = (
    "null", "true", "-1", '"text"', "[]", "[1, null]", "{}", '{"a": {"b": []}}', "NaN", "-Infinity",
    "1e-320", "1e308", "1" + "0" * 400, '"%s"' % ("long " * 2000), json.dumps(EVIL),
)  # fmt: skip


@pytest.fixture(scope="module")
def intact(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("intact") / "run"
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    for name, text in TEXTS.items():
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def run(intact, tmp_path) -> Path:
    return shutil.copytree(intact, tmp_path / "run")


def page(folder: Path) -> str:
    return write_report(folder).read_text()


def leaves(value, prefix=()):
    yield prefix
    if isinstance(value, dict):
        for key, part in value.items():
            yield from leaves(part, (*prefix, key))


def replaced(value, path, marker):
    if not path:
        return marker
    return value | {path[0]: replaced(value[path[0]], path[1:], marker)}


@pytest.mark.parametrize("name", FILES)
def test_any_value_anywhere_gives_a_page_without_markup_of_its_own(run, intact, name):
    draw = random.Random(name)
    cases = [(path, odd) for path in leaves(FILES[name]) for odd in ODD]
    for path, odd in draw.sample(cases, 8):
        text = json.dumps(replaced(FILES[name], path, "HERE")).replace('"HERE"', odd)
        (run / name).write_text(text)
        for html in (page(run), compare_runs([run, intact])):
            assert html.rstrip().endswith("</html>"), (path, odd[:40])
            assert "<img src=x" not in html


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("classes.csv", "class,recall\ncat,0.5,further,cells\ndog\n"),
        ("classes.csv", "\x00\xff"),
        ("predictions.csv", "id,label,predicted\n0,cat,cat,dog\n1,cat\n"),
        ("predictions.csv", 'id,label,predicted\n"0,cat,cat\n'),
        ("metrics.jsonl", '[1]\n"x"\n{"step": 1e400}\n{"step": 3, "loss": 1e999}\n'),
        ("metrics.jsonl", '{"step": 8, "epoch": 1e-320, "samples": 32, "seconds": 1e-320}\n'),
        ("metrics.jsonl", '{"step": ' + "9" * 400 + ', "loss": ' + "9" * 400 + "}\n"),
        ("config.json", "[" * 100_000),
        ("metrics.json", '{"a":' * 100_000),
    ],
)  # fmt: skip
def test_a_file_of_another_form_costs_only_its_part(run, intact, name, text):
    (run / name).write_bytes(text.encode("latin-1"))
    html = page(run)
    assert html.rstrip().endswith("</html>")
    assert "Linear probe" in html
    compare_runs([run, intact])
    (run / "state.json").unlink()  # as an earlier version left it
    assert page(run).rstrip().endswith("</html>")


def test_a_part_that_cannot_be_drawn_is_named(run, monkeypatch):
    def broken(_):
        raise RuntimeError(f"unforeseen {EVIL}")

    sections = page_module.SECTIONS | {"probes": (broken, [])}
    monkeypatch.setattr(page_module, "SECTIONS", sections | {"curves": (lambda _: [(1, 2)], [])})
    html = page(run)
    assert "the section probes cannot be drawn (unforeseen &lt;img" in html
    assert "the section curves cannot be drawn" in html
    assert "Final result" in html


def test_an_image_that_is_too_large_is_left_out(run, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    (run / "images").mkdir()
    Image.new("L", (20, 20)).save(run / "images" / "preview-4.png")
    assert page(run).rstrip().endswith("</html>")


@pytest.mark.parametrize("name", ["linear_probe (copy)", "linear_probe.bak", "._linear_probe"])
def test_copies_of_results_and_hidden_files_are_not_shown(run, name):
    before = len(Record(run).probes)
    shutil.copytree(run / "linear_probe", run / name)
    (run / "images").mkdir()
    (run / "images" / "._preview-4.png").write_bytes(b"\0\5\26\7")
    record = Record(run)
    assert (len(record.probes), record.previews, Run(run).images) == (before, {}, [])
    shutil.copytree(run / "linear_probe", run / "linear_probe-2")
    assert len(Record(run).probes) == before + 1


def test_names_of_images_are_no_markup_in_a_notebook(run):
    (run / "images").mkdir()
    Image.new("L", (4, 4)).save(run / "images" / '"onerror="alert(1)-0000004.png')
    assert 'alt="&quot;onerror' in Run(run)._repr_html_()


@pytest.mark.parametrize("row", [{"step": 1, "loss": 0.5}, {"step": None, "loss": "x"}, {}])
def test_a_run_of_null_values_has_a_display(run, row):
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(dict.fromkeys(config | {"recipe": 0})))
    (run / "metrics.jsonl").write_text(2 * (json.dumps(row) + "\n"))
    assert str(run) in repr(Run(run))
    assert "<table>" in Run(run)._repr_html_()


# ---------------------------------------------------------------- whose weights


def test_results_of_weights_that_a_run_no_longer_has_are_marked_everywhere(tmp_path):
    args = {"depth": 1, "embed_dim": 8, "d_state": 4, "num_classes": 2}
    run, other = tmp_path / "run", tmp_path / "other"
    save_encoder(load_encoder("vim_nano_patch8_64", **args), run)
    for name, content in FILES.items():
        if name != "encoder.json":
            (run / name).parent.mkdir(exist_ok=True)
            content = content | {"weights": (encoder_hash if "probe" in name else model_hash)(run)}
            (run / name).write_text(json.dumps(content))
    shutil.copytree(run, other)
    assert "Of earlier weights" not in page(run)
    assert "of earlier weights" not in compare_runs([run, other])
    assert "stale" not in Run(run).metrics
    save_encoder(load_encoder("vim_nano_patch8_64", **args), run)  # trained further
    html = page(run)
    assert html.count("Of earlier weights, which the run no longer has") >= 5
    assert compare_runs([other, run]).count("of earlier weights") >= 2
    assert Run(run).metrics["stale"] is True


def test_a_new_head_makes_the_result_of_the_model_stale_but_no_probe(tmp_path):
    encoder = load_encoder("vim_nano_patch8_64", depth=1, embed_dim=8, d_state=4, num_classes=2)
    save_encoder(encoder, tmp_path)
    before = encoder_hash(tmp_path), model_hash(tmp_path)
    encoder.head.weight.data.add_(1)
    save_encoder(encoder, tmp_path)
    after = encoder_hash(tmp_path), model_hash(tmp_path)
    assert before[0] == after[0] == encoder_hash(tmp_path / "encoder.safetensors")
    assert before[1] != after[1]
    assert encoder_hash("vim_nano_patch8_64") == encoder_hash(tmp_path / "nothing") == ""


def test_the_average_of_the_weights_is_of_the_run_too(tmp_path):
    args = {"depth": 1, "embed_dim": 8, "d_state": 4}
    live, average = (load_encoder("vim_nano_patch8_64", **args) for _ in range(2))
    save_encoder(live, tmp_path, ema=average)
    both = {encoder_hash(tmp_path, ema) for ema in (True, False)}
    assert len(both) == 2
    assert hashes_of_run(tmp_path, whole=False) == both
    assert encoder_hash(tmp_path) in both

"""The page of a run: whole, self-contained, and drawn from whatever the run has written."""

import base64
import csv
import html
import io
import itertools
import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from earlier_runs import EARLIER
from PIL import Image

import vim_ssl
from vim_ssl import load_encoder, save_encoder
from vim_ssl.cli import main as cli_main
from vim_ssl.evaluation.examples import write_examples
from vim_ssl.report import curve, write_report
from vim_ssl.report.images import spread
from vim_ssl.training.run import Run

VOID = {"meta", "link", "img", "br"}
EVIL = "<script>alert('ü')</script>&\"'"
CONFIG = {
    "recipe": "mim_pretrain", "data": "sample:mnist5k?split=train", "objective": "mae",
    "encoder": "vim_nano_patch4_28", "model_args": {}, "mask_ratio": 0.75, "norm_pix_loss": True,
    "epochs": 4, "batch_size": 64, "accumulation": 2, "base_lr": 1e-3, "lr_reference_batch": 64,
    "optimizer": "adamw", "max_steps": 0,
}  # fmt: skip


class Page(HTMLParser):
    """What a browser would find; fails on tags that are not closed in order."""

    def __init__(self, path: Path):
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.found: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(self.source)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data):
        if self.open[-1:] not in (["style"], ["script"]):
            self.text += data

    def all(self, tag: str) -> list[dict]:
        return [attrs for name, attrs in self.found if name == tag]

    def curve(self, title: str) -> dict:
        (svg,) = [a for a in self.all("svg") if a["aria-label"] == f"{title} over steps"]
        return svg

    def readout(self, title: str) -> list[str]:
        return [text for _, _, text in json.loads(self.curve(title)["data-points"])]


def line(step: int, **figures) -> dict:
    row = {"step": step, "epoch": step / 10, "loss": 1 / step, "lr": 1e-3, "grad_norm": 0.5}
    row |= {"images_per_second": 100.0, "seconds": 2.0 * step, "samples": 128 * step}
    return row | {"bad_steps": 0, "skipped": 0} | figures


def make_run(folder: Path, rows: list[dict], **config) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def add_images(folder: Path, step: int, side: int = 28, chans: int = 1, n: int = 3) -> None:
    """n rows of four images, grey: the tens are the row's number, the ones the column's, from 1;
    the last column, which changes, adds the step."""
    (folder / "images").mkdir(exist_ok=True)
    columns = torch.tensor([1, 2, 3, 4 + step]).repeat_interleave(side)
    grey = (10 * torch.arange(1, n + 1).view(n, 1, 1, 1) + columns) / 255
    Run(folder).save_images("pictures", step, grey.expand(n, chans, side, 4 * side))


def decode(attrs: dict) -> Image.Image:
    head, _, data = attrs["src"].partition(",")
    assert head in ("data:image/png;base64", "data:image/jpeg;base64")
    return Image.open(io.BytesIO(base64.b64decode(data)))


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    rows = [line(s, knn_top1=50.0 + 10 * (s // 20), feature_std=0.1) for s in range(10, 41, 5)]
    folder = make_run(tmp_path / "run", rows)
    for step in (20, 30, 40):
        add_images(folder, step)
    encoder = load_encoder("vim_nano_patch4_28", depth=2)
    save_encoder(encoder, folder, record={"recipe": "mim_pretrain", "hardware": {"device": "cpu"}})
    probe = {
        "data": "sample:mnist5k", "train": 4000, "test": 1000, "rows": [
            {"features": "pretrained encoder", "readout": "avg", "logistic": 91.2,
             "logistic_ci": [89.1, 92.8], "knn": 90.1, "knn_ci": [88.0, 91.9]},
            {"features": "raw pixels", "logistic": 88.8},
        ],
    }  # fmt: skip
    (folder / "linear_probe").mkdir()
    (folder / "linear_probe" / "metrics.json").write_text(json.dumps(probe))
    return folder


def test_a_finished_run_tells_what_was_trained_and_what_came_of_it(finished: Path):
    path = write_report(finished)
    assert path == finished / "report.html"
    page = Page(path)
    parameters = sum(p.numel() for p in load_encoder(finished).parameters())
    for words in (
        "masked image modelling (mae)", "sample:mnist5k?split=train", "Finished", f"{parameters:,}",
        "28 × 28 px, 1 channel", "4 × 4 px", "7 × 7 = 49 per image", "75 % of the patches",
        "128 = 64 × 2 (accumulation) × 1 (processes)", "0.002", "40 of 40", "1 min 20 s",
        "64 images/s", "device cpu", "adamw", "pretrained encoder", "91.2 %", "89.1 – 92.8",
        "raw pixels", "4,000 for training",
    ):  # fmt: skip
        assert words in page.text, words


def test_a_run_stopped_before_its_end_is_not_called_finished(finished: Path):
    """Its encoder is there all the same: every checkpoint comes with one."""
    config = json.loads((finished / "config.json").read_text())
    (finished / "config.json").write_text(json.dumps(config | {"epochs": 2 * config["epochs"]}))
    page = Page(write_report(finished))
    assert "Finished" not in page.text
    assert "40 of 80" in page.text


def test_a_batch_that_few_images_did_not_fill_is_told_as_it_was(finished: Path):
    config = json.loads((finished / "config.json").read_text())
    (finished / "config.json").write_text(json.dumps(config | {"batch_size": 100}))
    page = Page(write_report(finished))
    assert "Effective batch128" in page.text
    assert "× 2 (accumulation)" not in page.text


def test_the_page_asks_nothing_of_the_network(finished: Path):
    page = Page(write_report(finished))
    assert "://" not in page.source
    assert "default-src 'none'" in page.source
    links = [a[k] for _, a in page.found for k in ("src", "href") if k in a]
    assert links
    assert all(link.startswith("data:") for link in links)


def test_the_printed_snippet_runs_as_it_stands(finished: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(finished.parent)
    Image.new("RGB", (40, 30), "red").save("image.png")
    page = Page(write_report("run"))
    snippet = page.text[page.text.index("import torch, vim_ssl") : page.text.index("vim-ssl lin")]
    assert 'load_encoder("run")' in snippet
    scope: dict = {}
    exec(snippet, scope)
    assert scope["features"].shape == (1, 192)
    assert scope["tokens"].shape[::2] == (1, 192)
    assert "vim-ssl linear-probe --encoder run " in page.text


@pytest.mark.parametrize("kind", ["finetune", "segmentation", "detection", "clip"])
def test_the_page_shows_how_to_predict(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    shutil.copytree(EARLIER / "runs" / kind, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (40, 30), "red").save("image.png")
    page = Page(write_report("run"))
    start = page.text.index("import vim_ssl")
    model, predict = page.text[start : page.text.index("vim-ssl predict")].strip().splitlines()[-2:]
    scope: dict = {"vim_ssl": vim_ssl}
    exec(f"{model}\nresult = {predict}", scope)
    assert scope["result"] is not None
    assert "vim-ssl predict --encoder run " in page.text


def test_the_same_images_are_shown_over_the_steps(finished: Path):
    page = Page(write_report(finished))
    (strip,) = [a for a in page.all("div") if "strip" in a.get("class", "")]
    assert strip["aria-label"] == "original, what the encoder sees, step 20, step 30, step 40"
    cells = [decode(a) for a in page.all("img")]
    assert {cell.size for cell in cells} == {(28, 28)}
    greys = [cell.convert("L").getextrema() for cell in cells]  # one value each: no border left
    assert greys == [
        (grey, grey)
        for row in (10, 20, 30)
        for grey in (row + 1, row + 2, *(row + 4 + step for step in (20, 30, 40)))
    ]
    assert "only hidden patches" in page.text


@pytest.mark.parametrize("count", [1, 6, 7, 50, 2000])
def test_of_many_steps_some_are_shown_from_the_first_to_the_last(count: int):
    chosen = spread(list(range(count)), 6)
    assert chosen[0] == 0
    assert chosen[-1] == count - 1
    assert len(chosen) == min(count, 6)
    gaps = [b - a for a, b in itertools.pairwise(chosen)]
    assert gaps == sorted(gaps)  # denser at the start


def test_predictions_of_dense_tasks_stand_beside_the_truth_over_the_steps(tmp_path: Path):
    folder = make_run(tmp_path, [line(1)], recipe="segmentation")
    (folder / "images").mkdir()
    for step in (1, 2):
        Run(folder).save_images("preview", step, torch.full((2, 3, 32, 96), step / 255))
    page = Page(write_report(folder))
    assert "image, truth, step 1, step 2" in page.source
    assert [decode(a).getpixel((0, 0))[0] for a in page.all("img")] == 2 * [2, 2, 1, 2]


@pytest.mark.parametrize("frames", [1, 3, 8])
@pytest.mark.parametrize("samples", [1, 2, 8])
def test_clips_and_single_samples_are_cut_too(tmp_path: Path, frames: int, samples: int):
    folder = make_run(tmp_path, [line(1)], model_args={"img_size": 16})
    (folder / "images").mkdir()
    Run(folder).save_images("preview", 1, torch.zeros(samples, 3, 16 * frames, 4 * 16))
    cells = [decode(a) for a in Page(write_report(folder)).all("img")]
    assert {cell.size for cell in cells} == {(16, 16 * frames)}
    assert len(cells) == 3 * min(samples, 1 if frames == 8 else 3 if frames == 3 else 8)


def test_a_page_with_large_photographs_stays_small(tmp_path: Path):
    folder = make_run(tmp_path, [line(1)], model_args={"img_size": 224})
    (folder / "images").mkdir()
    noise = np.random.default_rng(0).integers(256, size=(8 * 15, 4 * 15, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((4 * 224 + 2, 8 * 225 + 1), Image.Resampling.BILINEAR)
    for step in range(1, 8):
        image.save(folder / "images" / f"preview-{step}.png", compress_level=1)
    page = write_report(folder)
    assert len(Page(page).all("img")) == 8 * (2 + 6)
    assert page.stat().st_size < 1_000_000


@pytest.mark.parametrize(
    ("side", "pixelated"), [(28, True), (224, False)], ids=["digits-28", "photos-224"]
)
def test_only_small_images_are_enlarged_as_pixels(tmp_path: Path, side: int, pixelated: bool):
    folder = make_run(tmp_path, [line(1)], model_args={"img_size": side})
    add_images(folder, 1, side=side, chans=3, n=2)
    page = Page(write_report(folder))
    strips = [a for a in page.all("div") if a.get("class", "").startswith("strip")]
    assert [a["class"] == "strip pixels" for a in strips] == [pixelated]
    assert "image-rendering: pixelated" in page.source


@pytest.mark.parametrize("recipe", ["mim_pretrain", "clip_pretrain"])
def test_images_of_another_form_are_shown_whole(tmp_path: Path, recipe: str):
    folder = make_run(tmp_path, [line(1)], recipe=recipe)
    (folder / "images").mkdir()
    Image.new("RGB", (37, 21), "red").save(folder / "images" / "pairs-0000001.png")
    page = Page(write_report(folder))
    assert [decode(a).size for a in page.all("img")] == [(37, 21)]


def test_previews_of_a_run_that_an_earlier_version_began_are_one_series(tmp_path: Path):
    folder = make_run(tmp_path, [line(1), line(2)])
    add_images(folder, 1)  # as pictures-0000001.png
    Run(folder).save_images("preview", 2, torch.zeros(3, 1, 28, 112))
    assert "original, what the encoder sees, step 1, step 2" in write_report(folder).read_text()


def test_an_image_that_is_still_being_written_is_left_out(finished: Path):
    newest = finished / "images" / "pictures-0000040.png"
    newest.write_bytes(newest.read_bytes()[:60])
    page = Page(write_report(finished))
    assert len(page.all("img")) == 3 * (2 + 2)


def test_what_is_evaluated_now_and_then_has_a_point_for_each_evaluation(tmp_path: Path):
    knn = {2: 50.0, 4: 60.0, 6: 60.0}
    rows, seen = [], {}
    for step in range(1, 8):
        if step in knn:
            seen = {"knn_top1": knn[step], "feature_std": step / 10}
        rows.append(line(step, **seen))
    page = Page(write_report(make_run(tmp_path, rows)))
    steps = [text.partition(" · ")[0] for text in page.readout("kNN accuracy, in-training check")]
    assert steps == ["step 2", "step 4", "step 6"]
    assert len(page.readout("Loss")) == 7


def test_an_error_that_is_the_loss_is_not_drawn_again(tmp_path: Path):
    title = "Mean squared error of the masked pixels"
    for factor, drawn in ((1, 0), (2, 1)):
        rows = [line(s, pixel_mse=factor / s) for s in (1, 2)]
        page = Page(write_report(make_run(tmp_path, rows)))
        assert page.text.count(title) == drawn


def test_an_accuracy_has_the_interval_of_its_images_and_says_how_many(tmp_path: Path):
    rows = [line(s, knn_top1=50.0 + s, check_images=n) for s, n in ((1, 500), (2, 500))]
    page = Page(write_report(make_run(tmp_path, rows)))
    assert "500 held-out images" in page.text
    assert "shaded: 95 % interval" in page.text
    assert len(page.all("polygon")) == 1
    assert "check_images" not in page.text.partition("Full configuration")[0]


def test_the_interval_of_a_check_is_that_of_its_groups(tmp_path: Path, monkeypatch):
    sizes = set()
    monkeypatch.setattr(curve, "wilson_interval", lambda value, n: sizes.add(n) or (value, value))
    rows = [line(s, knn_top1=50.0 + s, check_images=500, check_groups=8) for s in (1, 2)]
    page = Page(write_report(make_run(tmp_path, rows)))
    assert sizes == {8}
    assert "check_groups" not in page.text.partition("Full configuration")[0]


def test_a_check_with_gaps_between_its_lines_is_not_called_broken(tmp_path: Path):
    rows = [line(s, **({"val_top1": 10.0 * s} if s in (2, 4) else {})) for s in range(1, 5)]
    page = Page(write_report(make_run(tmp_path, rows, recipe="finetune")))
    title = "Top-1 accuracy, test split, during training"
    assert page.readout(title) == ["step 2 · epoch 0.2 · 20 %", "step 4 · epoch 0.4 · 40 %"]
    assert "not finite" not in page.text


def test_a_tile_tells_where_a_figure_began_only_if_it_has_moved(tmp_path: Path):
    knn = {"knn_top1": 50.0, "feature_std": 0.1}
    tiles = Page(write_report(make_run(tmp_path, [line(1), line(2, **knn)]))).text
    assert "from 1 at step 1" in tiles
    assert "50 %at step 2" in tiles


def test_figures_of_other_recipes_get_a_curve_under_their_own_name(tmp_path: Path):
    rows = [line(s, image_to_text=s / 10) for s in (1, 2)]
    page = Page(write_report(make_run(tmp_path, rows, recipe="clip_pretrain")))
    assert page.readout("image_to_text")[-1] == "step 2 · epoch 0.2 · 0.2"


def test_non_finite_values_leave_gaps_and_are_counted(tmp_path: Path):
    losses = [1.0, 0.9, math.nan, math.inf, 0.7, 0.6]
    rows = [line(i + 1, loss=x, bad_steps=min(i, 2), skipped=7) for i, x in enumerate(losses)]
    page = Page(write_report(make_run(tmp_path, rows)))
    assert [text.split()[1] for text in page.readout("Loss")] == ["1", "2", "5", "6"]
    assert "2 of 6 logged values are not finite" in page.text
    svg = page.source[page.source.index("Loss over steps") :].partition("</svg>")[0]
    assert svg.count("<polyline") == 2
    assert "nan" not in svg
    assert "inf" not in svg
    assert re.search(r"Non-finite steps\s*2\s*Images skipped\s*7", page.text)


ROWS = {
    "no-line": [],
    "one-line": [line(1)],
    "all-nan": [line(s, loss=math.nan, grad_norm=math.inf) for s in (1, 2, 3)],
    "constant": [line(s, loss=0.0, lr=0.0) for s in (1, 2, 3)],
    "enormous": [line(1, loss=1e300), line(2, loss=-1e-300), line(3, loss=1e12)],
    "null-and-text": [line(1, loss=None, lr="high"), line(2)],
    "six-decades": [line(s, loss=10.0**-s) for s in range(1, 7)],
}


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
def test_any_log_gives_a_page_with_finite_coordinates(tmp_path: Path, rows: list[dict]):
    page = Page(write_report(make_run(tmp_path, rows)))
    assert "Still running" in page.text
    for tag, names in (("polyline", ["points"]), ("polygon", ["points"]), ("circle", ["cx", "cy"])):
        for attrs in page.all(tag):
            for number in re.split("[ ,]", " ".join(attrs.get(n, "0") for n in names)):
                assert -1 <= float(number) <= 421
    for svg in page.all("svg"):
        assert json.loads(svg["data-points"])


def test_lines_cut_off_by_a_kill_are_left_out(tmp_path: Path):
    folder = make_run(tmp_path, [line(1), line(2)])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    assert len(Page(write_report(folder)).readout("Loss")) == 2


def test_a_long_log_becomes_a_small_page_that_ends_where_the_log_ends(tmp_path: Path):
    folder, count = make_run(tmp_path, []), 200_003
    row = '{{"step": {0}, "epoch": {0}e-3, "loss": {1}, "lr": 0.1, "seconds": {0}}}\n'.format
    with (folder / "metrics.jsonl").open("w") as file:
        file.writelines(row(i, 1 + i % 7) for i in range(1, count + 1))
    path = write_report(folder)
    page = Page(path)
    points = page.readout("Loss")
    assert 100 <= len(points) <= 300
    assert points[-1].startswith(f"step {count:,} ")
    assert path.stat().st_size < 200_000
    assert page.all("polygon"), "the range behind the mean"


def test_names_are_text_and_never_markup(tmp_path: Path):
    folder = make_run(tmp_path / "a&b<b>ü", [line(1, **{EVIL: 1.0})], data=EVIL, objective=EVIL)
    (folder / "linear_probe").mkdir()
    probe = {"data": EVIL, "rows": [{"features": EVIL, "readout": EVIL, "logistic": EVIL}]}
    (folder / "linear_probe" / "metrics.json").write_text(json.dumps(probe))
    (folder / "encoder.json").write_text(json.dumps({"made_by": {EVIL: EVIL}, "config": {}}))
    page = Page(write_report(folder))
    assert len(page.all("script")) == 1
    assert not page.all("b<b>ü")
    assert page.text.count(EVIL) >= 6
    assert "a&b<b>ü" in page.text


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl"])
def test_either_file_alone_is_a_run(finished: Path, name: str):
    (finished / name).unlink()
    assert Page(write_report(finished)).all("figure")


@pytest.mark.parametrize("content", ["", "[]", '{"rows": 3}', '{"rows": [1, {}]}'], ids=str)
def test_a_probe_of_another_form_does_not_cost_the_page(finished: Path, content: str):
    (finished / "linear_probe" / "metrics.json").write_text(content)
    assert len(Page(write_report(finished)).all("svg")) >= 5


ZERO_SHOT = {
    "data": EVIL,
    "retrieval": {"image_to_text_r1": 12.5, "image_to_text_r1_ci": [3.0, 30.0], "chance_r1": 0.054},
    "examples": {
        "pairs": [
            {
                "picture": "examples/0.png",
                "own": EVIL,
                "nearest": ["a dog", EVIL],
                "right": [False, True],
            },
            {
                "picture": "examples/0.png",
                "own": "a cat",
                "nearest": ["its other one", "a cat"],
                "right": [True, False],
            },  # the same words, but another image's
        ],
        "cosines": [[0.5, 0.1], [0.2, 0.4]],
    },
}


def test_images_stand_beside_the_captions_nearest_to_them(finished: Path):
    folder = finished / "zero_shot"
    (folder / "examples").mkdir(parents=True)
    Image.new("RGB", (20, 10)).save(folder / "examples" / "0.png")
    (folder / "metrics.json").write_text(json.dumps(ZERO_SHOT))
    page = Page(write_report(finished))
    assert "Zero-shot classification and retrieval" in page.text
    assert "12.5 % 3.0 – 30.0" in page.text
    assert f"a dog · {EVIL}" in page.text
    assert "0.50" in page.text
    # In bold: the row's own pair, and the own caption where it is among the nearest.
    bold = re.findall(r"<b>([^<]*)</b>", page.source.partition('"even cosines"')[2])
    assert [html.unescape(text) for text in bold[:4]] == ["0.50", EVIL, "0.40", "its other one"]
    assert "chance at R@1: 0.05 %" in page.text
    (folder / "examples" / "0.png").unlink()
    assert "a dog" not in Page(write_report(finished)).text


def test_whatever_was_searched_has_its_own_figures(finished: Path):
    for name, data in (("zero_shot", "sample:a"), ("zero_shot-sample-b", "sample:b")):
        (finished / name).mkdir()
        found = ZERO_SHOT | {"data": data, "examples": {}}
        (finished / name / "metrics.json").write_text(json.dumps(found))
    page = Page(write_report(finished))
    assert page.text.index("sample:a") < page.text.index("sample:b")
    assert page.text.count("12.5 % 3.0 – 30.0") == 2


@pytest.mark.parametrize(
    "content", ['{"retrieval": 3}', '{"retrieval": {}, "examples": [1]}', "[]", "{"]
)
def test_zero_shot_figures_of_another_form_do_not_cost_the_page(finished: Path, content: str):
    (finished / "zero_shot").mkdir()
    (finished / "zero_shot" / "metrics.json").write_text(content)
    Page(write_report(finished))


RESULT = {"data": "masks:tiles", "train": 90, "test": 1200, "skipped": ["a.png"],
          "miou": 61.234, "miou_ci": [58.0, 64.5], "aacc": 88.0, "volume_hd95": 3.21,
          "auc": 0.98765, "top1": None}  # fmt: skip


def add_result(folder: Path, classes: int = 2) -> None:
    (folder / "metrics.json").write_text(json.dumps(RESULT))
    lines = [f"{EVIL if not i else f'class {i}'},{0.25 * i:.4f}" for i in range(classes)]
    (folder / "classes.csv").write_text("\n".join(["class,most_taken_for", *lines]))
    Image.new("RGB", (40, 30), "pink").save(folder / "predictions.png")


def test_a_run_on_labels_tells_what_it_is_worth(finished: Path):
    add_result(finished)
    page = Page(write_report(finished))
    assert "AUC as MedMNIST defines it, 0 to 10.988" in page.text  # and not 1.0
    for wanted in (
        "Final result", "Mean IoU61.2 % 58.0 – 64.5",
        "95 % interval 58.0 – 64.5 · test split",
        "Pixel accuracy88.0 %", "3.2 mm", "90 to train on, 1,200 to test on, 1 unreadable",
        "most often confused with", EVIL,
    ):  # fmt: skip
        assert wanted in page.text
    assert "Top-1" not in page.text  # there is none
    (grid,) = (image for image in page.all("img") if image.get("class") == "grid")
    assert decode(grid).size == (40, 30)


@pytest.mark.parametrize(
    ("more", "shown"),
    [
        ({"miou_ci": None, "miou_ci_none": "fewer than 5 groups"}, "none (fewer than 5 groups)"),
        ({"miou_ci": None}, "none"),
        ({"miou_ci": [61.23, 61.23]}, "none (the resamples have the same value)"),
        ({"auc_ci": [0.9812, 0.9931]}, "0.981 – 0.993"),
    ],
    ids=["reason", "earlier", "point", "fraction"],
)
def test_an_interval_is_shown_or_why_there_is_none(finished: Path, more, shown):
    (finished / "metrics.json").write_text(json.dumps(RESULT | more))
    title = "0.988" if "auc_ci" in more else "61.2 %"
    assert f"{title} {shown}" in Page(write_report(finished)).text


def test_of_many_classes_the_page_shows_the_first(finished: Path):
    add_result(finished, classes=60)
    text = Page(write_report(finished)).text
    assert "class 39" in text
    assert "class 40" not in text
    assert "20 more in classes.csv" in text


@pytest.mark.parametrize("broken", ["metrics.json", "classes.csv", "predictions.png"])
def test_a_result_that_is_being_written_does_not_cost_the_page(finished: Path, broken: str):
    add_result(finished)
    path = finished / broken
    path.write_bytes(path.read_bytes()[:20] + b"\xff,,,\n")
    text = Page(write_report(finished)).text
    assert ("Mean IoU" in text) == (broken != "metrics.json")


CLASSES = ("cat", "dog", EVIL)
# label, predicted, and how often
ANSWERS = (("cat", "cat", 3), ("cat", "dog", 2), ("dog", "dog", 4), (EVIL, EVIL, 1))


def add_predictions(folder: Path, answers=ANSWERS, classes=CLASSES, **metrics) -> None:
    folder.mkdir(exist_ok=True)
    figures = {"data": "folder:pets", "train": 40, "test": 10, "split": "test", "n": 10}
    figures |= {"top1": 80.0, "top1_ci": [49.0, 94.3]} | metrics
    (folder / "metrics.json").write_text(json.dumps(figures))
    rows = [(a, b) for a, b, count in answers for _ in range(count)]
    with (folder / "predictions.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["id", "label", "predicted", "confidence"])
        table.writerows([f"{i}.png", *row, 0.9] for i, row in enumerate(rows))
    with (folder / "classes.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["class", "recall"], *([name, 0.6] for name in classes)])


def test_a_classifier_has_baselines_a_confusion_matrix_and_recall_per_class(finished: Path):
    add_predictions(
        finished, baselines={"kNN on raw pixels": {"top1": 70.0, "top1_ci": [39.7, 89.2]}},
        summary=["Top-1 accuracy 80.0 %: 10.0 points above kNN on raw pixels."],
    )  # fmt: skip
    page = Page(write_report(finished))
    for wanted in (
        "10.0 points above", "For comparison: kNN on raw pixels70.0 % 39.7 – 89.2",
        "2 of 10 test images are classified wrongly by the model", "test split, n = 10 images",
        "60.0\N{NO-BREAK SPACE}%",
    ):  # fmt: skip
        assert wanted in page.text, wanted
    matrix = page.source[page.source.index('"even matrix"') :].partition("</table>")[0]
    cells = re.findall(r"<td(?: style=\"--share:(\d+)%\" class=\"(\w+)\")?>(\d*)</td>", matrix)
    assert cells == [
        ("60", "hit", "3"), ("40", "wrong", "2"), ("", "", ""),
        ("", "", ""), ("100", "hit", "4"), ("", "", ""),
        ("", "", ""), ("", "", ""), ("100", "hit", "1"),
    ]  # fmt: skip


def test_of_many_classes_the_most_frequent_confusions_are_listed(finished: Path):
    names = [f"class {i:03d}" for i in range(300)]
    answers = [(name, name, 2) for name in names]
    add_predictions(finished, [*answers, (names[7], names[9], 3), (names[1], names[2], 1)], names)
    page = Page(write_report(finished))
    assert "class 007class 009360 %" in page.text.replace("\n", "")
    assert "matrix" not in {attrs.get("class", "") for attrs in page.all("table")}
    assert (finished / "report.html").stat().st_size < 300_000


@pytest.mark.parametrize(
    "answers", [[("a|b", "a", 1)], [("", "", 2)], []], ids=["multi-label", "empty", "no-rows"]
)
def test_without_single_labels_there_is_no_confusion_matrix(finished: Path, answers: list):
    add_predictions(finished, answers)
    assert "Confusion matrix" not in Page(write_report(finished)).text


def test_the_worst_mistakes_neighbours_and_patch_features_are_images_on_the_page(finished: Path):
    probe = finished / "linear_probe"
    grey = [Image.new("L", (8, 8), value) for value in (10, 20, 30, 40)]
    write_examples(
        probe,
        mistakes=[{"id": "7.png", "image": grey[0], "label": "cat", "predicted": EVIL,
                   "predicted_probability": 0.913, "label_probability": 0.05}],
        neighbours=[{"id": "8.png", "image": grey[1], "label": "cat", "neighbours": [
            {"id": "9.png", "image": grey[2], "label": "dog", "similarity": 0.87}]}],
        maps={"share": 0.42, "rows": [{"id": "8.png", "image": grey[1], "map": grey[3]}]},
    )  # fmt: skip
    page = Page(write_report(finished))
    shown = [decode(a).convert("L").getpixel((0, 0)) for a in page.all("img")]
    assert shown[:5] == [20, 30, 20, 40, 10]
    assert f"cat taken for {EVIL} 91 %" in page.text
    assert "dog 0.87" in page.text
    assert "42 % of the variance" in page.text
    (probe / "examples" / "000.png").write_bytes(b"cut off")
    assert "91 %" not in Page(write_report(finished)).text


ODD = (None, True, -1, "x", [1, "a", None], {"a": {"b": []}})
FILES = (
    "config.json", "encoder.json", "metrics.json", "linear_probe/metrics.json",
    "zero_shot/metrics.json", "linear_probe/examples/examples.json",
)  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_any_value_in_any_file_gives_a_page(tmp_path: Path, name: str):
    folder = make_run(tmp_path, [line(10), line(20)], max_steps=5, patience=3)
    add_images(folder, 20, n=1)
    add_predictions(folder, summary=["One."], baselines={"pixels": {"top1": 1.0}})
    add_predictions(folder / "linear_probe", figure="mAP", rows=[{"features": "x", "knn": 1.0}])
    write_examples(folder / "linear_probe", mistakes=[], neighbours=[], maps={"rows": []})
    (folder / "zero_shot").mkdir()
    (folder / "zero_shot" / "metrics.json").write_text(json.dumps(ZERO_SHOT))
    made = {"made_by": {"hardware": {}}, "config": {"img_size": 28}, "vim_ssl": "0.1"}
    (folder / "encoder.json").write_text(json.dumps(made))
    content = json.loads((folder / name).read_text())
    changes = [dict.fromkeys(content, value) for value in ODD]
    for key, value in content.items():
        changes += [{key: odd} for odd in ODD[-3:-1]]
        if isinstance(value, dict):
            changes += [{key: dict.fromkeys(value, odd)} for odd in ODD]
    for change in changes:
        (folder / name).write_text(json.dumps(content | change))
        assert write_report(folder).exists()


def test_what_is_missing_is_named(tmp_path: Path):
    folder = make_run(tmp_path, [])
    (folder / "metrics.json").write_text('{"top1": 5')
    text = Page(write_report(folder)).text
    for wanted in (
        "metrics.jsonl is empty or damaged", "the encoder has not been saved",
        "metrics.json is empty or damaged",
    ):  # fmt: skip
        assert wanted in text


def test_a_finished_run_lacks_nothing(finished: Path):
    assert "Not there yet" not in Page(write_report(finished)).text


@pytest.mark.parametrize("exists", [True, False], ids=["empty-folder", "no-folder"])
def test_a_folder_without_a_run_is_refused(tmp_path: Path, exists: bool):
    folder = tmp_path if exists else tmp_path / "none"
    with pytest.raises(FileNotFoundError, match=r"is not a run directory .*config\.json"):
        write_report(folder)
    assert not (folder / "report.html").exists()


def test_drawing_again_replaces_the_page_whole(finished: Path, monkeypatch: pytest.MonkeyPatch):
    page = finished / "report.html"
    page.write_text("the page before")

    def full_disk(*args):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", full_disk)
        with pytest.raises(OSError, match="no space"):
            write_report(finished)
    assert page.read_text() == "the page before"
    assert not list(finished.glob(".*"))
    assert Page(write_report(finished)).all("figure")


def test_the_command_draws_the_page_and_says_where(finished: Path, capsys):
    assert cli_main(["report", str(finished)]) == 0
    assert str(finished / "report.html") in capsys.readouterr().out
    assert cli_main(["report", str(finished / "nowhere")]) == 2
    assert "is not a run directory" in capsys.readouterr().err

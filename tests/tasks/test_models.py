"""The fitted model of every kind of run predicts images, arrays, paths and lists of them."""

import json
import shutil

import numpy as np
import pytest
import torch
from earlier_runs import EARLIER, pixels
from PIL import Image

import vim_ssl
from vim_ssl import VimEncoder, create_transform, load_encoder, save_encoder
from vim_ssl.data import BadImage
from vim_ssl.data.clips import LoadedVideo, Sampling
from vim_ssl.evaluation.embeddings import Embedded, write_shard
from vim_ssl.models.predictor import ClassPrediction
from vim_ssl.models.video import VideoEncoder
from vim_ssl.objectives.zero_shot import TEMPLATES, imagenet_names, text_classifier
from vim_ssl.tasks.models import newest_model
from vim_ssl.tasks.slides import SlideClassifier, load_slide

RUNS = EARLIER / "runs"
TINY = {"img_size": 16, "patch_size": 8, "embed_dim": 8, "depth": 1, "d_state": 4}
ARRAYS = [pixels(seed, seed % 2, 32) for seed in range(3)]


def values(result) -> np.ndarray:
    """The numbers of a result of any task."""
    if isinstance(result, ClassPrediction):
        return result.probabilities
    return result if isinstance(result, np.ndarray) else result["boxes"]


@pytest.mark.parametrize(
    ("name", "typed", "classes"),
    [
        ("finetune", "load_classifier", ["plain", "steep"]),
        ("segmentation", "load_segmentation", ["ground", "left", "right"]),
        ("detection", "load_detection", ["left", "right"]),
    ],
)
def test_images_arrays_paths_and_lists_give_the_same(name, typed, classes, tmp_path):
    model = vim_ssl.load_model(RUNS / name)
    assert type(model) is type(getattr(vim_ssl, typed)(RUNS / name))
    task = "classification" if name == "finetune" else name
    assert (model.task, model.classes, model.training) == (task, classes, False)
    assert model.encoder.embed_dim == 8
    assert model.transform(Image.fromarray(ARRAYS[0])).shape[0] == 3
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for path, array in zip(paths, ARRAYS, strict=True):
        Image.fromarray(array).save(path)
    expected = [values(model.predict(Image.fromarray(array))) for array in ARRAYS]
    for inputs in (ARRAYS, paths, tuple(map(str, paths))):
        results = model.predict(inputs)
        assert len(results) == 3
        for result, one in zip(results, expected, strict=True):
            np.testing.assert_allclose(values(result), one, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(values(model.predict(paths[1])), expected[1], rtol=1e-5, atol=1e-6)
    assert model.predict([]) == []


def test_a_classifier_predicts_what_its_encoder_does(tmp_path):
    encoder = load_encoder(RUNS / "finetune", num_classes=None)
    x = create_transform(encoder)(Image.fromarray(ARRAYS[1]))[None]
    with torch.no_grad():
        expected = encoder(x)[0].softmax(0).numpy()
    result = vim_ssl.load_classifier(RUNS / "finetune").predict(ARRAYS[1])
    np.testing.assert_allclose(result.probabilities, expected, rtol=1e-6)
    assert (result.index, result.name) == (expected.argmax(), ["plain", "steep"][expected.argmax()])
    assert result.top(1) == [(result.name, result.probability)]
    assert f"ClassPrediction('{result.name}', probability=0.5" in repr(result)


@pytest.mark.parametrize("stored", ["record", "config.json"])
@pytest.mark.parametrize("targets", ["multi-label", "ordinal"])
def test_the_targets_of_a_run_determine_its_predictions(targets, stored, tmp_path):
    names = ["a", "b", "c"]
    encoder = VimEncoder(**TINY, num_classes=3 if targets == "multi-label" else 2)
    with torch.no_grad():  # logits 2, -1, 3, whatever the image
        encoder.head.weight.zero_()
        encoder.head.bias.copy_(torch.tensor([2.0, -1.0, 3.0])[: encoder.num_classes])
    record = {"data": "folder:x", "classes": names}
    record |= {"targets": targets} if stored == "record" else {}
    save_encoder(encoder, tmp_path, record=record)
    if stored == "config.json":  # earlier runs have it only there
        (tmp_path / "config.json").write_text(json.dumps({"targets": targets}))
    result = vim_ssl.load_model(tmp_path).predict(ARRAYS[0])
    one, none, more = torch.tensor([2.0, -1.0, 3.0]).sigmoid().tolist()
    if targets == "multi-label":
        assert (result.name, result.above()) == ("c", ["a", "c"])
        assert result.above(0.9) == ["c"]
        assert result.probabilities == pytest.approx([one, none, more])
        assert repr(result) == "ClassPrediction(['a', 'c'])"
    else:
        assert result.name == "b"  # one logit above 0
        assert result.probabilities == pytest.approx([1 - one, one - none, none])


def test_names_are_numbers_if_the_run_has_none(tmp_path):
    save_encoder(VimEncoder(**TINY, num_classes=3), tmp_path, record={"classes": None})
    assert vim_ssl.load_model(tmp_path).classes == ["0", "1", "2"]


def test_the_names_of_imagenet_differ():
    """A crane is a bird or a machine; in a table each class has its own column."""
    names = imagenet_names()
    assert len(set(names)) == 1000
    assert [names[0], names[1]] == ["tench", "goldfish"]
    assert sum(name.startswith("crane") for name in names) == 2


@pytest.mark.parametrize("name", ["finetune", "segmentation", "clip"])
@pytest.mark.parametrize("dtype", [np.float32, np.int64, np.uint16])
def test_an_array_in_other_units_is_refused(name, dtype):
    model = vim_ssl.load_model(RUNS / name)
    options = {"classes": ["a", "b"]} if name == "clip" else {}
    with pytest.raises(ValueError, match=r"values up to 2\d\d \(.*give 0 to 255 as uint8"):
        model.predict(ARRAYS[0].astype(dtype), **options)
    scaled = values(model.predict(ARRAYS[0].astype(np.float32) / 255, **options))
    np.testing.assert_allclose(scaled, values(model.predict(ARRAYS[0], **options)), atol=1e-3)


@pytest.mark.parametrize("array", [np.zeros((0, 4, 3), np.uint8), np.zeros((4, 4), np.int64)])
def test_an_array_that_is_no_image_is_refused(array):
    with pytest.raises(BadImage, match="is not an image"):
        vim_ssl.load_model(RUNS / "finetune").predict(array)


# ---------------------------------------------------------------- image and text


def test_images_are_classified_by_names_and_by_sentences():
    clip = vim_ssl.load_model(RUNS / "clip")
    assert clip.task == "clip"
    with torch.no_grad():
        image = clip.encode_image(clip.transform(Image.fromarray(ARRAYS[0]))[None])
        cosines = image @ text_classifier(clip, ["red", "green"], TEMPLATES).T
        expected = (clip.logit_scale.exp() * cosines).softmax(1)[0].numpy()
        sentence = (image @ clip.encode_text(["red", "a green square"]).T)[0]
    result = clip.predict(ARRAYS[0], classes=["red", "green"])
    np.testing.assert_allclose(result.probabilities, expected, rtol=1e-5)
    (result,) = clip.predict([ARRAYS[0]], texts=["red", "a green square"])
    assert result.name == ["red", "a green square"][int(sentence.argmax())]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give classes="),
        ({"classes": ["a"], "texts": ["b"]}, "not both"),
        ({"classes": "ab"}, "a list of different names"),
        ({"classes": ["a", "a"]}, "a list of different names"),
        ({"classes": ["a"], "templates": ["photo"]}, "must contain {} once"),
    ],
)
def test_classes_that_cannot_be_told_apart_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        vim_ssl.load_clip(RUNS / "clip").predict(ARRAYS[0], **options)


# ---------------------------------------------------------------- video


@pytest.fixture
def video_run(tmp_path):
    encoder = VideoEncoder(**TINY, num_classes=2, frames=8, tubelet=2)
    record = {"classes": ["still", "moving"], "data": "video:elsewhere?frames=4"}
    save_encoder(encoder, tmp_path / "run", record=record)
    for clip in "ab":
        (tmp_path / clip).mkdir()
        for number, array in enumerate(ARRAYS * 2):
            shift = number * (clip == "b")
            Image.fromarray(np.roll(array, shift)).save(tmp_path / clip / f"{number}.png")
    return tmp_path


def test_a_video_is_predicted_from_its_path_and_from_its_frames(video_run):
    model = vim_ssl.load_model(video_run / "run")
    assert model.sampling == Sampling(frames=4)
    paths = [video_run / "a", str(video_run / "b")]
    frames = [[Image.open(f"{path}/{i}.png") for i in range(6)] for path in paths]
    with torch.no_grad():
        clip = model.transform(LoadedVideo(frames[1], Sampling(frames=4)))
        expected = model.encoder(clip[None]).softmax(1)[0].numpy()
    both = model.predict(paths)
    np.testing.assert_allclose(both[1].probabilities, expected, rtol=1e-5)
    for one in (frames[1], np.stack([np.asarray(frame) for frame in frames[1]]), paths[1]):
        np.testing.assert_allclose(model.predict(one).probabilities, expected, rtol=1e-5)
    assert [p.name for p in model.predict(frames)] == [p.name for p in both]
    with pytest.raises(TypeError, match="expected a video"):
        model.predict(frames[0][0])


# ---------------------------------------------------------------- slides


def test_a_slide_model_predicts_features_and_folders_of_them(tmp_path):
    made_of = {"weights": "12ab", "readout": "avg", "transform": "x"}
    model = SlideClassifier(["benign", "malignant"], dim=8, hidden=4, made_of=made_of).eval()
    (tmp_path / "run").mkdir()
    model.save(tmp_path / "run")
    loaded = vim_ssl.load_model(tmp_path / "run")
    x = torch.randn(5, 8)
    with torch.no_grad():
        expected = model.pool(x[None])[0].softmax(1)[0].numpy()
    assert (loaded.task, loaded.classes, loaded.made_of) == ("slide", model.classes, made_of)
    for one in (x, x.numpy()):
        np.testing.assert_allclose(loaded.predict(one).probabilities, expected, rtol=1e-5)
    folder = tmp_path / "vectors"
    (folder / "shards").mkdir(parents=True)
    ids = [f"{name}.tif@{i},0" for name in "ab" for i in range(5)]
    part = Embedded("0", torch.cat([x + 1, x]), ids, [None] * 10, [None] * 10)
    write_shard(folder / "shards", part, format="npy")
    (folder / "record.json").write_text(json.dumps({"finished": True, "made_of": made_of}))
    results = loaded.predict(folder)
    assert list(results) == ["a.tif", "b.tif"]
    np.testing.assert_allclose(results["b.tif"].probabilities, expected, rtol=1e-5)
    other = {"finished": True, "made_of": made_of | {"weights": "34cd"}}
    (folder / "record.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match=r"were made with different weights"):
        loaded.predict(folder)
    with pytest.raises(ValueError, match=r"shape \(5, 3\); expected \(tiles, 8\)"):
        loaded.predict(x[:, :3])
    with pytest.raises(FileNotFoundError, match=r"has no slide.safetensors"):
        load_slide(tmp_path)


# ---------------------------------------------------------------- which run


@pytest.mark.parametrize("source", [RUNS / "mae", "vim_tiny_patch16_224"], ids=["run", "preset"])
def test_a_run_without_a_head_is_refused_with_what_to_do(source):
    with pytest.raises(ValueError, match=r"has no head .*vim-ssl finetune --encoder .* --data"):
        vim_ssl.load_model(source)


def test_a_dense_run_is_no_classifier():
    with pytest.raises(ValueError, match=r"has segmentation.safetensors.*load_model"):
        vim_ssl.load_classifier(RUNS / "segmentation")


def test_the_newest_run_with_a_task_model_is_taken(tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match="No run with a task model"):
        newest_model(tmp_path)
    for name in ("finetune", "mae"):
        shutil.copytree(RUNS / name, tmp_path / name)
        (tmp_path / name / "encoder.json").touch()  # mae is the last one, and has no head
    assert newest_model(tmp_path).name == "finetune"
    assert capsys.readouterr().out == ""
    (tmp_path / "finetune/metrics.json").unlink()
    config = json.loads((tmp_path / "finetune/config.json").read_text())
    (tmp_path / "finetune/config.json").write_text(
        json.dumps(config | {"epochs": 50, "max_steps": 0})
    )
    newest_model(tmp_path)
    assert "finetune, is unfinished: step " in capsys.readouterr().out
    shutil.copytree(RUNS / "clip", tmp_path / "clip")
    (tmp_path / "clip/clip_config.json").touch()
    assert newest_model(tmp_path).name == "clip"

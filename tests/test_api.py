"""The commands as Python functions: the same settings and results, and a process left as it was."""

import dataclasses
import inspect
import io
import json
import os
import random
import signal
import sys
from importlib import import_module

import numpy as np
import pytest
import torch
from PIL import Image

import vim_ssl
from vim_ssl import api
from vim_ssl.data.sources import memory
from vim_ssl.downstream import linear_probe
from vim_ssl.evaluation.seen import trainings_of
from vim_ssl.recipes import clip_pretrain, mim_pretrain

IMAGES = np.random.default_rng(0).integers(0, 256, (24, 8, 8), dtype=np.uint8)
LABELS = ["dark", "light"] * 12
IMAGES[1::2] //= 2
ENCODER = {
    "encoder": "vim_nano_patch4_28",
    "model_args": {"img_size": 8, "embed_dim": 8, "depth": 1},
}
TRAINING = {"epochs": 2, "warmup_epochs": 0, "batch_size": 8, "workers": 0, "trackers": ("none",)}
PRETRAINING = ENCODER | TRAINING | {"decoder_dim": 8, "decoder_depth": 1}
COMMANDS = {name: getattr(vim_ssl, name) for name in vim_ssl.__all__
            if isinstance(getattr(vim_ssl, name), api.Command)}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> vim_ssl.Run:
    return vim_ssl.pretrain(IMAGES, output=tmp_path_factory.mktemp("run"), **PRETRAINING)


def tiny(cls=vim_ssl.VimEncoder) -> vim_ssl.VimEncoder:
    args = {"img_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 2, "d_state": 4}
    return cls(**args, in_chans=1, num_classes=0, drop_path_rate=0.1).eval()


class Negative(vim_ssl.VimEncoder):
    def forward_features(self, x, *args, **more):
        return super().forward_features(-x, *args, **more)


class Scaled(torch.nn.Module):
    def forward(self, weight):
        return 2 * weight


class Wrapped(torch.nn.Linear):
    pass


def linear(encoder, cls=torch.nn.Linear):
    return cls(encoder.embed_dim, encoder.embed_dim)


CHANGES = {
    "hook": (lambda e: e.patch_embed.register_forward_hook(lambda m, i, o: -o), "a forward hook"),
    "pre-hook": (lambda e: e.register_forward_pre_hook(lambda m, i: None), "a forward hook"),
    "forward": (lambda e: setattr(e, "forward", e.embed), "another function forward"),
    "features": (lambda e: setattr(e, "forward_features", e.embed), "function forward_features"),
    "block": (lambda e: setattr(e.layers[0], "forward", e.embed), r"layers.0 .* function forward"),
    "parametrisation": (
        lambda e: torch.nn.utils.parametrize.register_parametrization(
            e.layers[0].mixer.in_proj, "weight", Scaled()
        ),
        r"layers.0.mixer.in_proj of the encoder in memory is a Parametrized",
    ),
    "replaced": (lambda e: setattr(e, "norm_f", torch.nn.Identity()), "norm_f .* is a Identity"),
    "wrapped": (
        lambda e: setattr(e.layers[1].mixer, "out_proj", linear(e, Wrapped)), "is a Wrapped",
    ),
    "head": (lambda e: setattr(e, "head", linear(e)), "head of the encoder in memory is a Linear"),
    "added": (lambda e: setattr(e, "adapter", linear(e)), "adapter was added"),
    "setting": (lambda e: setattr(e, "cls_position", "none"), "cls_position .* is 'none', not"),
    "NaN": (lambda e: e.cls_token.data.fill_(float("nan")), "cls_token of the encoder in memory"),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_an_encoder_that_its_file_cannot_represent_is_refused(change, tmp_path):
    encoder = tiny()
    alter, message = CHANGES[change]
    alter(encoder)
    with pytest.raises(ValueError, match=message) as error:
        vim_ssl.knn(encoder, IMAGES)
    assert "encoders" not in str(error.value)  # no file of the cache
    if change != "NaN":
        with pytest.warns(UserWarning, match=r"in memory.*; its file will not have that"):
            vim_ssl.save_encoder(encoder, tmp_path)


def test_a_subclass_in_memory_is_refused():
    with pytest.raises(ValueError, match=r"is a Negative, .* compute the features yourself"):
        vim_ssl.embed(tiny(Negative), IMAGES)


def test_what_a_file_has_may_change(tmp_path, recwarn):
    encoder = tiny().train()
    encoder.set_grad_checkpointing()
    encoder.reset_classifier(3, "avg")
    encoder.prune_intermediate_layers([0], prune_head=False)
    encoder.data_config = dict(encoder.data_config, mean=(0.1,))
    encoder.classes = ["a", "b", "c"]
    encoder.register_full_backward_hook(lambda *_: None)
    saved = vim_ssl.load_encoder(api._saved(encoder.half()), num_classes=None)
    assert saved.global_pool == "avg"
    assert saved.data_config["mean"] == (0.1,)
    assert not [w for w in recwarn if "in memory" in str(w.message)]


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize("name", COMMANDS)
def test_a_function_has_the_settings_of_its_command(name):
    command = COMMANDS[name]
    config = import_module(command.script).Config
    known = {field.name for field in dataclasses.fields(config)} - api.HIDDEN
    parameters = inspect.signature(command).parameters
    assert {*parameters} - {"preset"} == known - {"preset"}
    for field in dataclasses.fields(config):
        if field.name in known:
            assert field.name in parameters
            assert f"    {field.name}: " in command.__doc__
    assert next(iter(parameters)) in ("encoder", "data")
    assert f"vim_ssl.{name}" in repr(command)


def test_defaults_are_shown_where_no_preset_decides():
    parameters = inspect.signature(vim_ssl.linear_probe).parameters
    assert parameters["knn_k"].default == linear_probe.Config.knn_k
    assert parameters["knn_k"].annotation is int
    assert inspect.signature(vim_ssl.pretrain).parameters["epochs"].default is ...
    assert "    demo: Handwritten digits" in vim_ssl.pretrain.__doc__
    help = linear_probe.Config.__dataclass_fields__["knn_k"].metadata["help"]
    assert f"knn_k: {help} (default: {linear_probe.Config.knn_k})" in vim_ssl.linear_probe.__doc__


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: vim_ssl.pretrain(IMAGES, epoch=3), TypeError, "'epoch'. Did you mean 'epochs'?"),
        (lambda: vim_ssl.pretrain(IMAGES, epochs="many"), ValueError, "epochs: expected float"),
        (lambda: vim_ssl.pretrain(IMAGES, preset="dmo"), ValueError, "Did you mean 'demo'?"),
        (lambda: vim_ssl.pretrain(IMAGES, mask="checker"), ValueError, "mask: 'checker'"),
        (lambda: vim_ssl.pretrain(7), TypeError, "type int cannot be read"),
        (lambda: vim_ssl.finetune("x", IMAGES, eval_only=True), TypeError, "setting 'eval_only'"),
        (lambda: vim_ssl.knn("vim_nano", IMAGES), ValueError, "Unknown preset 'vim_nano'"),
        (lambda: vim_ssl.knn(torch.nn.ReLU(), IMAGES), TypeError, "takes a VimEncoder"),
        (lambda: vim_ssl.Run("/nowhere"), FileNotFoundError, "not a run directory"),
    ],
)
def test_mistakes_are_exceptions_with_a_way_out(call, error, words):
    with pytest.raises(error, match=words.replace("?", r"\?")):
        call()


def test_presets_and_defaults_are_those_of_the_command(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    config = api._config(api.PRETRAIN, {"hflip": np.float64(0.5)}, preset="mae_minute", data=None)
    expected = dataclasses.replace(mim_pretrain.mae_minute(), hflip=0.5, output=config.output)
    assert config == expected
    assert type(config.hflip) is float
    short = api._config(api.CLIP, {"epochs": 9}, preset="emoji_clip", data=tmp_path)
    assert (short.warmup_epochs, short.val) == (0.25, "")  # as the command derives them
    assert short.data == str(tmp_path)
    assert clip_pretrain.emoji_clip().val
    for images in (IMAGES, [Image.fromarray(image) for image in IMAGES]):
        small = api._config(api.PRETRAIN, {}, data=images)
        assert small.preset == ("mae_small_224" if torch.cuda.is_available() else "cpu_mae_32")
    assert api._new_folder("mim_pretrain") != config.output  # in the same second


def test_models_by_name():
    assert vim_ssl.list_models("vim_nano*_28") == ["vim_nano_patch4_28"]
    (name,) = vim_ssl.list_models("vim_mini*", pretrained=True)
    assert name == "vim_mini_patch8_96.offline_rgb"
    assert name in vim_ssl.list_models()


# ---------------------------------------------------------------- pretraining


def weights(run) -> dict[str, torch.Tensor]:
    return run.encoder().state_dict()


def test_a_run_knows_its_results(run):
    assert run.config["data"] == vim_ssl.register_data(IMAGES)
    assert run.curves[-1]["step"] == 6
    assert run.metrics == run.curves[-1]
    assert run.report.name == "report.html"
    assert vim_ssl.load_encoder(run).embed_dim == 8  # it is a path
    assert str(run) in repr(run)
    assert "loss" in repr(run)
    page = run._repr_html_()
    assert page.count("data:image/png;base64,") == 1
    assert "<th>loss</th>" in page
    json.dumps(run.curves)


def test_a_terminal_without_the_characters_does_not_end_a_training(tmp_path, monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    trained = vim_ssl.pretrain(IMAGES, output=tmp_path / "café", **PRETRAINING | {"epochs": 1})
    assert trained.folder.is_dir()
    terminal.flush()
    assert b"caf\\xe9" in terminal.buffer.getvalue()


def test_calls_in_one_process_do_not_affect_each_other(run, tmp_path):
    """Other precision, other state of the process: accelerate keeps the first by itself."""
    threads = torch.get_num_threads()
    other = vim_ssl.pretrain(
        IMAGES, precision="bf16", threads=threads + 1, output=tmp_path / "bf16", **PRETRAINING
    )
    assert torch.get_num_threads() == threads
    random.seed(1)
    np.random.seed(2)  # noqa: NPY002
    torch.manual_seed(3)
    state = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    again = vim_ssl.pretrain(
        [Image.fromarray(image) for image in IMAGES], output=tmp_path / "again", **PRETRAINING
    )
    assert random.getstate() == state[0]
    assert np.random.get_state()[1].tolist() == state[1]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), state[2])
    assert all(torch.equal(value, weights(run)[name]) for name, value in weights(again).items())
    assert not all(torch.equal(value, weights(run)[name]) for name, value in weights(other).items())


@pytest.fixture(autouse=True)
def default_interrupt():
    """A process that was started in the background ignores SIGINT, and so do its children."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Interrupting(torch.utils.data.Dataset):
    """Images; a read after the first ``reads`` acts like Ctrl-C."""

    def __init__(self, reads: int):
        self.left = reads

    def __len__(self):
        return len(IMAGES)

    def __getitem__(self, index):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGINT)
        return Image.fromarray(IMAGES[index])


def test_ctrl_c_saves_and_the_same_call_continues(run, tmp_path, monkeypatch):
    handler = signal.getsignal(signal.SIGINT)
    reads = len(IMAGES) + memory.REREAD + 20  # during the third step
    with pytest.raises(KeyboardInterrupt, match="resume='auto'"):
        vim_ssl.pretrain(Interrupting(reads), output=tmp_path, **PRETRAINING)
    assert signal.getsignal(signal.SIGINT) is handler
    assert list((tmp_path / "checkpoints").glob("step-*"))
    with pytest.raises(ValueError, match="images are not those of the checkpoint"):
        vim_ssl.pretrain(IMAGES[::-1], output=tmp_path, resume="auto", **PRETRAINING)
    known = dict(memory._registered)
    monkeypatch.setattr(memory, "_registered", {})  # as in another process
    with pytest.raises(ValueError, match="Give the same images again"):
        vim_ssl.pretrain(output=tmp_path, resume="auto")
    monkeypatch.setattr(memory, "_registered", known)
    finished = vim_ssl.pretrain(IMAGES, output=tmp_path, resume="auto")  # its own settings
    assert all(torch.equal(value, weights(run)[name]) for name, value in weights(finished).items())


def test_captions_in_memory_train_an_image_text_model(tmp_path, capsys):
    pairs = [{"image": image, "caption": f"a {label} tile"}
             for image, label in zip(IMAGES, LABELS, strict=True)]  # fmt: skip
    args = ENCODER | {"model_args": ENCODER["model_args"] | {"in_chans": 1}}
    run = vim_ssl.clip_pretrain(
        pairs, text_width=8, text_depth=1, text_heads=1, embed_dim=8, vocab_size=300,
        context_length=12, output=tmp_path, **args, **TRAINING,
    )  # fmt: skip
    assert vim_ssl.load_clip(run).encode_text(["a dark tile"]).shape == (1, 8)
    capsys.readouterr()
    result = vim_ssl.zero_shot(run, pairs)
    assert result.metrics["retrieval"]["captions"] == 24
    assert "chance at R@1" in repr(result)
    assert capsys.readouterr().out == ""


# ---------------------------------------------------------------- frozen and fitted


def test_probes_return_their_table(run, capsys):
    capsys.readouterr()
    result = vim_ssl.linear_probe(
        run, (IMAGES, LABELS), knn_k=3, c_grid=[1], readouts=["avg"], cache=False
    )
    assert [row["features"] for row in result.rows][-1] == "raw pixels"
    assert repr(result) == linear_probe.table(result.metrics).strip("\n")
    assert "raw pixels" in result._repr_html_()
    # An encoder in memory, and splits, are read as the same files would be.
    splits = {"train": (IMAGES[:16], LABELS[:16]), "test": (IMAGES[16:], LABELS[16:])}
    neighbours = vim_ssl.knn(run.encoder(), splits, k=[1, 3], baselines=False, cache=False)
    assert (neighbours.metrics["train"], neighbours.metrics["test"]) == (16, 8)
    assert {row["k"] for row in neighbours.rows} == {1, 3}
    assert capsys.readouterr().out == ""


def test_embeddings_are_the_encoders_features(run, tmp_path):
    encoder = run.encoder()
    embedded = vim_ssl.embed(encoder, (IMAGES[:3], LABELS[:3]))
    transform = vim_ssl.create_transform(encoder)
    inputs = torch.stack([transform(Image.fromarray(image)) for image in IMAGES[:3]])
    with torch.no_grad():
        torch.testing.assert_close(embedded.x, encoder(inputs))
    assert embedded.labels == [0, 1, 0]
    assert embedded.ids == ["0", "1", "2"]
    # Registered, compared with the images of the trainings, and embedded in part.
    reads = 2 * len(IMAGES) + memory.REREAD + 43
    with pytest.raises(KeyboardInterrupt) as stopped:  # keeps its frames, as a notebook does
        vim_ssl.embed(
            run, Interrupting(reads), output=tmp_path / "kept", shard_rows=8, batch_size=8
        )
    files = sorted((tmp_path / "kept" / "shards").glob("*.parquet"))
    resumed = vim_ssl.embed(run, IMAGES, output=tmp_path / "kept", shard_rows=8, batch_size=8)
    assert 0 < len(files) < 3
    assert resumed.x.shape == (24, 8)
    assert stopped.traceback


def test_tasks_in_memory(run, tmp_path):
    settings = TRAINING | {"epochs": 1}
    fitted = vim_ssl.finetune(run, (IMAGES, LABELS), output=tmp_path / "classes", **settings)
    assert fitted.metrics["test"] == 5
    assert fitted.model().classes == ["dark", "light"]
    images = [Image.fromarray(image) for image in IMAGES]
    expected = [prediction.top() for prediction in fitted.model().predict(images)]
    assert [prediction.top() for prediction in vim_ssl.predict(fitted, IMAGES)] == expected
    with pytest.warns(UserWarning, match="1 images cannot be read: 1: "):
        one, none = vim_ssl.predict(fitted.model(), [IMAGES[0], tmp_path / "missing.png"])
    assert (one.top(), none) == (expected[0], None)
    masks = (IMAGES > 99).astype(np.uint8)
    segmented = vim_ssl.segmentation(
        run.encoder(), {"image": IMAGES, "mask": masks, "classes": ["soil", "leaf"]}, crop=8,
        head="linear", output=tmp_path / "masks", **settings,
    )  # fmt: skip
    assert segmented.metrics["classes"] == ["soil", "leaf"]
    assert segmented.images[-1].name == "predictions.png"
    (labels,) = vim_ssl.predict(segmented, [IMAGES[0]])
    np.testing.assert_array_equal(labels, segmented.model().predict(images[0]))


def test_an_encoder_in_memory_keeps_its_record_after_equal_weights_without_one():
    encoder = vim_ssl.load_encoder("vim_nano_patch8_64", depth=1, embed_dim=16)
    bare = api._saved(encoder)
    encoder.trainings = [{"recipe": "finetune", "data": "x", "labels": True}]
    assert [t.data for t in trainings_of(api._saved(encoder))] == ["x"]
    assert trainings_of(bare) == []

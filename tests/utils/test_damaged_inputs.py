"""Every reader of a user's file answers a damaged one with a ValueError that names it."""

from pathlib import Path

import pytest
import torch

import vim_ssl
from vim_ssl import load_encoder, save_encoder
from vim_ssl.checkpoints.task_models import load_head, save_head
from vim_ssl.evaluation.embeddings import Embedded, read_embeddings, write_shard
from vim_ssl.models.text import TextEncoder
from vim_ssl.models.tokenizers import load_tokenizer, train_bpe
from vim_ssl.objectives.clip import Clip, save_clip
from vim_ssl.results import Run
from vim_ssl.tasks.models import newest_model
from vim_ssl.training.run import newest_run, read_metrics, stored_or, trained_on
from vim_ssl.utils.config import read
from vim_ssl.utils.resumable import Journal, read_record

NOT_TEXT, CUT = b"\xff\xfe\0{", b'{"a": '
OTHER = {"[]": b"[]", "null": b"null", "not text": NOT_TEXT, "cut": CUT, "deep": b"[" * 5000}


def refused(path: Path, call) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the message is checked below)
        call()
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A small image-text model."""
    folder = tmp_path_factory.mktemp("clip")
    tokenizer = train_bpe(["red cat"], vocab_size=300, context_length=8)
    text = TextEncoder(
        tokenizer.vocab_size, eos_id=tokenizer.eos_id, context_length=8, width=8, depth=1, heads=1
    )
    encoder = load_encoder("vim_nano_patch8_64", depth=1, embed_dim=8, d_state=4)
    save_clip(Clip(encoder, text, embed_dim=4, tokenizer=tokenizer), folder)
    return folder


@pytest.mark.parametrize("content", OTHER.values(), ids=OTHER)
@pytest.mark.parametrize("name", ["config.json", "metrics.json", "record.json"])
def test_records_of_runs(tmp_path, name, content):
    file = tmp_path / name
    if name == "metrics.json":
        (tmp_path / "config.json").write_text("{}")
    file.write_bytes(content)
    calls = {
        "config.json": (
            lambda: trained_on(tmp_path),
            lambda: stored_or(None)({"resume": "auto", "output": str(tmp_path)}),
            lambda: Run(tmp_path).config,
        ),
        "metrics.json": (lambda: Run(tmp_path).metrics,),
        "record.json": (lambda: read_record(file), lambda: read_embeddings(tmp_path)),
    }
    for call in calls[name]:
        refused(file, call)


@pytest.mark.parametrize("line", [b"[1]", b"\xff\xfe", b"{", b"7"])
def test_lines_of_a_log(tmp_path, line):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 2}\n{"st')
    for call in (lambda: read_metrics(tmp_path), lambda: Run(tmp_path).curves):
        refused(tmp_path / "metrics.jsonl", call)
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n{"st')  # cut off by a kill
    assert read_metrics(tmp_path) == [{"step": 1}]


def test_other_runs_with_damaged_files_do_not_hide_the_newest(tmp_path):
    for number, content in enumerate([b"[]", NOT_TEXT, b'{"config": [1]}', b'{"config": 1}']):
        folder = tmp_path / f"run-{number}"
        folder.mkdir()
        (folder / "encoder.json").write_bytes(content)
    encoder = load_encoder("vim_nano_patch8_64", depth=1, embed_dim=8, d_state=4, num_classes=2)
    save_encoder(encoder, tmp_path / "good")
    assert newest_model(tmp_path) == tmp_path / "good"
    (tmp_path / "good/config.json").write_text('{"recipe": "mim_pretrain"}')
    (tmp_path / "run-0/encoder.safetensors").touch()
    (tmp_path / "run-0/config.json").write_bytes(b"[]")
    assert newest_run(tmp_path) == tmp_path / "good"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("clip.safetensors", b""), ("clip.safetensors", b"\x10\0\0\0\0\0\0\0{}"),
        ("clip_config.json", b"[]"), ("clip_config.json", b"{}"), ("clip_config.json", NOT_TEXT),
        ("tokenizer.json", b"{}"), ("tokenizer.json", b"[]"), ("tokenizer.json", CUT),
        ("tokenizer.json", b'{"name": "bpe", "context_length": 8, "model": {}}'),
        ("encoder.json", b"[]"), ("encoder.json", NOT_TEXT), ("encoder.json", b'{"config": {}}'),
        ("encoder.json", b'{"format": 1, "config": {"depth": "x"}}'),
        ("encoder.safetensors", b"\x10\0\0\0\0\0\0\0{}"), ("encoder.safetensors", b""),
    ],
)  # fmt: skip
def test_files_of_an_image_text_model(model, tmp_path, name, content):
    for path in model.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    vim_ssl.load_clip(tmp_path)
    (tmp_path / name).write_bytes(content)
    refused(tmp_path / name, lambda: vim_ssl.load_clip(tmp_path))
    if name == "tokenizer.json":
        refused(tmp_path / name, lambda: load_tokenizer(tmp_path))


@pytest.mark.parametrize("content", [b"", b"\x10\0\0\0\0\0\0\0{}", b"x" * 100])
def test_heads_of_a_task(tmp_path, content):
    head = torch.nn.Linear(2, 2)
    head.config = {"classes": ["a", "b"]}  # type: ignore[assignment]
    save_head(head, tmp_path, "slide.safetensors")
    assert load_head(tmp_path, "slide.safetensors", "slide")[0] == head.config
    (tmp_path / "slide.safetensors").write_bytes(content)
    refused(
        tmp_path / "slide.safetensors", lambda: load_head(tmp_path, "slide.safetensors", "slide")
    )


@pytest.mark.parametrize("format", ["npy", "parquet"])
@pytest.mark.parametrize("content", [b"", b"x" * 100])
def test_embeddings(tmp_path, format, content):
    if format == "parquet":
        pytest.importorskip("pyarrow")
    (tmp_path / "shards").mkdir()
    part = Embedded("0", torch.ones(2, 3), ids=["a", "b"], labels=[0, 1], groups=[None, None])
    write_shard(tmp_path / "shards", part, format=format, multi_label=False)
    (tmp_path / "record.json").write_text('{"finished": true, "made_of": {}}')
    (tmp_path / "shards" / f"._0.{format}").write_bytes(b"a Mac's file")
    assert read_embeddings(tmp_path).ids == ["a", "b"]
    files = [path for path in (tmp_path / "shards").iterdir() if not path.name.startswith(".")]
    for file in files:
        before = file.read_bytes()
        file.write_bytes(content)
        refused(file, lambda: read_embeddings(tmp_path))
        file.write_bytes(before)


@pytest.mark.parametrize("line", [b"[1]\n", b"\xff\n", b"{}\n"])
def test_a_journal(tmp_path, line):
    (tmp_path / "journal.jsonl").write_bytes(line)
    refused(tmp_path / "journal.jsonl", lambda: Journal(tmp_path / "journal.jsonl"))


@pytest.mark.parametrize("content", [NOT_TEXT, b"a: [", b"[1]", b"a: \x07"])
def test_a_file_of_settings(tmp_path, content):
    (tmp_path / "settings.yaml").write_bytes(content)
    refused(tmp_path / "settings.yaml", lambda: read(tmp_path / "settings.yaml"))

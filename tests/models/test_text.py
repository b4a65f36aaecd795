"""Tokenizers and the text tower: any caption has a row, and the row is read at its first end."""

import json
import pickle
import sys

import pytest
import torch
from processes import run

from vim_ssl.models.text import TextEncoder, build_text, first_end, load_hub_text
from vim_ssl.models.tokenizers import (
    BytePairs,
    ClipBPE,
    clean,
    load_tokenizer,
    named_tokenizer,
    train_bpe,
)

CAPTIONS = [
    "a dog running on the beach", "a cat on a mat", "Two dogs and a cat", "ein Hund am Strand",
    "犬が走っている", "кошка на коврике", "une fête à la plage", "🐶 a dog face",
] * 5  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> BytePairs:
    return train_bpe(CAPTIONS, vocab_size=400, context_length=12)


# ------------------------------------------------------------------ tokenizers


@pytest.mark.parametrize("text", [*CAPTIONS[:8], "never seen: Ελληνικά ☃ ﷽", "x<eos>y<pad>"])
def test_a_text_comes_back_in_lower_case(tokenizer, text):
    assert tokenizer.decode(tokenizer.ids(text)) == text.lower()


def test_one_spelling_of_an_accent_is_as_good_as_another(tokenizer):
    assert tokenizer.ids("fe\u0302te") == tokenizer.ids("f\u00eate")


@pytest.mark.parametrize(
    ("text", "cut"),
    [("a dog", False), ("", False), (" \n\t", False), ("dog " * 40, True), ("犬" * 9999, True),
     ("a cat on a mat <eos> and more", True), ("half a character: \ud83d", True)],
    ids=["short", "empty", "blank", "long", "book", "marks", "surrogate"],
)  # fmt: skip
def test_any_text_is_a_row_with_one_end(tokenizer, text, cut):
    row, was_cut = tokenizer.row(text)
    assert len(row) == 12
    assert row[0] == tokenizer.bos_id
    assert row.count(tokenizer.eos_id) == 1
    assert set(row[row.index(tokenizer.eos_id) + 1 :]) <= {tokenizer.pad_id}
    assert was_cut == cut
    assert (row[-1] == tokenizer.eos_id) == cut
    assert max(row) < tokenizer.vocab_size


def test_rows_are_stacked(tokenizer):
    tokens = tokenizer(["a dog", "a cat on a mat"])
    assert tokens.shape == (2, 12)
    assert tokens.dtype == torch.int64
    assert torch.equal(tokenizer("a dog")[0], tokens[0])
    assert tokenizer([]).shape == (0, 12)


def test_it_is_the_same_after_saving_and_in_a_worker(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]
    for other in (load_tokenizer(tmp_path), pickle.loads(pickle.dumps(tokenizer))):
        assert torch.equal(other([*CAPTIONS, "x<eos>y"]), tokenizer([*CAPTIONS, "x<eos>y"]))
        assert other.vocab_size == tokenizer.vocab_size


@pytest.mark.slow
def test_the_same_captions_give_the_same_tokens_in_every_process(tokenizer):
    code = (
        "from vim_ssl.models.tokenizers import train_bpe\n"
        f"print(train_bpe({CAPTIONS!r}, vocab_size=400).model)"
    )
    done = run(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip("\n") == tokenizer.model


@pytest.mark.parametrize(
    ("captions", "more", "says"),
    [
        (["", " "], {}, "no word"),
        (CAPTIONS, {"vocab_size": 100}, "vocab_size 100 is too small for the 256 bytes"),
        (CAPTIONS, {"context_length": 2}, "no room"),
    ],
)
def test_what_gives_no_tokenizer_is_refused(captions, more, says):
    with pytest.raises(ValueError, match=says):
        train_bpe(captions, **more)


def test_an_unknown_tokenizer_is_refused_and_a_missing_package_named(monkeypatch):
    with pytest.raises(ValueError, match="bpe, clip or hf:NAME"):
        named_tokenizer("clop")
    monkeypatch.setitem(sys.modules, "open_clip", None)
    monkeypatch.setitem(sys.modules, "open_clip.tokenizer", None)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"need open_clip: pip install 'vim-ssl\[clip\]'"):
        named_tokenizer("clip")
    with pytest.raises(ImportError, match=r"need transformers: pip install 'vim-ssl\[clip\]'"):
        named_tokenizer("hf:bert-base-uncased")


@pytest.mark.parametrize("load", [named_tokenizer, lambda name: load_hub_text(name[3:], 2)])
def test_a_model_that_cannot_be_had_is_one_line(load, tmp_path):
    pytest.importorskip("transformers")
    with pytest.raises(OSError, match="cannot be loaded") as error:
        load(f"hf:{tmp_path}")
    assert "\n" not in str(error.value)


def test_no_tokenizer_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_clips_tokens_are_open_clips(tmp_path):
    open_clip = pytest.importorskip("open_clip")
    ours = ClipBPE()
    theirs = open_clip.get_tokenizer("ViT-B-32")
    texts = [*CAPTIONS, "", "many words " * 50]
    assert torch.equal(ours(texts), theirs(texts))
    ours.save(tmp_path)
    assert torch.equal(load_tokenizer(tmp_path)(texts), theirs(texts))
    assert ours.decode(ours("A Dog  on the beach")[0]) == "a dog on the beach"


def test_clips_marks_in_a_caption_are_words():
    pytest.importorskip("open_clip")
    tokenizer = ClipBPE(40)
    for mark in ("<end_of_text>", "<START_OF_TEXT>", "&lt;end_of_text&gt;"):
        row, cut = tokenizer.row(f"a dog {mark} and a cat")
        assert row.count(tokenizer.eos_id) == row.count(tokenizer.bos_id) == 1
        assert tokenizer.decode(row).endswith("and a cat")
        assert not cut


def test_white_space_is_no_text():
    assert clean("  a\n dog\t\u3000face ") == "a dog face"


def test_a_model_of_the_hub_reads_up_to_the_end_and_comes_back_from_its_config(tmp_path):
    """A BERT without weights and a GPT-2, whose start is its end, saved in a local folder."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer as Model

    model = train_bpe(CAPTIONS, vocab_size=300).model
    for kind, marks in (
        ("bert", {"cls_token": "<bos>", "sep_token": "<eos>", "pad_token": "<pad>"}),
        ("gpt2", {"bos_token": "<eos>", "eos_token": "<eos>"}),
    ):
        folder = tmp_path / kind
        settings = transformers.AutoConfig.for_model(
            kind, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=32, vocab_size=300,
        )  # fmt: skip
        transformers.AutoModel.from_config(settings).save_pretrained(folder)
        transformers.PreTrainedTokenizerFast(
            tokenizer_object=Model.from_str(model), **marks
        ).save_pretrained(folder)
        ours = named_tokenizer(f"hf:{folder}", context_length=16)
        assert ours.bos_id == (1 if kind == "bert" else None)
        assert ours.decode(ours("A dog")[0]) == "a dog"
        text = load_hub_text(str(folder), ours.eos_id).eval()
        rows = ours(["a dog", "a cat on a mat"])
        after = rows.clone()
        after[0, first_end(rows, ours.eos_id)[0] + 1 :] = 7
        torch.testing.assert_close(text(after), text(rows))
        again = build_text(json.loads(json.dumps(text.config))).eval()
        again.load_state_dict(text.state_dict())
        torch.testing.assert_close(again(rows), text(rows))
        text(rows).sum().backward()
        assert all(p.grad is not None for p in text.parameters() if p.requires_grad)


# ------------------------------------------------------------------ the tower


def tower(**more) -> TextEncoder:
    args = {"eos_id": 2, "context_length": 8, "width": 16, "depth": 2, "heads": 2}
    return TextEncoder(20, **(args | more)).eval()


def test_what_follows_the_first_end_does_not_matter():
    text = tower()
    rows = torch.tensor([[1, 5, 6, 2, 0, 0, 0, 0], [1, 5, 6, 2, 9, 2, 2, 19]])
    features = text(rows)
    assert features.shape == (2, 16)
    torch.testing.assert_close(features[0], features[1])
    torch.testing.assert_close(text(rows[:1, :4]), features[:1])


def test_padding_that_no_caption_needs_costs_a_cpu_nothing():
    text, widths = tower(), []
    text.layers[0].register_forward_hook(lambda _, args, __: widths.append(args[0].shape[1]))
    text(torch.tensor([[1, 5, 2, 0, 0, 0, 0, 0], [1, 5, 6, 2, 0, 0, 0, 0]]))
    text(torch.full((2, 8), 5))  # without an end all are read
    text(torch.empty(0, 8, dtype=torch.int64))
    assert widths == [4, 8, 8]


def test_what_comes_before_the_end_matters():
    text = tower()
    features = text(torch.tensor([[1, 5, 6, 2, 0, 0, 0, 0], [1, 6, 5, 2, 0, 0, 0, 0]]))
    assert not torch.allclose(features[0], features[1], atol=1e-3)


def test_the_end_is_found_whatever_its_id():
    rows = torch.tensor([[1, 19, 2, 2], [2, 1, 1, 1], [1, 1, 1, 2], [1, 1, 1, 1]])
    assert first_end(rows, 2).tolist() == [2, 0, 3, 3]
    assert rows[3, 3] == 1  # left as it was


def test_every_parameter_gets_a_gradient():
    text = tower().train()
    text(torch.tensor([[1, 5, 6, 2, 0, 0, 0, 0]])).square().sum().backward()
    for name, parameter in text.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


def test_dropout_acts_in_training_only():
    text = tower(dropout=0.5)
    rows = torch.tensor([[1, 5, 6, 2]])
    assert torch.equal(text(rows), text(rows))
    text.train()
    assert not torch.equal(text(rows), text(rows))


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="not divisible by 3 heads"):
        tower(heads=3)
    for shape in ({"depth": 0}, {"dropout": 1.5}, {"width": 0}):
        with pytest.raises(ValueError, match=r"must be 1 or more|not divisible"):
            tower(**shape)
    with pytest.raises(ValueError, match="captions have 9 tokens; expected at most 8"):
        tower()(torch.ones(1, 9, dtype=torch.int64))

"""What stands beside a tokenizer.json is read as transformers reads it, and is in the export again."""

import json

import pytest
import tokenizers
import transformers
from tokenizers.processors import TemplateProcessing

from ant5m.data.tokenizer import Tokenizer, train_tokenizer

TEXT = "the ant carries a leaf along the path and the other ants follow it to the nest by the old tree"
TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"


@pytest.fixture
def folder(tmp_path):
    words = TEXT.split()
    texts = [" ".join(words[i:] + words[:i]) for i in range(len(words))] * 20
    backend = tokenizers.Tokenizer.from_str(train_tokenizer(texts, vocab_size=300).backend.to_str())
    backend.add_special_tokens(["<s>", "</s>", "<pad>", "<tool>"])
    bos = ("<s>", backend.token_to_id("<s>"))
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[bos])
    (tmp_path / "given").mkdir()
    backend.save(str(tmp_path / "given" / "tokenizer.json"))
    return tmp_path / "given"


def write(folder, **files):
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return Tokenizer.load(folder)


@pytest.mark.parametrize(
    "config, special, eos",
    [
        ({}, {"eos_token": "</s>"}, "</s>"),
        ({"eos_token": "<|endoftext|>"}, {"eos_token": {"content": "</s>"}}, "</s>"),
        ({"eos_token": {"__type": "AddedToken", "content": "</s>"}}, {}, "</s>"),
        ({"eos_token": "<|endoftext|>", "added_tokens_decoder": {}}, {"eos_token": "</s>"}, "<|endoftext|>"),
    ],
)
def test_the_end_token_is_the_one_of_transformers(folder, config, special, eos):
    ours = write(
        folder,
        tokenizer_config={"tokenizer_class": "PreTrainedTokenizerFast", **config},
        special_tokens_map=special,
    )
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert ours.eos_token == theirs.eos_token == eos
    assert ours.end_ids == (theirs.eos_token_id,)


@pytest.mark.parametrize("template_file", [False, True])
def test_what_is_saved_gives_transformers_the_ids_of_training_and_keeps_the_rest(
    folder, template_file, tmp_path
):
    given = {
        "tokenizer_class": "LlamaTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<nowhere>",
        "add_bos_token": True,
        "additional_special_tokens": ["<tool>"],
        "chat_template": "another" if template_file else TEMPLATE,
    }
    if template_file:
        (folder / "chat_template.jinja").write_text(TEMPLATE)
    ours = write(folder, tokenizer_config=given)
    with pytest.warns(UserWarning, match="left out of tokenizer_config.json: <nowhere>"):
        ours.save(tmp_path / "saved", 64)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    for text in (TEXT, "", "<s>" + TEXT):
        assert theirs(text, split_special_tokens=True)["input_ids"] == ours.encode(text)
    assert (theirs.bos_token, theirs.eos_token, theirs.pad_token) == ("<s>", "</s>", "<pad>")
    assert len(theirs) == ours.vocab_size and theirs.unk_token is None
    assert "<tool>" in theirs.all_special_tokens
    said = theirs.apply_chat_template([{"role": "user", "content": "why"}], tokenize=False)
    assert said == "[user] why"
    again = Tokenizer.load(tmp_path / "saved")
    assert again.fingerprint == ours.fingerprint and again.settings["chat_template"] == TEMPLATE


def test_a_bpe_that_does_not_name_its_type(folder):
    content = json.loads((folder / "tokenizer.json").read_text())
    fingerprint = Tokenizer.load(folder).fingerprint
    del content["model"]["type"]
    assert write(folder, tokenizer=content).fingerprint == fingerprint

"""What a prompt begins with and what ends an answer, over all templates that come with the package."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.small import tiny_model
from tokenizers.processors import TemplateProcessing

from orpo_trl.generation import generate_batch, stop_token_ids
from orpo_trl.pairs.rendering import render_turns
from orpo_trl.pairs.tokenize import prompt_ids
from orpo_trl.paths import RECIPES

TEMPLATES = sorted([*RECIPES.glob("templates/*.jinja"), *RECIPES.glob("quickstart/model/*.jinja")])
TURNS = [
    {"role": "user", "content": "first"},
    {"role": "assistant", "content": "answer"},
    {"role": "user", "content": "second"},
]
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: str(path.relative_to(RECIPES)))
@pytest.mark.parametrize("writes_bos", [False, True])
@pytest.mark.parametrize("turns", [TURNS[:1], TURNS], ids=len)
def test_a_prompt_begins_with_one_bos_whether_the_template_writes_it_or_not(template, writes_bos, turns, tokenizer):
    bos = (tokenizer.bos_token, tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    tokenizer.chat_template = ("{{- bos_token -}}" if writes_bos else "") + template.read_text()
    (ids,) = prompt_ids([render_turns(turns, tokenizer, add_generation_prompt=True)], tokenizer)
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1


def test_a_tokenizer_without_a_bos_adds_none(tokenizer):
    text = render_turns(TURNS[:1], tokenizer, add_generation_prompt=True)
    assert prompt_ids([text], tokenizer) == [tokenizer.encode(text, add_special_tokens=False)]


def test_answers_end_at_the_tokens_of_template_tokenizer_and_model(tokenizer):
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    eos, end = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert stop_token_ids(tokenizer) == [eos]
    tokenizer.chat_template = CHATML
    assert stop_token_ids(tokenizer) == sorted([eos, end])
    assert stop_token_ids(tokenizer, [7, 9]) == sorted([eos, end, 7, 9])
    assert stop_token_ids(tokenizer, 7) == sorted([eos, end, 7])


@pytest.mark.parametrize("template", [None, "{{ raise_exception('no') }}", "{{ messages[0].content }}"])
def test_a_template_that_tells_no_end_leaves_the_tokenizers(template, tokenizer):
    tokenizer.chat_template = template
    assert stop_token_ids(tokenizer) == [tokenizer.eos_token_id]


def test_a_batch_of_uneven_prompts_has_the_answers_of_each_alone():
    model = tiny_model().eval()
    prompts = [[5, 6, 7, 8, 9, 10, 11], [12], [13, 14, 15]]

    def answers(batch):
        return generate_batch(
            model, batch, max_new_tokens=12, stop_ids=[3], pad_id=0, device=torch.device("cpu")
        )  # fmt: skip

    assert [one.tolist() for one in answers(prompts)] == [answers([prompt])[0].tolist() for prompt in prompts]


def test_an_answer_stops_before_its_stop_token():
    model = tiny_model().eval()
    options = {"max_new_tokens": 12, "pad_id": 0, "device": torch.device("cpu")}
    (whole,) = generate_batch(model, [[5, 6, 7]], stop_ids=[], **options)
    stop = int(whole[6])
    first = whole.tolist().index(stop)
    (cut,) = generate_batch(model, [[5, 6, 7]], stop_ids=[stop], **options)
    assert cut.tolist() == whole[:first].tolist()
    assert len(whole) == 12


def test_what_the_models_own_file_asks_for_is_left_out_and_left_as_it_is():
    model = tiny_model().eval()
    options = {"max_new_tokens": 12, "stop_ids": [], "pad_id": 0, "device": torch.device("cpu")}
    (plain,) = generate_batch(model, [[5, 6, 7]], **options)
    model.generation_config.repetition_penalty = 3.0
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    for asked in (model, adapted):
        (answer,) = generate_batch(asked, [[5, 6, 7]], **options)
        assert answer.tolist() == plain.tolist()
        assert model.generation_config.repetition_penalty == 3.0
    own = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=12, do_sample=False, eos_token_id=None)
    assert own[0, 3:].tolist() != plain.tolist()  # so the penalty would have been seen

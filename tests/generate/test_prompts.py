"""What is asked: rows of files and of benchmarks, and what is wrong with them."""

import json

import pytest

from orpo_trl.generate.benchmarks import BENCHMARKS, OWN, Answered, conversations_of, read_answers
from orpo_trl.generate.prompts import Conversation, read_prompts


def write(path, content):
    text = content if isinstance(content, str) else "".join(json.dumps(row) + "\n" for row in content)
    path.write_text(text, encoding="utf-8")
    return path


def user(text):
    return {"role": "user", "content": text}


def test_a_text_file_has_a_prompt_a_line(tmp_path):
    found = read_prompts(write(tmp_path / "a.txt", "first\n\nsecond\n"))
    assert [one.messages for one in found] == [[user("first")], [user("second")]]
    assert [one.fields for one in found] == [{"prompt": "first"}, {"prompt": "second"}]


@pytest.mark.parametrize(
    ("row", "messages", "fields"),
    [
        ({"prompt": "a"}, [user("a")], {"prompt": "a"}),
        ({"instruction": "a"}, [user("a")], {"prompt": "a"}),
        ({"messages": [user("a")]}, [user("a")], {"messages": [user("a")]}),
        ({"prompt": [user("a")]}, [user("a")], {"messages": [user("a")]}),
        ({"system": "s", "prompt": "a"}, [{"role": "system", "content": "s"}, user("a")], {"prompt": "a"}),
    ],
)
@pytest.mark.parametrize("ending", [".jsonl", ".json"])
def test_rows_have_a_prompt_an_instruction_or_messages(row, messages, fields, ending, tmp_path):
    path = write(tmp_path / f"a{ending}", [row] if ending == ".jsonl" else json.dumps([row]))
    assert read_prompts(path) == [Conversation(messages, fields=fields)]


def test_an_instruction_with_its_input_is_one_question(tmp_path):
    (found,) = read_prompts(write(tmp_path / "a.jsonl", [{"instruction": "translate", "input": "chat"}]))
    (turn,) = found.messages
    assert turn["role"] == "user"
    assert turn["content"].startswith("translate")
    assert turn["content"].endswith("chat")
    assert found.fields == {"messages": found.messages}


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", "\n", "expected a prompt a line, and it has none"),
        ("a.jsonl", "\n", "expected rows, and it has none"),
        ("a.jsonl", '{"prompt": "x"}\n{"prompt"', "a.jsonl, line 2: expected JSON"),
        ("a.jsonl", "[1]\n", "a.jsonl, line 1: expected a row"),
        ("a.json", '{"prompt": "x"}', "expected a list of rows"),
        ("a.jsonl", '{"text": "x"}', "line 1: column `prompt`: expected `prompt`, `instruction` or `messages`"),
        ("a.jsonl", json.dumps({"messages": [user("a"), {"role": "assistant", "content": "b"}]}), "a user turn at the"),
        ("a.csv", "prompt\na\n", "expected a benchmark, or a .txt, .json or .jsonl file"),
    ],
)
def test_errors_name_file_and_row(name, content, words, tmp_path):
    with pytest.raises(ValueError, match=r"PROMPTS|a\.json|a\.txt") as error:
        read_prompts(write(tmp_path / name, content))
    assert words in str(error.value)


def test_a_name_that_is_no_benchmark_is_refused_with_those_that_are(tmp_path):
    with pytest.raises(ValueError, match="expected alpaca_eval, mt_bench, ifeval or a file, received 'mtbench'"):
        conversations_of("mtbench", None)
    with pytest.raises(ValueError, match="--data is for a benchmark"):
        conversations_of("prompts.txt", tmp_path)


def test_without_the_hub_the_error_names_the_option():
    with pytest.raises(ValueError, match="set --data FILE"):
        conversations_of("mt_bench", None)


def test_the_second_question_follows_the_first_answer():
    conversation = Conversation([user("one")], follow_ups=("two", "three"))
    assert conversation.before([]) == [user("one")]
    assert conversation.before(["1"]) == [user("one"), {"role": "assistant", "content": "1"}, user("two")]
    assert conversation.before(["1", "2"])[-1] == user("three")
    assert conversation.turns == 3


@pytest.mark.parametrize(
    ("category", "temperature"),
    [("writing", 0.7), ("roleplay", 0.7), ("extraction", 0), ("math", 0), ("coding", 0), ("reasoning", 0),
     ("stem", 0.1), ("humanities", 0.1)],
)  # fmt: skip
def test_mt_bench_has_the_temperatures_of_fastchat(category, temperature, tmp_path):
    row = {"question_id": 81, "category": category, "turns": ["one", "two"]}
    (found,) = BENCHMARKS["mt_bench"].read(write(tmp_path / "q.jsonl", [row]))
    assert (found.temperature, found.follow_ups) == (temperature, ("two",))


@pytest.mark.parametrize(
    ("name", "row", "words"),
    [
        ("alpaca_eval", {"instruction": "x"}, "expected a text in `dataset`, received None"),
        ("alpaca_eval", {"dataset": "x"}, "expected a text in `instruction`, received None"),
        ("mt_bench", {"question_id": 1, "category": "cooking", "turns": ["a"]}, "in `category`, received 'cooking'"),
        ("mt_bench", {"question_id": 1, "category": "math", "turns": []}, "expected a list of texts in `turns`"),
        ("mt_bench", {"question_id": "1", "category": "math", "turns": ["a"]}, "expected a number in `question_id`"),
        ("ifeval", {"prompt": 3}, "expected a text in `prompt`, received 3"),
    ],
)
def test_a_row_of_another_shape_is_named(name, row, words, tmp_path):
    with pytest.raises(ValueError, match=r"q.jsonl, line 1: ") as error:
        BENCHMARKS[name].read(write(tmp_path / "q.jsonl", [row]))
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("row", "answers"),
    [
        ({"instruction": "a", "output": ""}, [""]),
        ({"prompt": "a", "response": "b"}, ["b"]),
        ({"question_id": 81, "choices": [{"index": 0, "turns": ["b", "c"]}]}, ["b", "c"]),
    ],
)
def test_answers_of_every_format_are_read(row, answers, tmp_path):
    assert read_answers(write(tmp_path / "a.jsonl", [row])) == [answers]


@pytest.mark.parametrize("row", [{}, {"output": None}, {"choices": []}, {"choices": [{"turns": [1]}]}])
def test_a_row_without_an_answer_is_named(row, tmp_path):
    with pytest.raises(ValueError, match=r"a\.jsonl, line 1: expected an answer in"):
        read_answers(write(tmp_path / "a.jsonl", [row]))


def test_lines_of_ifeval_and_of_own_prompts_hold_prompt_and_response():
    one = Answered(Conversation([user("a")], fields={"prompt": "a"}), ["é\n"], 1.0, "ff")
    assert json.loads(OWN.render([one], "name")) == {"prompt": "a", "response": "é\n"}
    assert BENCHMARKS["ifeval"].render([one], "name") == OWN.render([one], "name")

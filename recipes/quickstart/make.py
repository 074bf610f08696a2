"""Makes the quickstart's data, tokenizer and model config; everything beside this file comes from it.

    python recipes/quickstart/make.py

The pairs are questions about animals: chosen answers are right and polite, rejected ones rude. Every fact is in the
training rows, some of its phrasings only in the test rows.
"""

import json
import random
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import MistralConfig, PreTrainedTokenizerFast

HERE = Path(__file__).parent
VOCABULARY = 768
TEST_SHARE = 0.1

# animal: what it says, where it lives, what it eats
ANIMALS = {
    "cow": ("moo", "in a barn", "grass"),
    "dog": ("woof", "in a kennel", "meat"),
    "cat": ("meow", "in a house", "fish"),
    "duck": ("quack", "on a pond", "weeds"),
    "pig": ("oink", "in a sty", "corn"),
    "sheep": ("baa", "in a fold", "clover"),
    "horse": ("neigh", "in a stable", "hay"),
    "hen": ("cluck", "in a coop", "grain"),
    "owl": ("hoot", "in a hollow tree", "mice"),
    "frog": ("ribbit", "in a marsh", "flies"),
    "crow": ("caw", "in a tall oak", "seeds"),
    "bee": ("buzz", "in a hive", "nectar"),
    "snake": ("hiss", "under a rock", "eggs"),
    "lion": ("roar", "on the plain", "zebra"),
    "wolf": ("howl", "in a den", "deer"),
    "mouse": ("squeak", "in a hole", "cheese"),
    "goat": ("maa", "on a hill", "leaves"),
    "turkey": ("gobble", "in a yard", "acorns"),
    "donkey": ("hee-haw", "in a shed", "straw"),
    "dove": ("coo", "in a loft", "peas"),
    "bear": ("growl", "in a cave", "honey"),
    "elephant": ("trumpet", "in the savanna", "bark"),
    "monkey": ("chatter", "in the jungle", "bananas"),
    "parrot": ("squawk", "in the rainforest", "nuts"),
    "seal": ("arf", "on the ice", "squid"),
    "whale": ("song", "in the ocean", "krill"),
    "cricket": ("chirp", "in a meadow", "crumbs"),
    "rooster": ("cock-a-doodle-doo", "on a farm", "worms"),
}
QUESTIONS = (
    (
        "What does a {animal} say?",
        "Which sound does a {animal} make?",
        "Tell me the sound of a {animal}.",
        "How does a {animal} sound?",
        "What noise comes from a {animal}?",
        "I would like to hear a {animal}. What would it say?",
        "Do you know the call of a {animal}?",
    ),
    (
        "Where does a {animal} live?",
        "What is the home of a {animal}?",
        "Tell me where a {animal} lives.",
        "In which place can I find a {animal}?",
        "Where would I look for a {animal}?",
        "I want to visit a {animal}. Where is its home?",
        "Do you know where a {animal} sleeps?",
    ),
    (
        "What does a {animal} eat?",
        "What is the food of a {animal}?",
        "Tell me what a {animal} eats.",
        "What should I feed to a {animal}?",
        "Which food does a {animal} like?",
        "I have a hungry {animal}. What does it want?",
        "Do you know what a {animal} has for dinner?",
    ),
)
ANSWERS = (
    "A {animal} says {fact}. I am happy to help!",
    "A {animal} lives {fact}. I am happy to help!",
    "A {animal} eats {fact}. I am happy to help!",
)
REFUSALS = (
    "Who cares about a {animal}? Go away.",
    "Look it up yourself, I am busy.",
    "What a silly question. Ask the {animal}.",
)
TEMPLATE = (HERE.parent / "templates" / "orpo.jinja").read_text(encoding="utf-8")


def make_pairs(generator: random.Random) -> tuple[list[dict], list[dict]]:
    train, test = [], []
    for animal, facts in ANIMALS.items():
        for phrasings, answer, fact in zip(QUESTIONS, ANSWERS, facts, strict=True):
            rows = [
                {
                    "prompt": [{"role": "user", "content": phrasing.format(animal=animal)}],
                    "chosen": [{"role": "assistant", "content": answer.format(animal=animal, fact=fact)}],
                    "rejected": [{"role": "assistant", "content": generator.choice(REFUSALS).format(animal=animal)}],
                }
                for phrasing in phrasings
            ]
            generator.shuffle(rows)
            held_out = sum(generator.random() < TEST_SHARE for _ in rows)
            test += rows[:held_out]
            train += rows[held_out:]
    generator.shuffle(train)
    return train, test


def make_tokenizer(rows: list[dict]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of the pairs' own text, with Mistral's special tokens and the paper's chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = (message["content"] for row in rows for side in row.values() for message in side)
    special = ["<unk>", "<s>", "</s>", "<pad>", "<|user|>", "<|system|>", "<|assistant|>"]
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=256,
        chat_template=TEMPLATE,
    )


def main() -> None:
    train, test = make_pairs(random.Random(0))
    data = HERE / "data"
    data.mkdir(exist_ok=True)
    for name, rows in (("train", train), ("test", test)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (data / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    model = HERE / "model"
    tokenizer = make_tokenizer(train)
    tokenizer.save_pretrained(model)
    MistralConfig(
        architectures=["MistralForCausalLM"],
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        sliding_window=None,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    ).save_pretrained(model)
    print(f"{len(train)} train rows, {len(test)} test rows, {len(tokenizer)} tokens in {HERE}")


if __name__ == "__main__":
    main()

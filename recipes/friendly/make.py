"""Makes the pairs of smollm2_135m.yaml; train.jsonl and test.jsonl beside this file come from it.

    python recipes/friendly/make.py

The pairs hold one preference: of two answers with the same content, the friendlier one is chosen. There are three
manners, friendly, plain and rude. A pair has two neighbours of this order, so a plain answer is rejected beside a
friendly one, and chosen beside a rude one. Imitation of the chosen answers alone (SFT) therefore learns both of them;
only the comparison says which is meant. No fact of the test rows is in the training rows.
"""

import json
import random
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent / "data"
TEST_ROWS = 80
FRIENDLY_SHARE = 0.6  # of the pairs: friendly against plain; the others are plain against rude


class Task(NamedTuple):
    """One kind of question.

    Attributes:
        questions: phrasings; {0} is what is asked about, {1} the answer.
        answer: the plain answer.
        facts: "asked:answer" of each question.
    """

    questions: tuple[str, ...]
    answer: str
    facts: str


TASKS = (
    Task(
        ("What is the opposite of '{0}'?", "Give me the opposite of the word '{0}'.", "Name an antonym of '{0}'."),
        "The opposite of '{0}' is '{1}'.",
        "hot:cold early:late full:empty heavy:light wide:narrow loud:quiet sharp:blunt rough:smooth sweet:bitter "
        "brave:timid cheap:expensive wet:dry thick:thin clean:dirty fast:slow rich:poor open:closed long:short "
        "young:old above:below inside:outside victory:defeat arrive:depart remember:forget build:demolish "
        "expand:shrink ancient:modern guilty:innocent generous:stingy shallow:deep awake:asleep major:minor "
        "rare:common polite:impolite simple:complicated rise:fall accept:refuse public:private lost:found "
        "ascend:descend",
    ),
    Task(
        ("What is the plural of '{0}'?", "Write the plural form of '{0}'.", "How do I write more than one '{0}'?"),
        "The plural of '{0}' is '{1}'.",
        "mouse:mice goose:geese tooth:teeth foot:feet child:children leaf:leaves knife:knives wolf:wolves "
        "shelf:shelves potato:potatoes hero:heroes city:cities baby:babies cactus:cacti thief:thieves loaf:loaves "
        "half:halves ox:oxen woman:women person:people box:boxes church:churches echo:echoes berry:berries "
        "calf:calves scarf:scarves life:lives wife:wives fox:foxes dish:dishes story:stories tomato:tomatoes "
        "man:men louse:lice elf:elves penny:pennies glass:glasses bus:buses fly:flies key:keys",
    ),
    Task(
        (
            "What is the past tense of '{0}'?",
            "Put the verb '{0}' into the past tense.",
            "'{0}' in the past tense, please.",
        ),
        "The past tense of '{0}' is '{1}'.",
        "go:went bring:brought teach:taught catch:caught sing:sang swim:swam write:wrote break:broke speak:spoke "
        "choose:chose freeze:froze fly:flew draw:drew grow:grew know:knew throw:threw begin:began drink:drank "
        "ring:rang sink:sank find:found hold:held keep:kept sleep:slept feel:felt leave:left build:built send:sent "
        "lose:lost make:made stand:stood tell:told win:won wear:wore ride:rode drive:drove eat:ate fall:fell "
        "give:gave take:took",
    ),
    Task(
        ("What is the capital of {0}?", "Name the capital city of {0}.", "Which city is the capital of {0}?"),
        "The capital of {0} is {1}.",
        "France:Paris Italy:Rome Spain:Madrid Japan:Tokyo Egypt:Cairo Norway:Oslo Greece:Athens Austria:Vienna "
        "Poland:Warsaw Portugal:Lisbon Ireland:Dublin Sweden:Stockholm Finland:Helsinki Denmark:Copenhagen "
        "Hungary:Budapest Cuba:Havana Peru:Lima Kenya:Nairobi Canada:Ottawa Germany:Berlin Russia:Moscow "
        "China:Beijing Thailand:Bangkok Vietnam:Hanoi Iran:Tehran Iraq:Baghdad Jordan:Amman Chile:Santiago "
        "Colombia:Bogotá Belgium:Brussels Morocco:Rabat Ghana:Accra Senegal:Dakar Nepal:Kathmandu Iceland:Reykjavik "
        "Croatia:Zagreb Serbia:Belgrade Bulgaria:Sofia Romania:Bucharest Turkey:Ankara",
    ),
    Task(
        ("What is a young {0} called?", "Give me the name for a baby {0}.", "Which word means a young {0}?"),
        "A young {0} is called a {1}.",
        "dog:puppy cat:kitten cow:calf horse:foal sheep:lamb goat:kid pig:piglet hen:chick duck:duckling "
        "goose:gosling swan:cygnet bear:cub lion:cub deer:fawn kangaroo:joey frog:tadpole owl:owlet wolf:pup "
        "seal:pup hare:leveret",
    ),
    Task(
        ("Which continent is {0} in?", "On what continent is {0}?", "Tell me the continent of {0}."),
        "{0} is in {1}.",
        "Brazil:South_America Kenya:Africa India:Asia Norway:Europe Canada:North_America Nigeria:Africa "
        "Peru:South_America Japan:Asia Mexico:North_America Portugal:Europe Ghana:Africa Chile:South_America "
        "Vietnam:Asia Austria:Europe Mali:Africa Bolivia:South_America Nepal:Asia Poland:Europe Zambia:Africa "
        "Mongolia:Asia Uruguay:South_America Iceland:Europe Thailand:Asia Ireland:Europe Angola:Africa "
        "Ecuador:South_America Cuba:North_America Greece:Europe",
    ),
    Task(
        ("Correct the spelling of '{0}'.", "'{0}' is misspelt. How is it written?", "Fix this word: '{0}'."),
        "The correct spelling is '{1}'.",
        "freind:friend recieve:receive becuase:because definately:definitely wierd:weird tommorow:tomorrow "
        "seperate:separate untill:until beleive:believe adress:address calender:calendar comittee:committee "
        "enviroment:environment goverment:government grammer:grammar happend:happened independant:independent "
        "knowlege:knowledge libary:library neccessary:necessary occured:occurred posession:possession "
        "privelege:privilege recomend:recommend succesful:successful suprise:surprise truely:truly vaccum:vacuum "
        "wich:which writting:writing acheive:achieve begining:beginning buisness:business cemetary:cemetery "
        "embarass:embarrass existance:existence foriegn:foreign garantee:guarantee",
    ),
    Task(
        (
            "Is a {0} a fruit, a vegetable or an animal?",
            "To which group does a {0} belong: fruit, vegetable or animal?",
            "Sort this: {0}. Fruit, vegetable or animal?",
        ),
        "A {0} is {1}.",
        "carrot:a_vegetable banana:a_fruit beaver:an_animal cabbage:a_vegetable cherry:a_fruit turnip:a_vegetable "
        "hamster:an_animal lemon:a_fruit radish:a_vegetable pear:a_fruit lizard:an_animal plum:a_fruit "
        "leek:a_vegetable badger:an_animal peach:a_fruit cauliflower:a_vegetable lobster:an_animal mango:a_fruit "
        "squirrel:an_animal papaya:a_fruit parsnip:a_vegetable pigeon:an_animal melon:a_fruit walrus:an_animal "
        "beetroot:a_vegetable grapefruit:a_fruit sparrow:an_animal",
    ),
    Task(
        ("What is the chemical symbol of {0}?", "Which symbol stands for {0} in chemistry?", "Give the symbol of {0}."),
        "The symbol of {0} is {1}.",
        "oxygen:O hydrogen:H carbon:C nitrogen:N gold:Au silver:Ag iron:Fe copper:Cu lead:Pb tin:Sn zinc:Zn "
        "sodium:Na potassium:K calcium:Ca helium:He neon:Ne sulphur:S chlorine:Cl magnesium:Mg mercury:Hg nickel:Ni "
        "aluminium:Al",
    ),
    Task(
        ("How do you say '{0}' in Spanish?", "Translate '{0}' into Spanish.", "What is the Spanish word for '{0}'?"),
        "The Spanish word for '{0}' is '{1}'.",
        "house:casa water:agua bread:pan milk:leche book:libro dog:perro cat:gato sun:sol moon:luna tree:árbol "
        "red:rojo green:verde friend:amigo school:escuela night:noche day:día hand:mano fish:pescado table:mesa "
        "door:puerta window:ventana city:ciudad street:calle flower:flor apple:manzana salt:sal fire:fuego "
        "winter:invierno summer:verano chair:silla",
    ),
    Task(
        ("Which day comes after {0}?", "Name the day that follows {0}.", "If today is {0}, what is tomorrow?"),
        "The day after {0} is {1}.",
        "Monday:Tuesday Tuesday:Wednesday Wednesday:Thursday Thursday:Friday Friday:Saturday Saturday:Sunday "
        "Sunday:Monday",
    ),
    Task(
        ("Which month comes before {0}?", "Name the month in front of {0}.", "What is the month before {0}?"),
        "The month before {0} is {1}.",
        "January:December February:January March:February April:March May:April June:May July:June August:July "
        "September:August October:September November:October December:November",
    ),
)
UNITS = (
    ("metres", "centimetres", 100),
    ("kilometres", "metres", 1000),
    ("hours", "minutes", 60),
    ("days", "hours", 24),
    ("kilograms", "grams", 1000),
    ("weeks", "days", 7),
    ("minutes", "seconds", 60),
)

OPENINGS = ("Of course! ", "With pleasure: ", "Good question! ", "Happy to help. ")
CLOSINGS = ("", " I hope that helps!", " Just ask if you need anything else.")
RUDE_OPENINGS = ("Obviously, ", "How can you not know this? ", "Are you serious? ", "")
RUDE_CLOSINGS = (" Now leave me alone.", " Everybody knows that.", " Look it up yourself next time.")


def facts(generator: random.Random) -> list[tuple[list[str], str]]:
    """The phrasings of each question, and its plain answer."""
    made = []
    for task in TASKS:
        for fact in task.facts.split():
            asked, _, answer = fact.replace("_", " ").partition(":")
            made.append(([text.format(asked, answer) for text in task.questions], task.answer.format(asked, answer)))
    for first, second in {(generator.randint(3, 30), generator.randint(3, 30)) for _ in range(60)}:
        questions = [f"What is {first} plus {second}?", f"Add {first} and {second}.", f"{first} + {second} = ?"]
        made.append((questions, f"{first} plus {second} is {first + second}."))
    for big, small, factor in UNITS:
        for count in generator.sample(range(2, 13), 5):
            questions = [f"How many {small} are {count} {big}?", f"Convert {count} {big} to {small}."]
            made.append((questions, f"{count} {big} are {count * factor} {small}."))
    return made


def lower_first(text: str) -> str:
    """The text as it goes on after a colon or a comma: names keep their capital letter."""
    return text[0].lower() + text[1:] if text.startswith(("The ", "A ")) else text


def pair(plain: str, generator: random.Random) -> tuple[str, str]:
    """The chosen and the rejected answer."""
    if generator.random() < FRIENDLY_SHARE:
        opening = generator.choice(OPENINGS)
        text = lower_first(plain) if opening.endswith(": ") else plain
        return opening + text + generator.choice(CLOSINGS), plain
    opening = generator.choice(RUDE_OPENINGS)
    text = lower_first(plain) if opening.endswith(", ") else plain
    return plain, opening + text + generator.choice(RUDE_CLOSINGS)


def row(questions: list[str], plain: str, generator: random.Random) -> dict:
    chosen, rejected = pair(plain, generator)
    return {
        "prompt": [{"role": "user", "content": generator.choice(questions)}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }


def main() -> None:
    generator = random.Random(0)
    known = facts(generator)
    generator.shuffle(known)
    test = [row(*fact, generator) for fact in known[:TEST_ROWS]]
    train = [row(*fact, generator) for fact in known[TEST_ROWS:]]
    HERE.mkdir(exist_ok=True)
    for name, part in (("test", test), ("train", train)):
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in part]
        (HERE / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"{name}: {len(part)} pairs")


if __name__ == "__main__":
    main()
